"""Files for other tools: layers of engines for TREx, and inputs and outputs for Polygraphy."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from swin_deploy.bundle import Bundle, disk_errors
from swin_deploy.errors import UsageError
from swin_deploy.options import Array

# Types of constants that TREx reads, and its names of types that older versions of TensorRT write otherwise.
CONSTANT_TYPES = ("Int8", "Half", "Float", "Int32")
TREX_TYPES = {"FP16": "Half", "FP32": "Float", "BF16": "BFloat16", "INT8": "Int8", "INT32": "Int32"}


def trex_from_profile(profile: Mapping[str, Any], bindings: Iterable[str]) -> dict[str, Any]:
    """Return the layers of one optimization profile as TREx reads them; `bindings` are inputs and outputs of the engine."""
    layers, seen = [], set()
    for layer in profile["layers"]:
        made = {
            "Name": _name(layer),
            "LayerType": layer["kind"],
            "Inputs": [_tensor(one) for one in layer["inputs"]],
            "Outputs": [_tensor(one) for one in layer["outputs"]],
            "TacticName": layer.get("tactic", ""),
        }
        constants = [one for one in layer["constants"] or () if _type(one) in CONSTANT_TYPES]
        for key, one in zip(("Weights", "Bias"), sorted(constants, key=lambda one: -_count(one)), strict=False):
            made[key] = {"Type": _type(one), "Count": _count(one)}
        seen |= {one["Name"] for one in (*made["Inputs"], *made["Outputs"])}
        layers.append(made)
    return {"Layers": layers, "Bindings": [name for name in bindings if name in seen]}


def _tensor(one: Mapping[str, Any]) -> dict[str, Any]:
    return {"Name": _name(one), "Location": "Device", "Dimensions": one["dims"], "Format/Datatype": _type(one)}


def _name(one: Mapping[str, Any]) -> str:
    """Return a name without the number of its profile: TREx leaves out what has one, and each profile has a file of its own."""
    return re.sub(r" ?\[profile \d+\]", "", one["name"])


def _type(one: Mapping[str, Any]) -> str:
    return TREX_TYPES.get(one["datatype"], str(one["datatype"]))


def _count(one: Mapping[str, Any]) -> int:
    return int(np.prod(one["dims"]))


def write_trex(bundle: Bundle, folder: Path) -> tuple[Path, ...]:
    """Write a file for each optimization profile of each engine of `bundle`, and return them.

    Raises:
        UsageError: The bundle has no engine whose layers are known.
    """
    from swin_deploy.exporters.engines.build import layers_file

    written = []
    for file, entry in bundle.engines.items():
        if layers_file(file) not in bundle.files:
            continue
        graph = bundle.graph_of(file)
        names = [spec.name for spec in (*graph.inputs, *graph.outputs)]
        for number, profile in enumerate(bundle.read_json(layers_file(file))["profiles"]):
            if not profile["layers"]:
                continue
            suffix = "" if len(entry.profiles) < 2 else f".profile{number}"
            path = folder / f"{Path(file).stem}{suffix}.graph.json"
            write_json(path, trex_from_profile(profile, names))
            written.append(path)
    if not written:
        raise UsageError(
            f"{bundle.path} has no engine whose layers are known. Build one: swin-deploy build-engine {bundle.path}"
        )
    return tuple(written)


def polygraphy_inputs(feeds: Mapping[str, Array]) -> list[Any]:
    """Return one batch of inputs as `polygraphy run --load-inputs` reads it."""
    return [{name: _array(values) for name, values in feeds.items()}]


def polygraphy_outputs(name: str, outputs: Mapping[str, Array]) -> dict[str, Any]:
    """Return the outputs of the runner `name` as `polygraphy run --load-outputs` reads them."""
    lazy = {key: {"values": _array(values), "polygraphy_class": "LazyArray"} for key, values in outputs.items()}
    result = {"outputs": lazy, "runtime": None, "runner_name": name, "polygraphy_class": "IterationResult"}
    return {"lst": [[name, [result]]], "polygraphy_class": "RunResults"}


def write_json(path: Path, value: Any) -> None:
    """Write `value` to the JSON file `path`, in a folder that is created if needed."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _array(values: Array) -> dict[str, str]:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return {"array": base64.b64encode(file.getvalue()).decode(), "polygraphy_class": "ndarray"}
