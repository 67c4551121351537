"""The intact inputs that are changed: checkpoints, bundles, data and images. They are made once per run."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKPOINTS = Path(__file__).parents[2] / "tests/checkpoints/data"
REPORTED = Path(__file__).parents[2] / "tests/reported"


@dataclass(frozen=True)
class Seeds:
    """Folders of intact inputs. `bundles` are a small one, and one with a file of every kind."""

    checkpoint: Path
    bundles: tuple[Path, ...]
    data: Path

    @property
    def checkpoints(self) -> list[Path]:
        """Folders with checkpoints of every framework."""
        return sorted(path for path in (*CHECKPOINTS.iterdir(), *REPORTED.iterdir(), self.checkpoint) if path.is_dir())

    def files(self, *suffixes: str) -> list[Path]:
        """Weight files with one of these suffixes."""
        return [file for folder in self.checkpoints for file in sorted(folder.iterdir()) if file.suffix in suffixes]

    @property
    def pictures(self) -> list[Path]:
        return sorted((self.data / "pictures").iterdir())


def in_a_child(call: Callable[[], object]) -> None:
    """Run a function in a forked process, whose threads and sessions end with it."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            call()
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("fuzz: the intact inputs cannot be made")


def made_seeds(folder: Path, bundle: Path | None = None) -> Seeds:
    """Make all intact inputs in a folder, unless they are there. A `bundle` that is given replaces those that are exported."""
    bundles = (folder / "small", folder / "full") if bundle is None else (bundle,)
    seeds = Seeds(folder / "checkpoint", bundles, folder / "data")
    if not (folder / "done").exists():
        in_a_child(lambda: _make(seeds, bundle is None))
        (folder / "done").touch()
    return seeds


def _make(seeds: Seeds, export: bool) -> None:
    import swin_deploy
    from swin_deploy.bundle import Bundle
    from swin_deploy.exporters.typed_graphs import with_typed_graphs
    from swin_deploy.qat_ranges import RANGES, ActivationRange, LayerRanges, QatRanges
    from swin_deploy.runtimes.backends import runtime_from_onnx

    write_checkpoint(seeds.checkpoint)
    write_data(seeds.data)
    if not export:
        return
    small, full = seeds.bundles
    swin_deploy.export(weights=seeds.checkpoint, output=small, force=True)
    swin_deploy.export(weights=seeds.checkpoint, output=full, image_sizes=[32, "16x24"], force=True)
    bundle = with_typed_graphs(Bundle.open(full), "fp16", runtime_from_onnx)
    swin_deploy.quantize(full, seeds.data / "data.npz", precision="int8", max_drop=100)
    layer = LayerRanges(ActivationRange(0.01, 128, 1.3), None, (0.01,))
    ranges = QatRanges("a test", {"encoder.layers.0.blocks.0.intermediate.dense": layer})
    bundle = Bundle.open(full).with_file(RANGES, {}, ranges.to_json().encode())
    _add_engine(bundle)
    swin_deploy.tune(full)


def write_checkpoint(folder: Path) -> None:
    """Write a checkpoint of one block, in the format of transformers."""
    from safetensors.torch import save_file

    from swin_deploy.config import SwinConfig
    from swin_deploy.models.checkpoints import random_checkpoint
    from swin_deploy.preprocess import Preprocessor
    from swin_deploy.tasks import TaskSpec

    fields: dict[str, Any] = {"image_size": (32, 32), "embed_dim": 32, "depths": (1,), "num_heads": (2,), "window_size": (4,)}
    checkpoint = random_checkpoint(SwinConfig(version=1, **fields), TaskSpec())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(checkpoint.tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(checkpoint.config.to_dict()))
    (folder / "preprocessor_config.json").write_text(json.dumps(Preprocessor.imagenet((32, 32)).to_dict()))


