"""A machine with a simulated GPU and TensorRT (fake_driver.py, fake_tensorrt.py), and bundles with engines for them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_driver import FakeDriver
from fake_tensorrt import module, plan

import swin_deploy.cuda
import swin_deploy.runtimes.cuda
from swin_deploy.bundle import Bundle
from swin_deploy.specs import Batch

RELEASES = {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"}
PROFILES: tuple[Batch, ...] = ((1, 1, 1), (1, 4, 8))


@contextmanager
def simulated(patch: pytest.MonkeyPatch, *gpus: str) -> Iterator[FakeDriver]:
    """The machine, while inside; at the end nothing undefined was done there, and nothing is left. `driver.trt` are the
    modules by back end."""
    driver: Any = FakeDriver(*gpus)
    for place in (swin_deploy.cuda, swin_deploy.runtimes.cuda):
        patch.setattr(place, "cuda_driver", lambda: driver)
    driver.trt = {}
    for backend, release in RELEASES.items():
        name = backend.replace("-", "_")
        driver.trt[backend] = module(name, release, driver)
        patch.setitem(sys.modules, name, driver.trt[backend])
    yield driver
    assert driver.violations == []
    assert driver.left == []
    assert [thing for trt in driver.trt.values() for thing in trt.world.alive] == []


def with_engines(
    path: Path, backend: str, precision: str = "fp32", profiles: tuple[Batch, ...] = PROFILES, **changes: Any
) -> list[str]:
    """Adds an engine for every graph of that precision to the bundle, as build-engine enters it; the files' names."""
    bundle, files = Bundle.open(path), []
    for graph, entry in bundle.graphs.items():
        if entry["precision"] != precision:
            continue
        facts = {
            "precision": precision,
            "image_size": entry["image_size"],
            "graph": graph,
            "parent": entry["sha256"],
            "backend": backend,
            "backend_version": RELEASES[backend],
            "gpu": "sm_89",
            "options": {},
            "profiles": [{"batch": list(batch)} for batch in profiles],
            "agreement": "not verified",
            **changes,
        }
        size = "x".join(map(str, entry["image_size"]))
        words = "-".join("_".join(map(str, batch)) for batch in profiles)
        file = f"engines/{precision}-{size}-{words}-{facts['gpu']}-{backend}-{facts['backend_version']}.engine"
        content = plan((path / graph).absolute(), list(profiles), "version_compatible" in facts["options"])
        bundle = bundle.with_file(file, facts, lambda place, content=content: place.write_bytes(content))  # type: ignore[misc]
        files.append(file)
    return files
