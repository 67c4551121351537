"""Measure the size of a fresh environment with the extra "onnxruntime", and the time to its first label.

    python benchmarks/cold_start.py [--bundle FOLDER] [--source .] [--image FILE] [--runs 10] [--folder FOLDER]
    python benchmarks/cold_start.py --here [--backends onnxruntime,openvino] [--bundle FOLDER] [--runs 10]

Creates a virtual environment, installs "swin-deploy[onnxruntime]" from `--source` (this checkout, or a wheel), and classifies
a photograph in it, each time in a new process. Without `--bundle`, a Swin-T with random weights is exported first, which needs
the extra "export". Needs a package index. Times are in milliseconds: the minimum and median of the wall clock, and the median
of the processor time of all threads, which depends less on other programs.

With `--here`, it measures the installed back ends in this environment instead (with compiled bytecode), and the memory of a
loaded model (Linux): what two processes with the same bundle hold at the same time, each in MB, beyond what they held after
the imports. "resident" is all of it, "private" is what no other process shares and no file backs, "share" counts pages of both
by half (PSS).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The first argument is the time at which the parent process started this one.
APPLICATION = """
import json, sys, time
start, bundle, image, backend = float(sys.argv[1]), *sys.argv[2:5]
def since(): return [1e3 * (time.time() - start), 1e3 * time.process_time()]
marks = {"Python": since()}
import numpy
marks["import numpy"] = since()
import swin_deploy
marks["import swin_deploy"] = since()
with swin_deploy.load(bundle, backend=backend, precision="fp32") as model:
    marks["load"] = since()
    [[best, *_]] = model.classify(image)
    marks["first label"] = since()
    model.classify(image)
    marks["second label"] = since()
heavy = [name for name in ("torch", "onnx", "transformers") if name in sys.modules]
print(json.dumps({"marks": marks, "label": best.label, "heavy": heavy}))
"""


MEMORY = """
import json, pathlib, sys
bundle, image, backend = sys.argv[1:]
import PIL.Image
import swin_deploy
from swin_deploy.dependencies import require
library = require(backend, "measure")
if backend == "openvino":
    library.Core().get_property("CPU", "FULL_DEVICE_NAME")  # loads its code
def held():
    rows = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kb = {row.split()[0]: int(row.split()[1]) for row in rows}
    return [kb[name] * 1024 / 1e6 for name in ("Rss:", "Anonymous:", "Pss:")]
