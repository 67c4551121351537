"""Compare the ONNX exports of transformers, timm and torchvision with their checkpoints and with ours by `swin-deploy diff`.

    python benchmarks/foreign_exports.py [--only TEXT] [--published]

Each network is exported by both exporters of torch, for one image and for any batch. All pairs are equal, so that each
difference is a false alarm, and each block whose tensors are not aligned is one too. Networks are small and have random
weights; --published compares Swin-T and SwinV2-T instead. Libraries that are not installed are left out.
Needs the extras "export" and "onnxruntime", and timm and torchvision for their networks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from faults import config_of
from safetensors.torch import save_file

import swin_deploy
from swin_deploy.diagnosis.comparison import Difference, compared
from swin_deploy.diagnosis.sides import give_images, side_from
from swin_deploy.errors import SwinDeployError

IN_BLOCKS = {
    "attention.query", "attention.key", "attention.value", "attention.scale", "attention.softmax", "attention.output", "norm1",
    "residual1", "norm2", "mlp.fc1", "mlp.activation", "mlp.fc2", "residual2",
}  # fmt: skip
SMALL = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]}
Made = tuple[Any, int]  # a network and the size of its images; its checkpoint is in the folder that was given


def randomized(network: Any) -> Any:
    """Give a network random values in place of zeros and ones, so that each parameter has an effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for values in network.parameters():
            values += (0.1 if values.ndim == 1 else 0.02) * torch.randn(values.shape, generator=generator)
    return network.eval()


def of_transformers(folder: Path, version: int, published: bool, bare: bool) -> Made:
    import transformers

    kind = f"Swin{'v2' * (version == 2)}"
    config = config_of(("swin-tiny", "swinv2-tiny")[version - 1] if published else f"small-v{version}")
    raw = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    found = getattr(transformers, f"{kind}Config")(**raw)
    network = randomized(getattr(transformers, f"{kind}Model" if bare else f"{kind}ForImageClassification")(found))
    network.save_pretrained(folder)
    return network, config.image_size[0]


def of_timm(folder: Path, version: int, published: bool, _: bool) -> Made:
    import timm

    name = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256")[version - 1]
    arguments = {} if published else {**SMALL, "img_size": 64, "window_size": 4}
    network = randomized(timm.create_model(name, num_classes=10, **arguments))
    raw = {"architecture": name, "num_classes": 10, "model_args": arguments, "pretrained_cfg": network.pretrained_cfg}
    (folder / "config.json").write_text(json.dumps(raw, default=str))
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, folder / "model.safetensors")
    return network, network.patch_embed.img_size[0]


def of_torchvision(folder: Path, version: int, published: bool, _: bool) -> Made:
    from torchvision.models import swin_t, swin_transformer, swin_v2_t

    if published:
        network = (swin_t, swin_v2_t)[version - 1]()
    else:
        block, merge = (
            (swin_transformer.SwinTransformerBlock, swin_transformer.PatchMerging),
            (swin_transformer.SwinTransformerBlockV2, swin_transformer.PatchMergingV2),
        )[version - 1]
        network = swin_transformer.SwinTransformer(
            [4, 4], **SMALL, window_size=[6 + version] * 2, num_classes=10, block=block, downsample_layer=merge
        )
    torch.save(randomized(network).state_dict(), folder / "model.pth")
    return network, 224 if version == 1 else 256


LIBRARIES: dict[str, Callable[[Path, int, bool, bool], Made]] = {
    "transformers": of_transformers, "timm": of_timm, "torchvision": of_torchvision,
}  # fmt: skip


def exported(network: Any, size: int, path: Path, dynamo: bool, batch: bool) -> Path:
    """Export `network` as users of its library do."""
    if hasattr(network, "set_attn_implementation"):  # torch cannot decompose the fused attention of transformers
        network.set_attn_implementation("eager" if dynamo else "sdpa")
    pixels = torch.randn(2 if batch else 1, 3, size, size)
    options: dict[str, Any] = {"dynamo": dynamo, "input_names": ["pixel_values"]}
    if batch and dynamo:
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch", min=1, max=64)},)
    elif batch:
        options["dynamic_axes"] = {"pixel_values": {0: "batch"}}
    else:
        options |= {} if dynamo else {"opset_version": 17}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (pixels,), str(path), **options)
    return path


def lacking(found: Difference, blocks: Sequence[tuple[int, int]]) -> list[str]:
    """Return the points of blocks at which the networks were not compared."""
    seen = {(one.point.stage, one.point.block, one.point.part) for one in found.points}
    return [
        f"{stage}.{block}.{part}" for stage, block in blocks for part in sorted(IN_BLOCKS) if (stage, block, part) not in seen
    ]


def compare(kind: str, against: Path, path: Path) -> bool:
    """Compare an export, print the result, and return whether it is a false alarm."""
    start = time.perf_counter()
    try:
        sides = side_from(against), side_from(path)
        give_images(sides, None, None)
        found = compared(*sides)
    except SwinDeployError as error:
        print(f"{kind}, against {against.name}: {error}", flush=True)
        return True
    absent = lacking(found, list(sides[0].structure.attentions))
    named = "equal" if found.first is None else f"{found.first.point.title()}: {found.first.cause}"
    named += f", not aligned: {', '.join(absent)}" * bool(absent)
    print(
        f"{kind}, against {against.name}: {named} ({len(found.points)} points, {time.perf_counter() - start:.1f} s)", flush=True
    )
    return bool(absent) or not found.equal


def exports_of(name: str, network: Any, size: int, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the exports of a network, by what they are."""
    for dynamo in (True, False):
        for batch in (False, True):
            kind = f"{name}, dynamo={dynamo}, {'any batch' if batch else 'one image'}"
            try:
                yield kind, exported(network, size, folder / "theirs.onnx", dynamo, batch)
            except torch.onnx.errors.OnnxExporterError as error:
                print(f"{kind}: torch.onnx.export raises {type(error).__name__}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="text in the names of the networks to compare")
    parser.add_argument("--published", action="store_true", help="compare Swin-T and SwinV2-T")
    given = parser.parse_args(arguments)
    results: list[bool] = []
    for library, version, bare in itertools.product(LIBRARIES, (1, 2), (False, True)):
        name = f"{library} V{version}{' without a head' * bare}"
        if given.only not in name or (bare and library != "transformers"):
            continue
        with tempfile.TemporaryDirectory(prefix="swin-exports-") as scratch:
            folder, theirs = Path(scratch), Path(scratch) / "checkpoint"
            theirs.mkdir()
            try:
                network, size = LIBRARIES[library](theirs, version, given.published, bare)
            except ImportError as error:
                print(f"{name}: {error}")
                continue
            task = "feature-extraction" if bare else "image-classification"
            swin_deploy.export(weights=theirs, output=folder / "ours", target="openvino", task=task)
            for kind, path in exports_of(name, network, size, folder):
                results += [compare(kind, against, path) for against in (theirs, folder / "ours")]
    print(f"{len(results)} pairs of right networks, {sum(results)} false alarms")
    return int(any(results))


if __name__ == "__main__":
    sys.exit(main())
