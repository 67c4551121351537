"""Time from one uint8 frame to logits on this CPU, with the preprocessing before and in the graph.

    python benchmarks/embed_preprocess.py [--frame 1080x1920] [--rounds 20] [--threads 0]

Runs Swin-T with random weights in ONNX Runtime. Each candidate has its own process; the candidates are called alternately.
Processor time is less sensitive to other load than wall-clock time. Needs the extras "export" and "onnxruntime".
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CANDIDATES = {  # options of the export
    "outside: Pillow, then float32": (),
    "--embed-preprocess: Pillow, then uint8": ("--embed-preprocess",),
    "--embed-resize: the frame itself": ("--embed-resize",),
}
# Replies to each line with the milliseconds of one call: wall clock, processors, and processors before the graph.
WORKER = """
import sys, time
import numpy as np
from PIL import Image
import swin_deploy
bundle, threads, height, width, photo = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
with Image.open(photo) as image:
    frame = np.asarray(image.convert("RGB").resize((width, height)))
with swin_deploy.load(bundle, threads=threads, precision="fp32") as model:
    for line in sys.stdin:
        start, spent = time.perf_counter(), time.process_time()
        pixels = frame[None] if model.inputs[0].image_size == frame.shape[:2] else model.preparation(frame)
        before = time.process_time() - spent
        model.run({"pixel_values": pixels})
        print(*(1e3 * t for t in (time.perf_counter() - start, time.process_time() - spent, before)), flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--frame", default="1080x1920")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="Folder for the bundles, which are reused. Default: temporary.")
    given = parser.parse_args()
    height, width = given.frame.split("x")
    photo = Path(__file__).resolve().parents[1] / "examples/photos/china.jpg"
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.folder or Path(scratch)).absolute()
        workers = {}
        for name, options in CANDIDATES.items():
            bundle = exported(folder, given.frame, options)
            command = [sys.executable, "-c", WORKER, str(bundle), str(given.threads), height, width, str(photo)]
            workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        times: dict[str, list[list[float]]] = {name: [] for name in workers}
        for turn in range(given.rounds + 3):
            for name, worker in workers.items():
                assert worker.stdin is not None
                assert worker.stdout is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
                taken = [float(part) for part in worker.stdout.readline().split()]
                if turn >= 3:
                    times[name].append(taken)
        for worker in workers.values():
            worker.communicate()
    print(f"| a frame of {given.frame} | best ms | median ms | processor ms, best and median | before the graph |")
    print("|---|---|---|---|---|")
    for name, taken in times.items():
        clock, spent, before = zip(*taken, strict=True)
        print(f"| {name} | {min(clock):.1f} | {statistics.median(clock):.1f} ", end="")
        print(f"| {min(spent):.1f}, {statistics.median(spent):.1f} | {statistics.median(before):.1f} |")
    return 0


def exported(folder: Path, frame: str, options: tuple[str, ...]) -> Path:
    """Export Swin-T with random weights and these options, unless the bundle exists."""
    target = folder / f"swin-tiny{''.join(options)}{frame if '--embed-resize' in options else ''}"
    if not target.exists():
        command = "import sys; from swin_deploy.cli import main; main()"
        arguments = ["export", "--variant", "swin-tiny", "--random-weights", "--target", "onnxruntime", "-o", str(target)]
        arguments += [*options, *([frame] if "--embed-resize" in options else [])]
        subprocess.run([sys.executable, "-c", command, *arguments], check=True, stdout=sys.stderr)
    return target


if __name__ == "__main__":
    sys.exit(main())
