"""Compare exported graphs with the outputs of the framework that wrote each checkpoint, as a table.

    python benchmarks/checkpoints.py FOLDER

FOLDER holds one folder for each case, with a checkpoint and a reference.npz: `pixel_values` (and `bool_masked_pos`) and the
outputs, under the names of transformers' outputs; those of further runs begin with `run/`. Each case is exported as by
`swin-deploy export --weights CASE --task TASK --image-size HxW -o OUT`, with every size that it was run at in one bundle,
and ONNX Runtime runs it on the CPU. Needs the extras "export" and "onnxruntime", and no network.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import swin_deploy
from swin_deploy.bundle import size_text
from swin_deploy.errors import SwinDeployError
from swin_deploy.models.checkpoints.recognise import RecognisedCheckpoint, recognise_checkpoint
from swin_deploy.options import Size
from swin_deploy.parity import TOLERANCES
from swin_deploy.tasks import MASK, PIXELS, TaskSpec

Arrays = dict[str, NDArray[Any]]
HEADER = (
    "| case | written by | task | sizes | worst output | relative L2 | allowed | verdict |\n|---|---|---|---|---|--:|--:|---|"
)

TASK_OF_OUTPUT = {
    "logits": "image-classification",
    "reconstruction": "masked-image-modeling",
    "feature_maps.0": "backbone",
}

# Runs in a half type are an observation of one machine's arithmetic, and no reference for float32.
LEFT_OUT = ("half",)


@dataclass(frozen=True)
class Distance:
    """How far one output of one run is from the reference."""

    run: str
    output: str
    relative_l2: float
    allowed: float

    @property
    def excess(self) -> float:
        return self.relative_l2 / self.allowed

    def __str__(self) -> str:
        return f"{self.output}{f' ({self.run})' if self.run else ''}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="one folder for each case in it")
    given = parser.parse_args(arguments)
    print(", ".join(f"{p} {version(p)}" for p in ("swin-deploy", "torch", "onnxruntime")))
    print(HEADER, flush=True)
    failed = 0
    for case in sorted(path.parent for path in given.folder.glob("*/reference.npz")):
        text, good = row(case)
        print(text, flush=True)
        failed += not good
    return 1 if failed else 0


def row(case: Path) -> tuple[str, bool]:
    """The row of the table, and whether it is as it should be."""
    runs = runs_of(case / "reference.npz")
    sizes = list(dict.fromkeys(_size(arrays) for arrays in runs.values()))
    weights = checkpoint_of(case)
    try:
        source = recognise_checkpoint(weights, sizes[0])
        departs = ignores_pretrained_windows(source)
        if departs:  # its own run computes something else; another run has what its config.json says
            runs = {run: arrays for run, arrays in runs.items() if run}
        task = task_of(runs)
        distances = measured(weights, task, runs, sizes)
    except SwinDeployError as error:
        return f"| {case.name} | | | {' '.join(map(size_text, sizes))} | | | | {error} |", False
    worst = max(distances, key=lambda distance: distance.excess)
    good = bool(worst.excess <= 1)
    verdict = ("agrees" if good else "DIFFERS") + (
        " with `config.json`; what wrote it ignores `pretrained_window_sizes`" if departs else ""
    )
    cells = (
        case.name,
        source.writer,
        task.name,
        " ".join(map(size_text, sizes)),
        str(worst),
        f"{worst.relative_l2:.1e}",
        f"{worst.allowed:.1e}",
        verdict,
    )
    return f"| {' | '.join(cells)} |", good


def runs_of(file: Path) -> dict[str, Arrays]:
    """Run -> its inputs and outputs; the name of the main run is empty."""
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored}
    runs: dict[str, Arrays] = {}
    for name, array in arrays.items():
        run, _, rest = name.rpartition("/")
        runs.setdefault(run, {})[rest] = array
    for run in runs.values():
        run.setdefault(PIXELS, arrays.get(PIXELS, np.empty(0)))
    return {run: found for run, found in runs.items() if run not in LEFT_OUT}


def checkpoint_of(case: Path) -> Path:
    """The folder where there is a config.json, else the file of weights."""
    return case if (case / "config.json").is_file() else case / "model.pth"


def task_of(runs: Mapping[str, Arrays]) -> TaskSpec:
    """The task and the intermediate outputs of the reference."""
    names = {name for arrays in runs.values() for name in arrays}
    return TaskSpec(
        next((task for output, task in TASK_OF_OUTPUT.items() if output in names), "feature-extraction"),
        output_hidden_states="hidden_states.0" in names,
        output_attentions="attentions.0" in names,
    )


def ignores_pretrained_windows(source: RecognisedCheckpoint) -> bool:
    """Return whether transformers 4 wrote this. Its Swin V2 ignores pretrained_window_sizes."""
    written = str((source.raw_config or {}).get("transformers_version", ""))
    return source.config.version == 2 and written.startswith("4.") and any(source.config.pretrained_window_sizes)


def measured(weights: Path, task: TaskSpec, runs: Mapping[str, Arrays], sizes: Sequence[Size]) -> list[Distance]:
    """The distance of every output that the reference has, through export, bundle and ONNX Runtime."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = swin_deploy.export(weights=weights, task=task, image_sizes=sizes, output=Path(folder) / "bundle")
        allowed = {tuple(entry["image_size"]): entry["agreement"]["outputs"] for entry in bundle.graphs.values()}
        with swin_deploy.load(bundle.path, precision="fp32", backend="onnxruntime") as model:
            for run, arrays in runs.items():
                size = _size(arrays)
                feeds = {PIXELS: arrays[PIXELS]}
                if task.masked:
                    rows, columns = model.config.grid(size)
                    nothing = np.zeros((len(arrays[PIXELS]), rows * columns), dtype=bool)
                    feeds[MASK] = arrays.get(MASK, nothing)
                for name, output in model.run(feeds).items():
                    if name in arrays:
                        tolerance = max(TOLERANCES["fp32"], allowed[size][name]["tolerance_relative_l2"])
                        found.append(Distance(run, name, relative_l2(output, arrays[name]), tolerance))
    return found


def relative_l2(test: NDArray[Any], reference: NDArray[Any]) -> float:
    """|test - reference| / |reference|; infinite where shapes differ or something is not finite."""
    if test.shape != reference.shape:
        return float("inf")
    a, b = test.astype(np.float64), reference.astype(np.float64)
    value = float(np.linalg.norm(a - b) / max(np.linalg.norm(b), float(np.finfo(np.float64).tiny)))
    return value if np.isfinite(value) else float("inf")


def _size(arrays: Arrays) -> Size:
    height, width = arrays[PIXELS].shape[2:]
    return int(height), int(width)


if __name__ == "__main__":
    sys.exit(main())
