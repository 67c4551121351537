"""python -m benchmarks.fuzz KIND [--cases N] [--first N] [--seed S] [--workers W] [--keep DIR] [--only NUMBER]"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}

from .kinds import KINDS, plan_of
from .runner import quiet, run_cases, table
from .seeds import made_seeds


def import_everything() -> None:
    """Import all modules and their libraries, so that a forked case starts at once. No session exists before a fork."""
    with quiet():
        for library in (
            "torch",
            "torch.export",
            "onnx",
            "onnxruntime",
            "h5py",
            "safetensors.torch",
            "PIL.Image",
            "onnx_graphsurgeon",
        ):
            with contextlib.suppress(ImportError):
                importlib.import_module(library)
        root = Path(__file__).parents[2]
        for file in (
            file for folder in ("swin_deploy", "exporters", "runtimes", "calib") for file in (root / folder).rglob("*.py")
        ):
            name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            if not name.endswith("__main__"):
                with contextlib.suppress(ImportError):
                    importlib.import_module(name if name.startswith("swin_deploy") else f"swin_deploy.{name}")
        from PIL import Image

        Image.init()
    gc.collect()
    gc.freeze()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz", description="Run changed and hostile inputs of one kind, or of all."
    )
    parser.add_argument("kind", choices=(*KINDS, "all"))
    parser.add_argument("--cases", type=int, help="Number of cases. Default: that of the kind, 20,000 in all.")
    parser.add_argument("--first", type=int, default=0, help="Number of the first case.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="Cases to run at a time.")
    parser.add_argument("--only", type=int, help="Run this case alone, and keep its folder.")
    parser.add_argument("--keep", type=Path, help="Keep the folders of cases with a fault here.")
    parser.add_argument("--seeds", type=Path, help="Folder of the intact inputs, which is made once. Default: a temporary one.")
    parser.add_argument("--bundle", type=Path, help="Change this bundle, instead of two that are exported first.")
    given = parser.parse_args()
    import_everything()
    folder = given.seeds or Path(tempfile.mkdtemp(prefix="swin-fuzz-seeds-"))
    if given.keep is not None:
        given.keep.mkdir(parents=True, exist_ok=True)
    rows = []
    try:
        seeds = made_seeds(folder, given.bundle)
        for kind in KINDS if given.kind == "all" else (given.kind,):
            total = sum(count for _, count in KINDS.values())
            count = KINDS[kind][1] if given.cases is None else given.cases
            if given.kind == "all" and given.cases is not None:
                count = max(1, given.cases * KINDS[kind][1] // total)
            numbers = range(given.first, given.first + count) if given.only is None else [given.only]
            begun = time.monotonic()
            ended = run_cases(kind, plan_of(kind, seeds), given.seed, numbers, given.workers, given.keep)
            rows.append(table(kind, ended, time.monotonic() - begun))
            for one in ended:
                if given.only is not None or one.fault == "memory":
                    print(f"{one}\n{one.text}", flush=True)
            print(" ".join(f"{name}: {value}" for name, value in rows[-1].items()), flush=True)
    finally:
        if given.seeds is None:
            shutil.rmtree(folder, ignore_errors=True)
    if len(rows) > 1:
        print("\n| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
        for row in rows:
            print("| " + " | ".join(str(value) for value in row.values()) + " |")
    return int(any(row["faults"] != "0" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
