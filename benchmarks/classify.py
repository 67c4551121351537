"""Measure the throughput of `swin-deploy classify`, beside one thread alone, transformers' pipeline and Ray Data by hand.

    python benchmarks/classify.py [--digits 20000] [--photos 1000] [--workers 2] [--bundle digits=FOLDER] [--folder FOLDER]
    python benchmarks/classify.py --memory 1000000

The photographs are crops of those in examples/photos, saved as JPEG. "one thread" decodes, prepares and runs batches in this
process with one thread of the same back end; the target is its rate times the workers. "that, in every core" is the same loop
as often at a time: what the machine gives. The candidates take turns for --rounds rounds, each alone in a process of its own;
the table has medians, and the share of the target is the median of the rounds. "start" is the time until the first result. The
processor time is that of all processes, start included, and depends less on other load; Ray's processes are not in it.

--memory classifies that many digits and prints the resident memory of the command and of its processes.

Needs the extras onnxruntime, parquet, bench and test; the row of Ray needs the extra ray.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import swin_deploy
from swin_deploy.dependencies import installed, installed_versions
from swin_deploy.machine import processor_name, usable_cores

ROOT = Path(__file__).resolve().parents[1]
NAMED: dict[str, Any] = {"backend": "onnxruntime", "precision": "fp32", "device": "cpu"}
BATCH = 8


def digits_bundle(folder: Path) -> Path:
    """Export the digits checkpoint."""
    swin_deploy.export(weights=ROOT / "examples/digits/swin-digits", output=folder / "digits")
    return folder / "digits"


def photos_bundle(folder: Path) -> Path:
    """Export a Swin-T with random weights."""
    swin_deploy.export("swin-tiny", random_weights=True, output=folder / "swin-tiny")
    return folder / "swin-tiny"


def digits() -> list[bytes]:
    """Return the digits of scikit-learn as PNG files."""
    names: dict[str, Any] = {}
    exec((ROOT / "examples/digits/digits.py").read_text(), names)
    split = names["split"]()
    return [_saved(Image.fromarray(one), "PNG") for one in np.concatenate([split.train_images, split.test_images])]


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def digits_folder(folder: Path, count: int) -> Path:
    """Write so many digits into folders of 1,000."""
    files = digits()
    for first in range(0, count, 1000):
        (place := folder / f"{first // 1000:05d}").mkdir(parents=True)
        for number in range(first, min(first + 1000, count)):
            (place / f"{number:07d}.png").write_bytes(files[number % len(files)])
    return folder


def digits_shards(folder: Path, count: int, shards: int = 4) -> str:
    """Write so many digits into tar shards, and return their pattern."""
    files = digits()
    for shard in range(shards):
        with tarfile.open(folder / f"digits-{shard}.tar", "w") as archive:
            for number in range(shard * count // shards, (shard + 1) * count // shards):
                content = files[number % len(files)]
                info = tarfile.TarInfo(f"{number:07d}.png")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return str(folder / f"digits-{{0..{shards - 1}}}.tar")


def photos_folder(folder: Path, count: int) -> Path:
    """Write so many crops of the photographs, as JPEG."""
    folder.mkdir()
    photos = [Image.open(ROOT / f"examples/photos/{name}.jpg").convert("RGB") for name in ("china", "flower")]
    random = np.random.default_rng(0)
    for number in range(count):
        photo = photos[number % 2]
        left, top = random.integers(0, photo.width // 4), random.integers(0, photo.height // 4)
        crop = photo.crop((left, top, left + photo.width * 3 // 4, top + photo.height * 3 // 4))
        (folder / f"{number:06d}.jpg").write_bytes(_saved(crop, "JPEG", quality=int(random.integers(70, 96))))
    return folder


def listed(folder: Path) -> list[str]:
    """Return the paths of all images, sorted."""
    return sorted(str(path) for path in folder.rglob("*.*g"))


# Each runs in a process of its own, and returns the seconds until its first result and those in all.


def one_thread(bundle: Path, images: Path, workers: int) -> Iterator[int]:
    """Decode, prepare and run batches with one thread."""
    with swin_deploy.load(bundle, threads=1, **NAMED) as model:
        paths = listed(images)
        for first in range(0, len(paths), BATCH):
            batch = paths[first : first + BATCH]
            model.run({"pixel_values": model.preparation(batch)})
            yield len(batch)


def classify(bundle: Path, images: Path, workers: int) -> Iterator[int]:
    """Run `classify_dataset`; the results come with its progress."""
    steps: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        swin_deploy.classify_dataset(
            bundle,
            images,
            output=Path(folder) / "out.parquet",
            workers=workers,
            batch=BATCH,
            progress=lambda phase, done, total: steps.append((time.perf_counter(), done)),
            **NAMED,
        )
    MARKS["first"] = steps[0][0]
    MARKS["first images"] = steps[0][1]
    yield steps[-1][1]


def pipeline(bundle: Path, images: Path, workers: int) -> Iterator[int]:
    """Loop over the pipeline of transformers with all cores, for the same network."""
    import torch
    from transformers import AutoModelForImageClassification, SwinConfig, ViTImageProcessor, pipeline

    torch.set_num_threads(workers)
    processor = ViTImageProcessor(**json.loads((bundle / "preprocessor_config.json").read_text()))
    if json.loads((bundle / "config.json").read_text())["image_size"] == 32:
        model = AutoModelForImageClassification.from_pretrained(ROOT / "examples/digits/swin-digits")
    else:
        model = AutoModelForImageClassification.from_config(SwinConfig(num_labels=1000))
    made = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    paths = listed(images)
    for first in range(0, len(paths), BATCH):
        yield len(made(paths[first : first + BATCH], batch_size=BATCH))


def ray_by_hand(bundle: Path, images: Path, workers: int) -> Iterator[int]:
    """Run onnxruntime in actors of Ray Data, as its documentation does."""
    import ray

    class Actor:
        def __init__(self) -> None:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self.preparation = swin_deploy.bundle.Bundle.open(bundle).preprocessor
            self.session = onnxruntime.InferenceSession(bundle / "onnx/model.onnx", options)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            pixels = self.preparation([str(path) for path in batch["item"]])
            return {"best": self.session.run(None, {"pixel_values": pixels})[0].argmax(axis=1)}

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    paths = ray.data.from_items(listed(images))
    for batch in paths.map_batches(Actor, batch_size=BATCH, concurrency=workers).iter_batches(batch_size=None):
        yield len(batch["best"])


MARKS: dict[str, float] = {}
ONE, TOGETHER = "one thread: decode, prepare, `model.run`", "that, in every core"
CANDIDATES: dict[str, Callable[[Path, Path, int], Iterator[int]]] = {
    ONE: one_thread,
    TOGETHER: one_thread,
    "`swin-deploy classify`": classify,
    "transformers' pipeline": pipeline,
    "Ray Data and onnxruntime by hand": ray_by_hand,
}


def measured(name: str, bundle: Path, images: Path, workers: int) -> dict[str, float]:
    """Run a candidate and return the seconds until its first result, and the rate from there on and in all."""
    start, first, head, count = time.perf_counter(), 0.0, 0, 0
    for done in CANDIDATES[name](bundle, images, workers):
        count += done
        if not first:
            first, head = time.perf_counter(), done
    end = time.perf_counter()
    first, head = MARKS.get("first", first), int(MARKS.get("first images", head))
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    processor = sum(one.ru_utime + one.ru_stime for one in used)
    return {
        "start": first - start,
        "steady": (count - head) / (end - first),
        "whole": count / (end - start),
        "processor": 1e3 * processor / count,
    }


def alone(name: str, bundle: Path, images: Path, workers: int) -> dict[str, float]:
    """Measure a candidate in a new process; the loop of one thread can run as often at a time as there are workers."""
    times = workers if name == TOGETHER else 1
    name = ONE if name == TOGETHER else name
    command = [sys.executable, __file__, "--run", name, str(bundle), str(images), "--workers", str(workers)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(times)]
    found = [json.loads(one.communicate()[0].splitlines()[-1]) for one in running]
    summed = ("steady", "whole")
    return {key: sum(one[key] for one in found) / (1 if key in summed else times) for key in found[0]}


def memory(bundle: Path, images: Path, workers: int) -> None:
    """Print the largest resident memory of the processes in each tenth of the run, looked at every second."""
    import psutil

    this, rows, looked = psutil.Process(), [[0.0, 0.0] for _ in range(10)], 0.0

    def look(phase: str, done: int, total: int) -> None:
        nonlocal looked
        if (now := time.monotonic()) - looked >= 1:
            looked = now
            row = rows[min(9, 10 * done // total)]
            row[0] = max(row[0], this.memory_info().rss)
            row[1] = max(row[1], *(one.memory_info().rss for one in this.children(recursive=True)))

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.parquet"
        swin_deploy.classify_dataset(bundle, images, output=out, workers=workers, batch=BATCH, progress=look, **NAMED)
    print("| tenth | command MiB | largest process MiB |\n|---|---|---|")
    for number, (command, process) in enumerate(rows, 1):
        print(f"| {number} | {command / 2**20:.1f} | {process / 2**20:.1f} |")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=int, default=20_000)
    parser.add_argument("--photos", type=int, default=1_000)
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bundle", action="append", default=[], help="digits=FOLDER or photos=FOLDER. Default: export them.")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--memory", type=int, metavar="DIGITS")
    parser.add_argument("--only", default="", help="Part of the name of a candidate.")
    parser.add_argument("--run", nargs=3, metavar=("NAME", "BUNDLE", "IMAGES"), help="Used by this script.")
    given = parser.parse_args()
    if given.run:
        name, bundle, images = given.run
        print(json.dumps(measured(name, Path(bundle), Path(images), given.workers)))
        return
    bundles = {name: Path(path) for name, _, path in (one.partition("=") for one in given.bundle)}
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        folder = Path(scratch)
        if given.memory:
            images = digits_folder(folder / "images", given.memory)
            memory(bundles.get("digits") or digits_bundle(folder), images, given.workers)
            return
        versions = installed_versions(("onnxruntime", "transformers", "torch", "ray", "pyarrow", "pillow"))
        print(processor_name(), f"{usable_cores()} cores,", ", ".join(f"{name} {one}" for name, one in versions.items()))
        sets = {
            f"{given.digits} digits": (bundles.get("digits"), digits_bundle, digits_folder, given.digits),
            f"{given.photos} photographs, Swin-T": (bundles.get("photos"), photos_bundle, photos_folder, given.photos),
        }
        head = ("images", "candidate", "images/s", "of the target", "start s", "images/s with start", "processor ms/image")
        print(f"\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
        for title, (bundle, export, write, count) in sets.items():
            if not count:
                continue
            images = write(folder / title.replace(" ", "-"), count)
            bundle = bundle or export(folder)
            names = [name for name in CANDIDATES if given.only in name and (installed("ray") or not name.startswith("Ray"))]
            names = list(dict.fromkeys([ONE, *names]))
            rounds = [{name: alone(name, bundle, images, given.workers) for name in names} for _ in range(given.rounds)]
            for name in names:
                found = {key: statistics.median(one[name][key] for one in rounds) for key in rounds[0][name]}
                share = statistics.median(one[name]["steady"] / given.workers / one[ONE]["steady"] for one in rounds)
                print(
                    f"| {title} | {name} | {found['steady']:.1f} | {share:.2f} | {found['start']:.1f} "
                    f"| {found['whole']:.1f} | {found['processor']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
