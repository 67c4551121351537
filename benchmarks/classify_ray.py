"""Classify digits with two actors of Ray Data, one of them killed half-way, and compare the rows with those of processes.

    python benchmarks/classify_ray.py [--images 20000] [--bundle BUNDLE] [--folder FOLDER]

Needs the extras ray, onnxruntime, bench and test. Without --bundle, the digits checkpoint is exported first.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import ray
from classify import NAMED, digits_bundle, digits_folder, digits_shards

import swin_deploy


class Killer:
    """Kills one of Ray's actors when half of the images are done."""

    def __init__(self) -> None:
        self.killed = 0

    def __call__(self, phase: str, done: int, total: int) -> None:
        if not self.killed and done >= total / 2:
            actors = [one for one in psutil.Process().children(recursive=True) if "MapWorker" in " ".join(one.cmdline())]
            self.killed = max(one.pid for one in actors)
            os.kill(self.killed, signal.SIGKILL)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    print(f"Ray {ray.__version__}, {given.images} digits, two actors\n")
    print("| source | killed | images | seconds | rows equal |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        folder = Path(place)
        bundle = given.bundle or digits_bundle(folder)
        images, shards = digits_folder(folder / "images", given.images), digits_shards(folder, given.images)
        tables = [folder / f"rows-{number}.parquet" for number in range(2)]
        for number, table in enumerate(tables):  # the digits again, as bytes in Parquet
            ray_table(shards, table, number)
        sources: dict[str, tuple[Any, dict[str, Any]]] = {
            "folder": (images, {}),
            "tar": (shards, {}),
            "Parquet": (str(folder / "rows-{0..1}.parquet"), {}),
        }
        for name, (source, options) in sources.items():
            wanted, found = folder / f"{name}-1.parquet", folder / f"{name}-2.parquet"
            swin_deploy.classify_dataset(bundle, source, output=wanted, workers=2, **NAMED, **options)
            killer, start = Killer(), time.perf_counter()
            done = swin_deploy.classify_dataset(
                bundle, source, output=found, workers=2, ray="local", progress=killer, **NAMED, **options
            )
            same = pq.read_table(wanted).equals(pq.read_table(found))
            print(
                f"| {name} | {bool(killer.killed)} | {done.images} | {time.perf_counter() - start:.0f} | {same} |", flush=True
            )
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
        dataset = ray.data.read_parquet([str(table) for table in tables])
        start = time.perf_counter()
        done = swin_deploy.classify_dataset(bundle, dataset, output=folder / "dataset.parquet", workers=2, **NAMED)
        same = pq.read_table(folder / "Parquet-1.parquet").equals(pq.read_table(folder / "dataset.parquet"))
        print(f"| Ray dataset | no | {done.images} | {time.perf_counter() - start:.0f} | {same} |")
        ray.shutdown()


def ray_table(shards: str, path: Path, number: int) -> None:
    """Write every second shard as a Parquet file with the columns of a Hugging Face data set."""
    import pyarrow as pa

    from swin_deploy.datasets.image_sources import source_from

    source = source_from(shards)
    items = [item for shard in source.shards[number::2] for item in source.read(shard, 0)]
    rows = {"image": [{"bytes": image, "path": key} for key, image in items], "label": [0] * len(items)}
    pq.write_table(pa.table(rows), path, row_group_size=1000)


if __name__ == "__main__":
    main()
