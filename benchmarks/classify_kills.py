"""Kill `swin-deploy classify` at random moments, resume it, and compare the result with that of one undisturbed process.

    python benchmarks/classify_kills.py [--kills 50] [--images 3000] [--bundle BUNDLE] [--folder FOLDER]

Every 100th image is damaged. In each run, SIGKILL ends the command or, as often, one of its processes, at a random moment of
the time that a run takes; a run that was killed is resumed until it ends. The result must have each image exactly once, in
order, with the same bits, and nothing may be left beside it. The number of processes, the source and the format vary.

Needs the extras onnxruntime, bench and test. Without --bundle, the digits checkpoint is exported first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from classify import NAMED, digits_bundle, digits_folder, digits_shards

FLAGS = [part for name, value in NAMED.items() for part in (f"--{name}", value)]
QUICK = "import swin_deploy.api.classify as c; c.PART_SECONDS = 0.2; from swin_deploy.cli import main; main()"
FORMATS = (".parquet", ".jsonl", ".csv")


def command(bundle: Path, source: Path | str, output: Path, workers: int) -> list[str]:
    """Return a command that writes parts every 0.2 s, instead of 10, so that a short run has many."""
    return [
        *(sys.executable, "-c", QUICK, "classify", str(bundle), str(source), "-o", str(output)),
        *("--workers", str(workers), "--json", *FLAGS),
    ]


def killed(arguments: list[str], after: float, worker: bool) -> tuple[int, bool]:
    """Run a command, and kill it or one of its processes after some seconds; return its exit code, and whether it did."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline, hit = time.monotonic() + after, False
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    if process.poll() is None:
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            workers = [one.pid for one in psutil.Process(process.pid).children() if "spawn_main" in " ".join(one.cmdline())]
            os.kill(random.choice(workers or [process.pid]) if worker else process.pid, signal.SIGKILL)
            hit = True
    _, errors = process.communicate()
    if process.returncode not in (0, 1, -signal.SIGKILL) or "Traceback" in errors:  # damaged images are reported with 1
        print(errors, file=sys.stderr)
    return process.returncode, hit


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random.seed(given.seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        folder = Path(scratch)
        bundle = given.bundle or digits_bundle(folder)
        images = digits_folder(folder / "images", given.images)
        for number, path in enumerate(sorted(images.rglob("*.png"))):
            if number % 100 == 50:
                path.write_bytes(path.read_bytes()[: random.randint(0, 80)])
        sources: dict[str, Any] = {"folder": images, "tar": digits_shards(folder, given.images)}
        wanted, seconds = dict[tuple[str, str], bytes](), 0.0
        for name, source in sources.items():
            for ending in FORMATS:
                output, start = folder / f"undisturbed-{name}{ending}", time.monotonic()
                done = subprocess.run(command(bundle, source, output, 1), capture_output=True, text=True)
                seconds = time.monotonic() - start
                told = json.loads(done.stdout)
                assert told["images"] == given.images, told
                counts["rows with a reason, of the folder"] = max(told["failed"], counts["rows with a reason, of the folder"])
                wanted[name, ending] = output.read_bytes()
        places = folder / "runs"
        places.mkdir()
        while counts["kills of the command"] + counts["kills of a process"] < given.kills:
            name, ending, workers = random.choice([*sources]), random.choice(FORMATS), random.choice((1, 2, 3))
            output, code = places / f"out{ending}", -signal.SIGKILL
            while code == -signal.SIGKILL:  # a run that was killed is resumed, and sometimes killed again
                worker, kill = random.random() < 0.5, random.random() < 0.8
                code, hit = killed(
                    command(bundle, sources[name], output, workers), random.uniform(0, seconds) if kill else 1e9, worker
                )
                counts["kills of a process" if worker and code != -signal.SIGKILL else "kills of the command"] += hit
                counts["resumed"] += code == -signal.SIGKILL
            counts["killed after the last step"] += code == 2 and output.exists()
            equal = same(output, folder, name) if ending == ".parquet" else output.read_bytes() == wanted[name, ending]
            counts["results that differ"] += not equal
            output.unlink()
            counts["files left behind"] += len([*places.iterdir()])
    print("| | |\n|---|---|")
    for what, count in counts.items():
        print(f"| {what} | {count} |")


def same(output: Path, folder: Path, name: str) -> bool:
    """Compare Parquet files by their rows: the number of row groups depends on the parts."""
    import pyarrow.parquet as pq

    return bool(pq.read_table(output).equals(pq.read_table(folder / f"undisturbed-{name}.parquet")))


if __name__ == "__main__":
    main()
