"""Records the signatures of timm's and torchvision's Swin classes, and what tiny networks with each argument compute.

Run it where timm 1.0 and torchvision are installed: python tests/checkpoints/record_arguments.py. Weights and images are drawn
from names, so only configs, shapes, buffers and outputs are stored, in arguments/.
"""

from __future__ import annotations

import inspect
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).parent / "arguments"
TIMM = {1: "swin_tiny_patch4_window7_224", 2: "swinv2_tiny_window8_256"}
CLASSES = {1: "SwinTransformer", 2: "SwinTransformerV2"}

# Maps of 8x12 and 4x6 patches: the second is no larger than the window on one axis, and no multiple of it on the other.
BASE = {"patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_classes": 3}
SMALL = {"img_size": [20, 28], "window_size": 6}  # maps smaller than the window
OTHER_SIZE = (40, 24)  # what a network for IMAGE also accepts if it is told to
IMAGE = (32, 48)
ACTIVATIONS = ("gelu_tanh", "quick_gelu", "relu", "relu6", "silu", "swish", "leaky_relu", "mish", "sigmoid", "tanh",
               "hard_swish", "hardswish", "identity")  # fmt: skip

# Argument -> its values, or whole sets of arguments. None of the values is the default.
BOTH: dict[str, list[Any]] = {
    "img_size": [40, [24, 40]],
    "patch_size": [2, [4, 2]],
    "in_chans": [1, 4],
    "num_classes": [7, 0],
    "global_pool": ["max", "avgmax", "catavgmax", "", "fast", "fastmax", {"global_pool": "", "num_classes": 0},
                    {"global_pool": "max", **SMALL},
                    {"global_pool": "catavgmax", "depths": [1, 2], "window_size": [[4, 6], [3, 2]]}],
    "embed_dim": [12],
    "depths": [{"depths": [1, 2, 1], "num_heads": [1, 2, 4]}],
    "num_heads": [[1, 2]],
    "window_size": [3, [4, 8], [8, 4], [2, 3], [[4, 6], [3, 2]], [[5, 2], 3], {"window_size": [9, 4], "img_size": [20, 64]},
                    {"window_size": [4, 2, 3], "depths": [1, 2, 2], "num_heads": [1, 2, 2]}],
    "always_partition": [{"always_partition": True, **SMALL}, {"always_partition": True, "window_size": [8, 4]}],
    "strict_img_size": [False],
    "dynamic_img_size": [True, {"dynamic_img_size": True, "window_size": [4, 3], "always_partition": True}],
    "mlp_ratio": [2.5],
    "qkv_bias": [False],
    "drop_rate": [0.5],
    "proj_drop_rate": [0.5],
    "attn_drop_rate": [0.5],
    "drop_path_rate": [0.5],
    "device": ["cpu"],
}  # fmt: skip
ONLY: dict[int, dict[str, list[Any]]] = {
    1: {"head_dim": [4, [4, None]], "mlp_ratio": [[2.0, 3.0]], "weight_init": ["skip", "jax"]},
    2: {"act_layer": list(ACTIVATIONS), "pretrained_window_sizes": [[6, 3], [[6, 3], 0]]},
}
TORCHVISION: dict[str, list[Any]] = {
    "patch_size": [[4, 2]],
    "embed_dim": [12],
    "depths": BOTH["depths"],
    "num_heads": [[1, 2]],
    "window_size": [[4, 8], [8, 4], [2, 3], [9, 4]],
    "mlp_ratio": [2.5],
    "dropout": [0.5],
    "attention_dropout": [0.5],
    "stochastic_depth_prob": [0.5],
    "num_classes": [7],
}


class ArgumentCase(NamedTuple):
    """One network: of timm or torchvision, V1 or V2, and its arguments beside BASE."""

    system: str
    version: int
    argument: str
    given: dict[str, Any]
    image_size: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.system} V{self.version} {self.argument} {json.dumps(self.given)}"