before = held()
with swin_deploy.load(bundle, backend=backend, precision="fp32") as model:
    for step in ("loaded", "used"):
        print(flush=True)
        input()  # until the other process is ready, too
        print(json.dumps([now - then for then, now in zip(before, held())]), flush=True)
        input()
        model.classify(image)
        model.classify(image)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--source", default=str(ROOT))
    parser.add_argument("--image", type=Path, default=ROOT / "examples/photos/china.jpg")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="Folder of the environment, which is reused. Default: temporary.")
    parser.add_argument("--here", action="store_true", help="Measure this environment, and the memory.")
    parser.add_argument("--backends", default="onnxruntime,openvino", help="With --here.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.folder or Path(scratch)).absolute()
        bundle = given.bundle or exported(folder)
        if given.here:
            here(bundle.resolve(), given.image.resolve(), given.runs, given.backends.split(","), Path(scratch))
            return 0
        python = environment(folder / "environment", given.source)
        report(python, bundle.resolve(), given.image.resolve(), given.runs, Path(scratch))
    return 0


def exported(folder: Path) -> Path:
    """Export a Swin-T with random weights in this environment."""
    target = folder / "swin-tiny"
    if not target.exists():
        command = "import sys; from swin_deploy.cli import main; main()"
        arguments = ["export", "--variant", "swin-tiny", "--random-weights", "--target", "onnxruntime", "-o", str(target)]
        subprocess.run([sys.executable, "-c", command, *arguments], check=True, stdout=sys.stderr)
    return target


def environment(folder: Path, source: str) -> Path:
    """Create an environment with only the extra, and no pip of its own; return its Python."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=False)
        install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, f"swin-deploy[onnxruntime] @ {Path(source).resolve().as_uri()}"], check=True)
    return python


def report(python: Path, bundle: Path, image: Path, runs: int, cwd: Path) -> None:
    answers = [first_label(python, bundle, image, cwd) for _ in range(runs + 1)][1:]  # the first run fills the disk cache
    heavy = sorted({name for answer in answers for name in answer["heavy"]})
    assert not heavy, f"imported: {heavy}"
    sizes = sizes_of(python, cwd)
    print("| package | MB on disk |")
    print("|---|---|")
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"| {name} | {size / 1e6:.1f} |")
    print(f"| **all** | **{sum(sizes.values()) / 1e6:.1f}** |")
    print()
    print("| since the process was started | best ms | median ms | processor ms |")
    print("|---|---|---|---|")
    for mark in answers[0]["marks"]:
        clock, spent = zip(*(answer["marks"][mark] for answer in answers), strict=True)
        print(f"| {mark} | {min(clock):.0f} | {statistics.median(clock):.0f} | {statistics.median(spent):.0f} |")


def here(bundle: Path, image: Path, runs: int, backends: list[str], cwd: Path) -> None:
    python, marks = Path(sys.executable), ("load", "first label", "second label")
    answers: dict[str, list[dict[str, Any]]] = {backend: [] for backend in backends}
    for number in range(runs + 1):
        for backend, found in answers.items():
            answer = first_label(python, bundle, image, cwd, backend)
            if number:  # the first run fills the caches
                found.append(answer)
    print("| since the process was started | best ms | median ms | processor ms |")
    print("|---|---|---|---|")
    for backend, found in answers.items():
        for mark in marks:
            clock, spent = zip(*(answer["marks"][mark] for answer in found), strict=True)
            print(f"| {backend}: {mark} | {min(clock):.0f} | {statistics.median(clock):.0f} | {statistics.median(spent):.0f} |")
    print()
    print("| two processes | resident MB | private MB | share MB |")
    print("|---|---|---|---|")
    for backend in backends:
        for when, row in zip(
            ("loaded", "loaded", "after two images", "after two images"), memory_of_two(bundle, image, backend), strict=True
        ):
            print(f"| {backend}, {when} | {' | '.join(f'{value:.0f}' for value in row)} |")


def memory_of_two(bundle: Path, image: Path, backend: str) -> list[list[float]]:
    """Load the bundle in two processes and return the memory that the model holds in each, when loaded and after two images."""
    command = [sys.executable, "-c", MEMORY, str(bundle), str(image), backend]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = []
    for step in ("loaded", "measured") * 2:
        for one in both:
            assert one.stdin is not None
            assert one.stdout is not None
            line = one.stdout.readline()
            if step == "measured":
                found.append(json.loads(line))
        for one in both:
            assert one.stdin is not None
            one.stdin.write("\n")
            one.stdin.flush()
    for one in both:
        one.wait()
    return found


def first_label(python: Path, bundle: Path, image: Path, cwd: Path, backend: str = "auto") -> dict[str, Any]:
    """Run the application once and return its marks."""
    command = [str(python), "-c", APPLICATION, repr(time.time()), str(bundle), str(image), backend]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, env=environ)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def sizes_of(python: Path, cwd: Path) -> dict[str, int]:
    """Return the bytes of each distribution in the environment, with compiled bytecode."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    place = Path(subprocess.run([str(python), "-c", code], cwd=cwd, capture_output=True, text=True, check=True).stdout.strip())
    sizes: dict[str, int] = {}
    for entry in place.iterdir():
        name = (
            entry.name.partition(".")[0]
            if entry.is_dir() and not entry.name.endswith("-info")
            else entry.name.partition("-")[0]
        )
        files = [file for file in entry.rglob("*") if file.is_file()] if entry.is_dir() else [entry]
        sizes[name] = sizes.get(name, 0) + sum(file.stat().st_size for file in files)
    return sizes


if __name__ == "__main__":
    sys.exit(main())
