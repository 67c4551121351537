"""Time whole commands on this CPU: --help, export, verify, quantize beside NNCF on the same images, and build-engine.

    python benchmarks/command_times.py [--nncf PYTHON] [--networks swin-tiny,swinv2-tiny] [--images 48]

Each runs in a process of its own, with random weights. `quantize` and NNCF read the same photographs.
NNCF quantizes the export of transformers with its defaults; --nncf is the Python of an environment that has it (pip install
nncf openvino). Needs the extras "export", "openvino", "bench" and "test", and "tensorrt-rtx" for build-engine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import race_candidates

NETWORKS = ("swin-tiny", "swinv2-tiny")


def commands(network: str, folder: Path, images: int, nncf: str | None) -> Iterator[tuple[str, list[str]]]:
    """Yield what is timed: its name and the command."""
    race_candidates.CALIBRATION[network] = images
    race_candidates.make_checkpoint(network, folder, 1)
    race_candidates.make_transformers(network, folder, 1)
    np.save(folder / "pixels.npy", np.load(folder / "checkpoint/data.npz")["calibration"])
    ours, bundle = [sys.executable, "-m", "swin_deploy"], str(folder / "bundle")
    export = [*ours, "export", "--variant", network, "--random-weights", "--force"]
    yield "`--help`", [*ours, "--help"]
    yield "`export`", [*export, "--output", str(folder / "default")]
    yield "`build-engine --fp16`", [*ours, "build-engine", str(folder / "default"), "--fp16", "--force"]
    yield "`export --target openvino`", [*export, "--target", "openvino", "--output", bundle]
    yield "`verify`", [*ours, "verify", bundle]
    yield (
        f"`quantize`, {images} images",
        [*ours, "quantize", bundle, "--data", str(folder / "pixels.npy"), "--batch", "4"],
    )
    if nncf:
        script = str(Path(race_candidates.__file__))
        yield f"NNCF, the same {images} images", [nncf, script, "nncf.xml", network, str(folder), "1"]


def timed(command: Sequence[str]) -> tuple[float, float]:
    """Run a command and return its elapsed and CPU time in seconds."""
    begun, before = time.perf_counter(), os.times()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    elapsed, after = time.perf_counter() - begun, os.times()
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return elapsed, used


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="names of variants, separated by commas")
    parser.add_argument("--images", type=int, default=48, help="images that quantize and NNCF read")
    parser.add_argument("--nncf", metavar="PYTHON", help="the Python of an environment that has NNCF")
    given = parser.parse_args(arguments)
    from swin_deploy.machine import this_machine

    print(f"{this_machine()}\n\n| command | network | elapsed, s | CPU, s |\n|---|---|--:|--:|")
    for network in given.networks.split(","):
        with tempfile.TemporaryDirectory(prefix="swin-times-") as scratch:
            for name, command in commands(network, Path(scratch), given.images, given.nncf):
                elapsed, used = timed(command)
                print(f"| {name} | {network} | {elapsed:.2f} | {used:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
