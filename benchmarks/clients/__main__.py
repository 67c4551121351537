"""Run clients of ONNX files, unmodified, on our graphs and on transformers' own exports of the same weights.

    python -m benchmarks.clients [--only NAME,...] [--models NAME,...] [--images 100] [--environments FOLDER]

Each client is installed into an environment of its own and runs in a process of its own. The reference is the network of
transformers. A row has, for each model, the images with the same best class and the largest difference of a probability; in
parentheses, the same for the export of transformers.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np

ROOT, HERE = Path(__file__).resolve().parents[2], Path(__file__).parent
MODELS = ("swin-digits", "swinv2-digits", "swin-tiny", "swinv2-tiny")
SECONDS = 1800  # the longest that a client may take


def checkpoint(name: str, folder: Path) -> Path:
    """Return the folder of a checkpoint: one of the repository, or random weights, no parameter 0 or 1."""
    if (ROOT / "examples/digits" / name).is_dir():
        return ROOT / "examples/digits" / name
    import torch
    from transformers import SwinConfig, SwinForImageClassification, Swinv2Config, Swinv2ForImageClassification

    torch.manual_seed(0)
    network: Any = (
        SwinForImageClassification(SwinConfig(num_labels=1000))
        if name == "swin-tiny"
        else Swinv2ForImageClassification(Swinv2Config(num_labels=1000, image_size=256, window_size=8))
    )
    with torch.no_grad():
        for values in network.parameters():
            values += 0.02 * torch.randn_like(values)
    network.save_pretrained(folder / name)
    return folder / name


def exports(name: str, folder: Path, images: int) -> tuple[dict[str, Path], np.ndarray, np.ndarray]:
    """Return the folders with our graph and with that of transformers, the pixels, and the reference logits."""
    import torch

    import swin_deploy
    from swin_deploy.bench.baselines import torchscript_export, transformers_network

    source = checkpoint(name, folder)
    ours, theirs = folder / f"{name}-ours", folder / f"{name}-theirs"
    bundle = swin_deploy.export(weights=source, output=ours)
    network = transformers_network(source)
    shape = (1, 3, *bundle.image_size)  # its batch is fixed, so clients run one image at a time
    (theirs / "onnx").mkdir(parents=True)
    (theirs / "onnx/model.onnx").write_bytes(torchscript_export(network, shape))
    for file in ("config.json", "preprocessor_config.json"):
        shutil.copy(ours / file, theirs)
    pixels = np.random.default_rng(0).standard_normal((images, *shape[1:])).astype(np.float32)
    with torch.no_grad():
        batches = [network(torch.from_numpy(pixels[i : i + 10])) for i in range(0, images, 10)]
    return {"ours": ours, "theirs": theirs}, pixels, np.concatenate([batch.numpy() for batch in batches])


def environment(title: str, client: Any, folder: Path) -> Path:
    """Create the environment of a client unless there is one, and return its folder."""
    place = folder / title.replace(" ", "-").replace("(", "").replace(")", "")
    if not (place / "done").exists():
        venv.create(place, with_pip=True, clear=True)
        python, packages = place / "bin/python", client.ENVIRONMENTS[title]
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages], check=True)
        (place / "done").touch()
    return place


def answer(module: str, place: Path, folder: Path, pixels: np.ndarray, reference: np.ndarray) -> str:
    """Return how many best classes are the same and the largest difference of a probability, or why there is no answer."""
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch) / "pixels.npy", Path(scratch) / "logits.npy"
        model = shutil.copytree(folder, Path(scratch) / "model")
        np.save(given, pixels)
        command = [place / "bin/python", HERE / "run.py", module, model, given, made]
        try:
            # Some clients run pip when they are imported: only that of their environment may be found.
            path = f"{place / 'bin'}{os.pathsep}/usr/local/bin{os.pathsep}/usr/bin{os.pathsep}/bin"
            variables = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(place)}
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=SECONDS, env=variables)
        except subprocess.TimeoutExpired:
            return f"no answer in {SECONDS} s"
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            (place / f"{folder.name}.log").write_text(done.stdout + done.stderr)
            return f"fails: {lines[-1][:100]}"
        found = np.load(made)
    equal = int((found.argmax(1) == reference.argmax(1)).sum())
    return f"{equal}/{len(found)}, {np.abs(softmax(found) - softmax(reference)).max():.1e}"


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return np.asarray(odds / odds.sum(1, keepdims=True))


def installed(title: str, client: Any, place: Path) -> str:
    """Return the version of the first package of a client."""
    names = [package.split("<")[0].split(">")[0].split("=")[0] for package in client.ENVIRONMENTS[title]]
    code = f"from importlib.metadata import version; print(version({names[0]!r}))"
    return subprocess.run([place / "bin/python", "-c", code], capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="clients, with commas between them")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--environments", type=Path, default=ROOT / "build/clients")
    given = parser.parse_args()
    sys.path.append(str(HERE))
    clients = {
        title: module
        for path in sorted(HERE.glob("client_*.py"))
        for module in [path.stem]
        for title in importlib.import_module(path.stem).ENVIRONMENTS
        if not given.only or title in given.only.split(",")
    }
    models = given.models.split(",")
    with tempfile.TemporaryDirectory() as folder:
        made = {name: exports(name, Path(folder), given.images) for name in models}
        print(f"| client | version | {' | '.join(models)} |\n|---|---|{'---|' * len(models)}", flush=True)
        for title, module in clients.items():
            client, cells = importlib.import_module(module), []
            try:
                place = environment(title, client, given.environments.resolve())
            except subprocess.CalledProcessError as error:
                print(f"| {title} | cannot be installed: {error} | {' | ' * len(models)}", flush=True)
                continue
            for name in models:
                folders, pixels, reference = made[name]
                both = [answer(module, place, folders[kind], pixels, reference) for kind in ("ours", "theirs")]
                cells.append(f"{both[0]} ({both[1]})")
            print(f"| {title} | {installed(title, client, place)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
