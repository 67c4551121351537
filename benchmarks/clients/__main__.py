"""Run other programs, unmodified, on our bundles and on the exports of transformers of the same weights.

    python -m benchmarks.clients [--only CLIENT,...] [--models NAME,...] [--images 100] [--again] [--folder build/clients]

Each client is installed into an environment of its own and runs in a process of its own. The reference is the network of
transformers. Results are kept in the folder: a client that has a result for a model file is not run again without --again.
The table has every result of the folder. A cell has the number of images with the same best class, and the largest difference
of a probability; in parentheses, the same for the export of transformers.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .models import MODELS, ROOT, made, softmax

HERE = Path(__file__).parent
SECONDS = 1800  # the longest that a client may take
NPM = "npm:"


def clients() -> dict[str, ModuleType]:
    """Return the module of every client."""
    sys.path.append(str(HERE))
    modules = [importlib.import_module(path.stem) for path in sorted(HERE.glob("client_*.py"))]
    return {title: module for module in modules for title in module.ENVIRONMENTS}


def environment(title: str, client: ModuleType, folder: Path) -> Path:
    """Create the environment of a client unless there is one, and return its folder. Raises OSError if that fails."""
    place = folder / title.replace(" ", "-")
    if (place / "done").exists():
        return place
    venv.create(place, with_pip=True, clear=True)
    packages = client.ENVIRONMENTS[title]
    python = [str(ROOT) + one[1:] if one.startswith(".") else one for one in packages if not one.startswith(NPM)]
    commands = [[str(place / "bin/python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", *python]]
    if node := [one.removeprefix(NPM) for one in packages if one.startswith(NPM)]:
        commands.append(["npm", "install", "--silent", "--no-save", "--ignore-scripts", "--prefix", str(place), *node])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError(last_line(done.stderr) or f"{command[0]} ended with {done.returncode}")
    (place / "done").touch()
    return place


def installed(packages: list[str], place: Path) -> str:
    """Return the version of the package that the client is named after, the last one."""
    name = packages[-1]
    if name.startswith(NPM):
        package = place / "node_modules" / name.removeprefix(NPM) / "package.json"
        return str(json.loads(package.read_text(encoding="utf-8"))["version"])
    bare = name.split("[")[0].split("<")[0].split(">")[0].split("=")[0]
    code = f"from importlib.metadata import version; print(version({bare!r}))"
    return subprocess.run([place / "bin/python", "-c", code], capture_output=True, text=True).stdout.strip()


def last_line(text: str) -> str:
    """Return the line of the error of a program, without what may break a table."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("WARNING")]
    errors = [line for line in lines if "rror" in line.split(":")[0]] or lines
    return errors[-1].replace("|", "/")[:120] if errors else ""


def answer(client: ModuleType, place: Path, model: Path, data: Path) -> str:
    """Run a client and return how many best classes are the same and the largest difference of a probability, or its error."""
    scratch = place / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(model, scratch / "model")
    command = [place / "bin/python", HERE / "run.py", client.__name__, scratch / "model", data, scratch / "scores.npy"]
    # Some clients run pip when they are imported: only that of their environment may be found.
    folders = (str(place / "bin"), "/usr/local/bin", "/usr/bin", "/bin")
    variables = {**os.environ, "PATH": os.pathsep.join(folders), "VIRTUAL_ENV": str(place)}
    log = place / f"{model.parent.name}-{model.name}.log"
    with log.open("w+", encoding="utf-8") as written:
        process = subprocess.Popen(command, cwd=scratch, stdout=written, stderr=written, env=variables, start_new_session=True)
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return f"no answer in {SECONDS} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode:
        return (
            f"not opened: {last_line(log.read_text(encoding='utf-8', errors='replace')) or f'exit code {process.returncode}'}"
        )
    if (scratch / "scores.txt").exists():
        return (scratch / "scores.txt").read_text(encoding="utf-8")
    found, reference = np.load(scratch / "scores.npy").astype(np.float64), np.load(data / "logits.npy").astype(np.float64)
    found, reference = found if hasattr(client, "scores") else softmax(found), softmax(reference)[: len(found)]
    equal = int((found.argmax(1) == reference.argmax(1)).sum())
    return f"{equal}/{len(found)}, {np.abs(found - reference).max():.1e}"


def digest(model: Path, data: Path) -> str:
    """Return the sha256 of the graph of a model and of its images, by which results are kept."""
    files = (model / "onnx/model.onnx", data / "pixels.npy")
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def measure(title: str, client: ModuleType, models: list[str], folder: Path, again: bool) -> None:
    """Run a client on the models, and keep its results."""
    kept = folder / "results" / f"{title.replace(' ', '-')}.json"
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    kept.parent.mkdir(exist_ok=True)
    try:
        place = environment(title, client, folder / "environments")
    except OSError as error:
        kept.write_text(json.dumps({"version": f"cannot be installed: {error}"}), encoding="utf-8")
        return
    found["version"] = installed(client.ENVIRONMENTS[title], place)
    for name in models:
        data, ours = folder / "models" / name, getattr(client, "OURS", "ours")
        for kind in (ours,) if getattr(client, "BUNDLES", False) else (ours, "theirs"):
            key, of = f"{name} {kind}", digest(data / kind, data)
            if again or found.get(key, {}).get("digest") != of:
                start = time.monotonic()
                cell = answer(client, place, data / kind, data)
                found[key] = {"digest": of, "cell": cell, "seconds": round(time.monotonic() - start)}
                print(f"{title}, {key}: {cell} ({found[key]['seconds']} s)", file=sys.stderr, flush=True)
                kept.write_text(json.dumps(found, indent=1), encoding="utf-8")


def table(known: dict[str, ModuleType], folder: Path) -> str:
    """Return the table of all results."""
    lines = [f"| client | version | {' | '.join(MODELS)} |", f"|---|---|{'---|' * len(MODELS)}"]
    for title, client in known.items():
        kept = folder / "results" / f"{title.replace(' ', '-')}.json"
        if not kept.exists():
            continue
        found, cells = json.loads(kept.read_text(encoding="utf-8")), []
        for name in MODELS:
            both = [found.get(f"{name} {kind}", {}).get("cell") for kind in (getattr(client, "OURS", "ours"), "theirs")]
            cells.append(f"{both[0] or ''} ({both[1]})" if both[1] else both[0] or "")
        note = ", 8 bits" if hasattr(client, "QUANTIZED") else ", `--opset 17`" if hasattr(client, "OURS") else ""
        lines.append(f"| {title}{note} | {found['version']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="clients, with commas between them")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--again", action="store_true", help="run clients that have a result, too")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/clients")
    given = parser.parse_args()
    folder, known = given.folder.resolve(), clients()
    chosen = given.only.split(",") if given.only else list(known)
    if unknown := [title for title in chosen if title not in known]:
        parser.error(f"Unknown client {unknown[0]}. Expected one of: {', '.join(known)}")
    for name in given.models.split(","):
        made(name, folder / "models" / name, given.images)
    for title in chosen:
        measure(title, known[title], given.models.split(","), folder, given.again)
    print(table(known, folder))
    print(f"\ntransformers {version('transformers')}, torch {version('torch')}", file=sys.stderr)


if __name__ == "__main__":
    main()
