"""Bundles with engines for the simulated TensorRT of fake_gpu.py, and what ONNX Runtime itself answers for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from cli.exported import exported_bundle, one_block
from fake_gpu import RELEASES, cpu_session

import swin_deploy
from swin_deploy.bundle import Bundle
from swin_deploy.options import Batch

PROFILES: tuple[Batch, ...] = ((1, 1, 1), (1, 4, 8))
SIZES = ((32, 32), (16, 24))
IMAGES = np.random.default_rng(0).standard_normal((24, 3, 32, 32)).astype(np.float32)


def with_engines(
    path: Path, backend: str, precision: str = "fp32", profiles: tuple[Batch, ...] = PROFILES, plan: str = "", **changes: Any
) -> list[str]:
    """Add an engine for every graph of that precision to the bundle, as build-engine does; return their files."""
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
        batches = "-".join("_".join(map(str, batch)) for batch in profiles)
        file = f"engines/{precision}-{size}-{batches}-{facts['gpu']}-{backend}-{facts['backend_version']}.engine"
        host_code = "version_compatible" in facts["options"]
        content = json.dumps({"graph": str((path / graph).absolute()), "profiles": profiles, "host_code": host_code})
        bundle = bundle.with_file(file, facts, lambda place, content=plan or content: place.write_text(content))  # type: ignore[misc]
        files.append(file)
    return files


def bundle_of(target: Path, *options: str) -> Path:
    """A copy of the bundle that `export` makes of one block with these options."""
    weights = () if "--weights" in options else ("--weights", str(one_block()))
    shutil.copytree(exported_bundle(*weights, *options), target)
    return target


def two_sizes(target: Path) -> Path:
    return bundle_of(target, *[part for height, width in SIZES for part in ("--image-size", f"{height}x{width}")])


def alone(path: Path, images: np.ndarray, graph: str = "onnx/model.onnx") -> bytes:
    """The logits that ONNX Runtime itself gives for a batch of exactly these images."""
    [answer] = cpu_session(str((path / graph).absolute())).run(["logits"], {"pixel_values": images})
    return np.asarray(answer).tobytes()


def feed(images: Any) -> dict[str, Any]:
    return {"pixel_values": images}


def loaded(path: Path, backend: str, **options: Any) -> Any:
    return swin_deploy.load(path, **{"backend": backend, "precision": "fp32", **options})
