"""Peak memory of a calibration pass by number of images, and bit-identical ranges after a killed pass resumes.

    python benchmarks/calibration_memory.py                          # the digits (Swin V2): 100 and 10,000 images
    python benchmarks/calibration_memory.py --bundle my-swin --images 32 --images 128 --side 300

Writes PNG files of shifted, noisy digits, exports the digits checkpoint unless a bundle is given, and observes the inputs of
every linear layer and attention matmul of its fp32 graph. Each number of images runs in its own process, whose peak resident
memory is read from /proc (Linux). The largest number runs again, is killed (SIGKILL) half-way, and resumes. Prints a markdown
table. Fails if the largest number needs 1.2 times the memory of the smallest, or if ranges differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/digits"
LIMIT = 1.2


def write_images(folder: Path, count: int, side: int) -> None:
    """Write `count` PNG files, side x side: digits of scikit-learn, shifted and with noise, in ten class folders."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    rng = np.random.default_rng(0)
    for number in range(count):
        index = number % len(data.images)
        picture = Image.fromarray(np.rint(data.images[index] * 15.9).astype(np.uint8)).resize((side, side))
        shifted = np.roll(np.asarray(picture), rng.integers(-side // 8, side // 8 + 1, 2), axis=(0, 1)).astype(int)
        noisy = np.clip(shifted + rng.integers(-20, 21, shifted.shape), 0, 255).astype(np.uint8)
        place = folder / str(data.target[index])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(place / f"{number:06d}.png")


def observed(bundle: Path, data: Path, samples: int, cache: Path, batch: int, slow: bool) -> dict[str, object]:
    """Run one pass in this process and return its cost and a sha256 of all observations."""
    import onnx

    from swin_deploy.bundle import Bundle
    from swin_deploy.calib.collect import collect
    from swin_deploy.calib.data import samples_for
    from swin_deploy.calib.observers import to_arrays

    opened = Bundle.open(bundle)
    path = opened.path / "onnx/model.onnx"
    graph = onnx.load(str(path), load_external_data=False).graph
    constant = {tensor.name for tensor in graph.initializer}
    tensors = [
        name for node in graph.node if node.op_type in ("Gemm", "MatMul") for name in node.input[:2] if name not in constant
    ]
    begin = time.process_time()

    def report(phase: str, done: int, total: int) -> None:
        print(done, flush=True)
        if slow and done >= total // 2:
            sys.stdin.read()  # wait for the kill

    found = collect(
        path,
        tensors,
        samples_for(opened, data, samples),
        batch=batch,
        cache=cache,
        progress=report,
        threads=1,
        every=0.2 if slow else 10,
    )
    digest = hashlib.sha256(b"".join(array.tobytes() for array in to_arrays(found).values())).hexdigest()
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    peak = float(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) / 1e3
    return {"tensors": len(found), "peak_mb": peak, "cpu_s": time.process_time() - begin, "sha256": digest}


def in_own_process(request: dict[str, object], kill: bool = False) -> dict[str, object]:
    """Run `observed` in another process and return its result; with `kill`, the number of batches before the kill."""
    command = [sys.executable, str(Path(__file__).resolve()), "--request", json.dumps({**request, "slow": kill})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for batches, line in enumerate(process.stdout):
        if line.startswith("{"):
            process.communicate()
            return {**json.loads(line), "batches": batches}
        if kill and int(line) >= int(str(request["samples"])) // 2:
            process.kill()
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            return {"batches": batches + 1}
    process.communicate()
    sys.exit(f"The measuring process failed with exit code {process.returncode}.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="an exported bundle. Default: the digits Swin V2 is exported")
    parser.add_argument("--images", type=int, action="append", help="number of images; repeatable. Default: 100 and 10000")
    parser.add_argument("--side", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--request", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.request:
        request = json.loads(options.request)
        places = {name: Path(request.pop(name)) for name in ("bundle", "data", "cache")}
        print(json.dumps(observed(**places, **request)), flush=True)
        return 0

    counts = sorted(options.images or [100, 10_000])
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        bundle = options.bundle
        if bundle is None:
            import swin_deploy

            bundle = swin_deploy.export(weights=EXAMPLE / "swinv2-digits", output=work / "bundle").path
        write_images(work / "images", counts[-1], options.side)
        base = {"bundle": str(bundle.resolve()), "data": str(work / "images"), "batch": options.batch}
        rows = []
        for count in counts:
            rows.append(in_own_process({**base, "samples": count, "cache": str(work / f"cache-{count}")}))
        last = {**base, "samples": counts[-1], "cache": str(work / "killed")}
        killed = in_own_process(last, kill=True)
        resumed = in_own_process(last)

    print(f"{rows[0]['tensors']} tensors observed, batch {options.batch}, one thread\n")
    print("| images | peak MB | to the smallest | processor s |\n|--:|--:|--:|--:|")
    for count, row in zip(counts, rows, strict=True):
        ratio = float(str(row["peak_mb"])) / float(str(rows[0]["peak_mb"]))
        print(f"| {count} | {row['peak_mb']:.0f} | {ratio:.3f} | {row['cpu_s']:.1f} |")
    same = resumed["sha256"] == rows[-1]["sha256"]
    print(
        f"\nKilled after {killed['batches']} of {rows[-1]['batches']} batches, resumed for {resumed['batches']} more: "
        f"{'bit-identical ranges' if same else 'DIFFERENT RANGES'}"
    )
    return 0 if same and ratio < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
