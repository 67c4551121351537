"""Export a Swin V2 with billions of parameters and compare it with transformers, one block in memory at a time.

    python benchmarks/giant.py --folder /somewhere/large            # SwinV2-G: 3.0 billion, 12 GB of weights, 40 GB of disk
    python benchmarks/giant.py --folder /somewhere/large --depth 10 # the same widths with 10 blocks in the third stage

Prints the time and peak memory of the export, in its own process, as a multiple of the weights, and the agreement of the ONNX
graph with the blocks of transformers, which are loaded and run one after another.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Swinv2Config
from transformers.models.swinv2 import modeling_swinv2 as hf

SHARD = 2_000_000_000  # bytes
WIDTH, HEADS, WINDOW, IMAGE, LABELS = 512, (16, 32, 64, 128), 12, 192, 1000


def write_checkpoint(folder: Path, depth: int) -> int:
    """Write a random, sharded checkpoint to `folder` and return its number of parameters."""
    from swin_deploy.config import SwinConfig
    from swin_deploy.models.parameters import parameters, random_parameter

    config = SwinConfig(
        version=2,
        image_size=(IMAGE, IMAGE),
        embed_dim=WIDTH,
        depths=(2, 2, depth, 4),
        num_heads=HEADS,
        window_size=(WINDOW,) * 4,
        id2label={i: f"LABEL_{i}" for i in range(LABELS)},
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    shapes, shard, size, index = parameters(config), {}, 0, {}
    count = 0
    for number, (name, shape) in enumerate(shapes.items()):
        full = name if name.startswith("classifier") else f"swinv2.{name}"
        shard[full] = torch.from_numpy(random_parameter(name, shape, 0))
        size += shard[full].numel() * 4
        if size > SHARD or number == len(shapes) - 1:
            count += 1
            file = f"model-{count:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(shard, file))
            shard, size = {}, 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(math.prod(shape) for shape in shapes.values())


def reference(folder: Path, pixels: torch.Tensor) -> np.ndarray:
    """Return the logits of transformers, with one module in memory at a time."""
    config = Swinv2Config.from_pretrained(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    def filled(module: torch.nn.Module, prefix: str) -> torch.nn.Module:
        state = {}
        for name in module.state_dict():
            with safe_open(folder / index[f"{prefix}{name}"], framework="pt") as file:
                state[name] = file.get_tensor(f"{prefix}{name}")
        module.load_state_dict(state)
        return module.eval()

    with torch.no_grad():
        x, grid = filled(hf.Swinv2Embeddings(config), "swinv2.embeddings.")(pixels)[:2]
        for stage, depth in enumerate(config.depths):
            width, resolution = config.embed_dim * 2**stage, (grid[0], grid[1])
            for block in range(depth):
                shift = 0 if block % 2 == 0 else config.window_size // 2
                layer = hf.Swinv2Layer(config, width, resolution, config.num_heads[stage], shift_size=shift)
                x = filled(layer, f"swinv2.encoder.layers.{stage}.blocks.{block}.")(x, grid)[0]
                del layer
            if stage + 1 < len(config.depths):
                merge = filled(hf.Swinv2PatchMerging(resolution, width), f"swinv2.encoder.layers.{stage}.downsample.")
                x, grid = merge(x, grid), (grid[0] // 2, grid[1] // 2)
        x = filled(torch.nn.LayerNorm(x.shape[-1], eps=config.layer_norm_eps), "swinv2.layernorm.")(x)
        return filled(torch.nn.Linear(x.shape[-1], LABELS), "classifier.")(x.mean(1)).numpy()


EXPORT = """
import json, logging, resource, sys, time
import swin_deploy
start = time.time()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
class Show(logging.Handler):
    def emit(self, record):
        print(f"  [{time.time() - start:5.0f} s, {peak() / 1e9:5.1f} GB] {record.getMessage()}", file=sys.stderr)
logging.getLogger("swin_deploy").addHandler(Show())
logging.getLogger("swin_deploy").setLevel(logging.INFO)
swin_deploy.export(weights=sys.argv[1], output=sys.argv[2])
print(json.dumps({"seconds": time.time() - start, "peak": peak()}))
"""
RUN = """
import json, resource, sys, time
import numpy as np, swin_deploy
start = time.time()
with swin_deploy.load(sys.argv[1], precision="fp32") as model:
    loaded = time.time() - start
    logits = model.run({"pixel_values": np.load(sys.argv[2])})["logits"]
np.save(sys.argv[3], logits)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"load": loaded, "seconds": time.time() - start, "peak": peak}))
"""


def child(code: str, folder: Path, *arguments: object) -> dict[str, float]:
    """Run `code` in its own process in `folder`, not in the checkout, and return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=42, help="blocks of the third stage; SwinV2-G has 42")
    chosen = parser.parse_args()
    chosen.folder = chosen.folder.resolve()
    checkpoint, bundle = chosen.folder / f"swinv2-g-{chosen.depth}", chosen.folder / f"bundle-{chosen.depth}"
    start = time.time()
    count = write_checkpoint(checkpoint, chosen.depth)
    print(f"{count / 1e9:.2f} billion parameters, {count * 4 / 1e9:.1f} GB, written in {time.time() - start:.0f} s")
    exported = child(EXPORT, chosen.folder, checkpoint, bundle)
    ratio = exported["peak"] / (count * 4)
    print(f"export: {exported['seconds']:.0f} s, peak memory {exported['peak'] / 1e9:.1f} GB = {ratio:.2f} times the weights")
    pixels = np.random.default_rng(1).standard_normal((1, 3, IMAGE, IMAGE), dtype=np.float32)
    np.save(chosen.folder / "pixels.npy", pixels)
    ran = child(RUN, chosen.folder, bundle, chosen.folder / "pixels.npy", chosen.folder / "logits.npy")
    print(f"ONNX Runtime: loaded in {ran['load']:.0f} s, peak memory {ran['peak'] / 1e9:.1f} GB")
    logits = np.load(chosen.folder / "logits.npy").astype(np.float64)
    expected = reference(checkpoint, torch.from_numpy(pixels)).astype(np.float64)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    distance = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    print(f"against transformers, block by block ({own:.1f} GB): relative L2 {distance:.1e}")


if __name__ == "__main__":
    main()