def _add_engine(bundle: Any) -> None:
    """Add an engine without content, and its layers, as the compiler describes them."""
    graph = next(file for file, entry in bundle.graphs.items() if entry["precision"] == "fp16")
    entry = bundle.graphs[graph]
    roles = {role: {"kernels": 1, "bytes_read": 64, "bytes_written": 64} for role in ("attention", "product", "move", "other")}
    profile: dict[str, Any] = {"batch": [1, 1, 1], "source": "log", "unread": 0, "kernels": 4, "fused_attention": 1}
    profile |= {"bytes_moved": 512, "activation_bytes": 256, "constant_bytes": 256, "roles": roles, "types": {"Half": 4}}
    facts = {
        **{"precision": "fp16", "image_size": entry["image_size"], "graph": graph, "parent": entry["sha256"], "options": {}},
        **{"backend": "tensorrt-rtx", "backend_version": "1.3.0", "gpu": "sm_89", "fingerprint": "0" * 64},
        **{"profiles": [profile], "agreement": "not verified"},
    }
    file = "engines/fp16-sm_89-tensorrt-rtx-1.3.0.engine"
    bundle = bundle.with_file(file, facts, b"the content of an engine")
    tensor = {"name": "pixel_values", "dims": [1, 3, 32, 32], "datatype": "Half"}
    layer = {
        "name": "a",
        "kind": "kgen",
        "inputs": [tensor],
        "outputs": [tensor],
        "constants": [],
        "tactic": "b",
        "role": "move",
    }
    layers = {"profiles": [{**profile, "layers": [layer]}]}
    parent = {"parent": bundle.files[file]["sha256"]}
    bundle.with_file(file.replace(".engine", ".layers.json"), parent, json.dumps(layers).encode())


def write_data(folder: Path) -> None:
    """Write a folder of images, the same as NumPy files, tables of labels, and one picture in each format."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 24, 32, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        place = folder / "images" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{number}.png")
    labels = np.array([0, 1, 0, 1])
    np.savez(folder / "data.npz", images=pixels, labels=labels)
    np.savez(folder / "prepared.npz", pixel_values=rng.standard_normal((4, 3, 32, 32), dtype=np.float32), labels=labels)
    np.save(folder / "data.npy", pixels)
    (folder / "labels.csv").write_text("file,label\n" + "".join(f"class{n % 2}/{n}.png,{n % 2}\n" for n in range(4)))
    (folder / "labels.json").write_text(json.dumps({f"class{n % 2}/{n}.png": n % 2 for n in range(4)}))
    (folder / "names.txt").write_text("cat\ndog\n")
    (folder / "names.csv").write_text("id,name\n0,cat\n1,dog\n")
    (folder / "names.json").write_text('{"id2label": {"0": "cat", "1": "dog"}}')
    pictures = folder / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir()
    image, gray = Image.fromarray(pixels[0]), Image.fromarray(rng.integers(0, 60_000, (24, 32), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "jpg", "bmp", "gif", "tif", "webp", "ppm", "tga", "ico", "pcx", "jp2", "sgi", "dds"):
        buffer = io.BytesIO()
        try:
            image.save(buffer, Image.registered_extensions()[f".{suffix}"], **({"exif": exif} if suffix == "jpg" else {}))
        except (KeyError, OSError, ValueError):  # this Pillow has no such plug-in
            continue
        (pictures / f"rgb.{suffix}").write_bytes(buffer.getvalue())
    image.convert("P").save(pictures / "palette.png")
    image.convert("P").save(pictures / "palette.gif", save_all=True, append_images=[image.convert("P")])
    image.convert("CMYK").save(pictures / "cmyk.jpg")
    gray.save(pictures / "deep.png")
    gray.save(pictures / "deep.tif")
    image.save(pictures / "lzw.tif", compression="tiff_lzw")
    image.save(pictures / "pages.tif", save_all=True, append_images=[image, gray])
    np.save(pictures / "array.npy", pixels[0])
