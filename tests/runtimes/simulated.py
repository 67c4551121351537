"""A machine with a simulated GPU and TensorRT (fake_driver.py, fake_tensorrt.py), and bundles with engines for them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.exported import exported, one_block
from fake_driver import FakeDriver
from fake_tensorrt import module, plan, session

import swin_deploy
import swin_deploy.gpus
import swin_deploy.runtimes.gpu.driver
from swin_deploy.bundle import Bundle
from swin_deploy.specs import Batch

RELEASES = {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"}
PROFILES: tuple[Batch, ...] = ((1, 1, 1), (1, 4, 8))
SIZES = ((32, 32), (16, 24))
IMAGES = np.random.default_rng(0).standard_normal((24, 3, 32, 32)).astype(np.float32)


@contextmanager
def simulated(patch: pytest.MonkeyPatch, *gpus: str) -> Iterator[FakeDriver]:
    """The machine, while inside; at the end nothing undefined was done there, and nothing is left. `driver.trt` are the
    modules by back end."""
    driver: Any = FakeDriver(*gpus)
    for place in (swin_deploy.gpus, swin_deploy.runtimes.gpu.driver):
        patch.setattr(place, "cuda_driver", lambda: driver)
    driver.trt = {}
    for backend, release in RELEASES.items():
        name = backend.replace("-", "_")
        driver.trt[backend] = module(name, release, driver)
        patch.setitem(sys.modules, name, driver.trt[backend])
    yield driver
    assert driver.violations == [], driver.violations
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


def two_sizes(target: Path) -> Path:
    """One block at two image sizes."""
    options = [part for height, width in SIZES for part in ("--image-size", f"{height}x{width}")]
    [path] = [path for path in exported("--weights", str(one_block()), *options).iterdir() if path.is_dir()]
    shutil.copytree(path, target)
    return target


def alone(path: Path, images: np.ndarray, graph: str = "onnx/model.onnx") -> np.ndarray:
    """What ONNX Runtime itself makes of a batch of exactly these images."""
    [answer] = session(str((path / graph).absolute())).run(["logits"], {"pixel_values": images})
    return np.asarray(answer)


def feed(images: np.ndarray) -> dict[str, Any]:
    return {"pixel_values": images}


def loaded(path: Path, backend: str, **options: Any) -> Any:
    return swin_deploy.load(path, **{"backend": backend, "precision": "fp32", **options})