def cases() -> list[ArgumentCase]:
    """All networks of the record."""
    found = []
    for version in (1, 2):
        for system, tables in (("timm", (BOTH, ONLY[version])), ("torchvision", (TORCHVISION,))):
            for argument, values in ((argument, values) for table in tables for argument, values in table.items()):
                for value in values:
                    given = value if isinstance(value, dict) else {argument: value}
                    size = given.get("img_size", IMAGE)
                    size = OTHER_SIZE if argument in ("strict_img_size", "dynamic_img_size") else size
                    found.append(
                        ArgumentCase(system, version, argument, given, (size, size) if isinstance(size, int) else tuple(size))
                    )
    return found


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Draw the values of a parameter, or an image, from its name."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "weight" and len(shape) > 1:
        values /= np.float32(np.sqrt(np.prod(shape[1:])))
    elif leaf != "pixel_values":
        values = values * np.float32(0.3) + np.float32({"logit_scale": 2.3, "weight": 1.0}.get(leaf, 0.0))
    return values


def main() -> None:
    """Record everything."""
    import timm
    import torch
    import torchvision
    from timm.models import _hub, swin_transformer, swin_transformer_v2
    from torchvision.models import swin_transformer as theirs

    signatures: dict[str, Any] = {"timm": timm.__version__, "torchvision": torchvision.__version__}
    modules = {1: swin_transformer, 2: swin_transformer_v2}
    for version, module in modules.items():
        signatures[f"timm {CLASSES[version]}"] = signature(getattr(module, CLASSES[version]))
    signatures["torchvision SwinTransformer"] = signature(theirs.SwinTransformer)
    for factory in ("swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b"):
        signatures[f"torchvision {factory}"] = signature(getattr(theirs, factory))
    signatures["factories"] = {}
    for version, module in modules.items():
        create = f"_create_{'swin_transformer' if version == 1 else 'swin_transformer_v2'}"
        original = getattr(module, create)
        setattr(module, create, lambda name, pretrained=False, **given: given)
        for name in timm.list_models("swin*", module=module.__name__.rpartition(".")[2]):
            size = timm.get_pretrained_cfg(name).input_size
            signatures["factories"][name] = {**getattr(module, name)(), "img_size": size[1:]}
        setattr(module, create, original)
    HERE.mkdir(exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in signatures.items()]
    (HERE / "signatures.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")

    arrays: dict[str, np.ndarray[Any, Any]] = {}
    configs: dict[str, Any] = {}
    for case in cases():
        if case.system == "timm":
            model = timm.create_model(TIMM[case.version], **{"img_size": IMAGE, **BASE, **case.given})
            _hub.save_config_for_hf(model, HERE / "config.json")
            config = json.loads((HERE / "config.json").read_text())
        else:
            second = (
                {"block": theirs.SwinTransformerBlockV2, "downsample_layer": theirs.PatchMergingV2} if case.version == 2 else {}
            )
            given = {**BASE, "patch_size": [4, 4], "window_size": [4, 4], **case.given}
            model, config = theirs.SwinTransformer(**given, **second), None
        state = model.eval().state_dict()
        for name, tensor in state.items():
            if "relative_position_index" in name or "relative_coords" in name:
                arrays[f"{case.name}/{name}"] = tensor.numpy()
            else:
                state[name] = torch.from_numpy(drawn(name, tuple(tensor.shape)))
        model.load_state_dict(state)
        configs[case.name] = [config, {name: list(tensor.shape) for name, tensor in state.items()}]
        channels = state["patch_embed.proj.weight" if config else "features.0.0.weight"].shape[1]
        with torch.no_grad():
            logits = model(torch.from_numpy(drawn("pixel_values", (2, channels, *case.image_size))))
        arrays[f"{case.name}/logits"] = logits.numpy()
    (HERE / "config.json").unlink()
    arrays["configs"] = np.frombuffer(json.dumps(configs).encode(), np.uint8)
    np.savez_compressed(HERE / "networks.npz", **arrays)


def signature(function: Any) -> dict[str, str]:
    """The arguments of a function or class, and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {
        one.name: "" if one.default is one.empty else getattr(one.default, "__name__", repr(one.default)) for one in parameters
    }


if __name__ == "__main__":
    main()
