"""Changed bundles and what is run through them: images, data sets, labels, manifests, graphs and side files."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import mutators as change
from .checkpoint_inputs import command
from .runner import Planned
from .seeds import Seeds

FP32 = ("--precision", "fp32", "--backend", "onnxruntime")


def images(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    """Image files of every format: their bytes, and PNG files with any header and chunks."""
    source = rng.choice(seeds.pictures)
    data = source.read_bytes()
    if source.suffix == ".npy":
        data, done = change.changed_npy(rng, data)
    elif rng.random() < 0.12:
        kind, side = rng.choice((0, 2, 3, 4, 6, 7)), rng.choice((0, 1, 8, 8, 100_000, 2**31 - 1, 2**32 - 1))
        palette = (b"PLTE", rng.randbytes(rng.choice((0, 3, 7, 768))))
        profiles = ((b"iCCP", b"a\0\0" + zlib.compress(rng.randbytes(40))), (b"iCCP", b"x" * 90))
        others = ((b"tRNS", rng.randbytes(rng.choice((0, 1, 300)))), (b"eXIf", rng.randbytes(40)))
        chunk = rng.choice((palette, *profiles, *others, (b"acTL", struct.pack(">II", 2**31, 0))))
        data, done = (
            change.png_of(side, rng.choice((side, 8)), kind, rng.randbytes(8 * 33), (chunk,)),
            f"png {side} {kind} {chunk}",
        )
    else:
        data, done = change.changed_bytes(rng, data, [(0, 200), (0, 60)])
    file, bundle = folder / "inputs" / f"a{source.suffix if rng.random() < 0.9 else '.png'}", seeds.bundles[0]
    file.write_bytes(data)
    if rng.random() < 0.05:
        return Planned("predict", f"{source.name}: {done}", command("predict", bundle, file, *FP32))

    def call() -> None:
        from swin_deploy.preprocess import Preprocessor, read_image

        Preprocessor.imagenet((32, 32))(read_image(file))

    return Planned("preprocess", f"{source.name}: {done}", call)


def data(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    """Data sets as NumPy files and folders of images, their labels, and the names of classes."""
    sources = ["data.npz", "prepared.npz", "data.npy", "odd", "images", *("labels.csv", "labels.json")]
    sources += ["names.txt", "names.csv", "names.json"]
    kind, bundle = rng.choice(sources), seeds.bundles[0]
    if kind == "odd":
        file, done = _odd_labels(seeds, rng, folder)
    elif kind == "images":
        file, done = _odd_folder(seeds, rng, folder)
    else:
        file = folder / "inputs" / kind
        raw, done = changed_file(rng, seeds.data / kind)
        file.write_bytes(raw)
    if kind.startswith("names"):

        def call() -> None:
            from swin_deploy.calib.labels import class_names

            labels, _ = class_names(str(file), 2)
            if sorted(labels) != [0, 1] or not all(isinstance(label, str) for label in labels.values()):
                raise TypeError(f"labels {labels}")

        return Planned("names", f"{kind}: {done}", call)
    given = ("--data", seeds.data / "images", "--labels", file) if kind.startswith("labels") else ("--data", file)
    if rng.random() < 0.02:
        target = copied(seeds, rng, folder)
        return Planned("quantize", f"{kind}: {done}", command("quantize", target, "--int8", *given))
    return Planned("evaluate", f"{kind}: {done}", command("evaluate", bundle, *given))


def changed_file(rng: random.Random, file: Path) -> tuple[bytes, str]:
    """Change the content of a file in the way of its format."""
    raw = file.read_bytes()
    if file.suffix in (".csv", ".txt"):
        return change.changed_lines(rng, raw.decode())
    changes = {".json": change.changed_json_file, ".npz": change.changed_npz, ".npy": change.changed_npy}
    return changes.get(file.suffix, change.changed_bytes)(rng, raw)


def _odd_labels(seeds: Seeds, rng: random.Random, folder: Path) -> tuple[Path, str]:
    import numpy as np

    file = folder / "inputs/data.npz"
    odd = (["a", change.ESC, "b", "c"], [0.5, 1, 2, 3], [1e308] * 4, [2**62] * 4, [-1] * 4, [True] * 4, [[0, 1]] * 4, 3)
    labels = rng.choice((*odd, [float("nan")] * 4, [1j] * 4))
    np.savez(file, images=np.load(seeds.data / "data.npz")["images"], labels=np.array(labels))
    return file, f"labels {labels}"


def _odd_folder(seeds: Seeds, rng: random.Random, folder: Path) -> tuple[Path, str]:
    target = Path(shutil.copytree(seeds.data / "images", folder / "inputs/images"))
    picture = target / "class0/0.png"
    raw, done = change.changed_bytes(rng, picture.read_bytes(), [(0, 60)])
    picture.write_bytes(raw)
    if rng.random() < 0.3:
        name = rng.choice((change.ESC[:4], "a\nb", "é", "-x", " ", os.fsdecode(b"\xff")))
        shutil.move(target / "class1", target / name)
        done += f", a folder {name!a}"
    return target, done


# --- bundles


def copied(seeds: Seeds, rng: random.Random, folder: Path, source: Path | None = None) -> Path:
    """Copy a bundle, with a link that leads out of it."""
    target = folder / "bundle"
    shutil.copytree(source or rng.choice(seeds.bundles), target, dirs_exist_ok=True)
    (target / "link").symlink_to("../victim")
    return target


# Verbs that read a bundle, and how often each is chosen.
VERBS = {
    **{
        "open": 20,
        "load": 25,
        "predict": 15,
        "verify": 15,
        "openvino": 4,
        "torch": 8,
        "inspect": 15,
        "refit": 8,
        "evaluate": 5,
    },
    **{"build-engine": 3, "quantize": 2, "auto": 2, "weights": 2, "plots": 8},
}


def planned(seeds: Seeds, rng: random.Random, path: Path, change: str, only: tuple[str, ...] = ()) -> Planned:
    """Plan one verb for a bundle, one of `only` if there are some."""
    picture, samples = seeds.data / "images/class0/0.png", seeds.data / "data.npz"
    verb = rng.choice(only) if only else rng.choices(list(VERBS), list(VERBS.values()))[0]
    precision = rng.choice(("fp32", "fp32", "fp16", "int8"))
    described = rng.choice(((), ("--json",), ("--gpu", "rtx-4090"), ("--compare", seeds.bundles[-1])))
    gate = rng.choice(((), ("--max-drop", 100)))
    functions: dict[str, Callable[[], object]] = {
        "open": lambda: _open(path),
        "load": lambda: _load(path, picture),
        "plots": lambda: _without_plots(path),
    }
    commands: dict[str, tuple[Any, ...]] = {
        "predict": ("predict", path, picture, "--precision", precision, "--backend", "onnxruntime"),
        "auto": ("predict", path, picture),
        "verify": ("verify", path, *rng.choice(((), ("--json",)))),
        "openvino": ("predict", path, picture, "--precision", "fp32", "--backend", "openvino"),
        "torch": ("predict", path, picture, "--precision", "fp32", "--backend", "torch"),
        "inspect": ("inspect", path, *described),
        "refit": ("refit", path),
        "evaluate": ("evaluate", path, "--data", samples),
        "weights": ("evaluate", path, "--data", samples, "--weights", seeds.checkpoint),
        "build-engine": ("build-engine", path, "--fp16", "--gpu", "sm_89"),
        "quantize": ("quantize", path, "--int8", "--data", samples, *gate),
    }
    return Planned(verb, change, functions[verb] if verb in functions else command(*commands[verb]))


def _open(path: Path) -> None:
    from swin_deploy.bundle import Bundle

    bundle = Bundle.open(path)
    str(bundle.name)
    for file in (*bundle.graphs, *bundle.files):
        bundle.verified_path(file)


def _load(path: Path, picture: Path) -> None:
    import swin_deploy

    with swin_deploy.load(path, precision="fp32", backend="onnxruntime") as model:
        model.classify(str(picture))
        str(model.describe())


def _without_plots(path: Path) -> None:
    """Remove and write files by the keys of the manifest, as `quantize` does."""
    from swin_deploy.bundle import Bundle

    bundle = Bundle.open(path)
    for file, entry in list(bundle.graphs.items()):
        plot = file.removesuffix(".onnx") + ".sensitivity.svg"
        if plot in bundle.files:
            bundle = bundle.without(plot)
        bundle = bundle.with_file(plot, {"parent": entry["sha256"]}, b"<svg/>")


def manifest(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    """Manifests with a right digest: any value, key or file name; and some with changed bytes."""
    target = copied(seeds, rng, folder)
    done = change.changed_manifest(rng, target)
    if rng.random() < 0.05:
        raw, more = change.changed_bytes(rng, (target / "manifest.json").read_bytes())
        (target / "manifest.json").write_bytes(raw)
        done += f", bytes: {more}"
    return planned(seeds, rng, target, done)


OF_GRAPHS = "load predict verify verify openvino torch inspect inspect evaluate build-engine quantize auto"


def graphs(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    """ONNX graphs, whose digests in the manifest are right."""
    import onnx

    target = copied(seeds, rng, folder)
    path = rng.choice(sorted((target / "onnx").glob("*.onnx")))
    if rng.random() < 0.25:
        raw, done = change.changed_bytes(rng, path.read_bytes())
    else:
        model = onnx.load(str(path), load_external_data=False)
        done = ", ".join(changed_graph(rng, model) for _ in range(rng.choice((1, 1, 1, 2, 4))))
        raw = model.SerializeToString()
    path.write_bytes(raw)
    change.recorded(target, f"onnx/{path.name}")
    done = f"{path.name}: {done}"
    if rng.random() < 0.15:
        shutil.copytree(target / "onnx", folder / "inputs", dirs_exist_ok=True)
        alone = folder / "inputs" / path.name
        if rng.random() < 0.5:
            return Planned("ranges", done, command("quantize", target, "--int8", "--ranges", alone))
        return Planned("inspect file", done, command("inspect", alone))
    return planned(seeds, rng, target, done, tuple(OF_GRAPHS.split()))


def changed_graph(rng: random.Random, model: Any) -> str:
    """Change an ONNX graph: any field of any message, or its nodes, edges, constants and subgraphs."""
    from onnx import helper

    graph, nodes = model.graph, model.graph.node
    shapes = ["cycle", "remove", "repeat", "shuffle", "edge", "subgraph", "node", "function", "sparse", "opset", "big"]
    how = rng.choice(("field",) * 8 + ("data", "dims", "external", *shapes) if nodes and graph.initializer else ("field",))
    if how == "field":
        return change.changed_message(rng, model)
    node = rng.choice(nodes)
    if how in ("data", "dims", "external"):
        _change_constant(rng, rng.choice(graph.initializer), how)
    elif how in ("subgraph", "node", "function"):
        _add_code(rng, model, node, how)
    elif how == "cycle":
        node.input[:] = [nodes[-1].output[0], *node.input[1:]]
    elif how == "remove":
        nodes.remove(node)
    elif how == "repeat":
        nodes.extend([node] * (rng.choice((1, 1, 50_000)) if node.ByteSize() < 1000 and len(nodes) < 1000 else 1))
    elif how == "shuffle":
        mixed = rng.sample(list(nodes), len(nodes))
        del nodes[:]
        nodes.extend(mixed)
    elif how == "edge" and node.input:
        known = [value for other in nodes for value in (*other.input, *other.output)]
        node.input[rng.randrange(len(node.input))] = rng.choice((*known, "nowhere", ""))
    elif how == "sparse":
        values, places = helper.make_tensor("s", 1, [1], [1.0]), helper.make_tensor("i", 7, [1], [rng.choice((0, 5, 2**40))])
        graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [rng.choice((3, 2**50))]))
    elif how == "opset":
        model.ir_version = rng.choice((0, 1, 8, 10, 99, -1))
        for imported in model.opset_import:
            imported.version = rng.choice((0, 1, 7, 22, 99, -1, 2**60))
    elif how == "big":
        for value in (*graph.input, *graph.output):
            for dim in value.type.tensor_type.shape.dim:
                if rng.random() < 0.5:
                    dim.dim_value = rng.choice((0, -1, 2**40, 2**62, 10**6, 33))
    return how


LOCATIONS = (
    *("../../victim/v.onnx_data", "model.onnx_data", "/etc/passwd", "nowhere", "", "../link/v.onnx_data", "a\0b", "/dev/zero"),
    *("../manifest.json", "model.onnx", "*/_ORT_MEM_ADDR_/*"),
)


def _change_constant(rng: random.Random, tensor: Any, how: str) -> None:
    if how == "data":
        tensor.raw_data = rng.choice((b"", tensor.raw_data[: len(tensor.raw_data) // 2], tensor.raw_data * 2, b"x"))
    elif how == "dims":
        dims = list(tensor.dims)
        tensor.dims[:] = rng.choice(([0], [-1], [2**40], [2**62, 4], [1] * 100, [], [*dims, 1], dims[::-1]))
    else:
        tensor.data_location = tensor.EXTERNAL
        tensor.ClearField("raw_data")
        del tensor.external_data[:]
        facts = {"location": rng.choice(LOCATIONS), "offset": rng.choice(("0", "-1", "x", str(2**63), "4096", "1e9"))}
        facts["length"] = rng.choice(("4", "0", "-1", str(2**63), "x"))
        for key in rng.sample(sorted(facts), rng.choice((1, 2, 3, 3, 3))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, facts[key]


def _add_code(rng: random.Random, model: Any, node: Any, how: str) -> None:
    """Add a node that no Swin has, nested subgraphs, or a function that calls itself."""
    from onnx import helper

    nodes = model.graph.node
    body = helper.make_graph(
        [helper.make_node("Identity", ["a"], ["b"])], "body", [], [helper.make_tensor_value_info("b", 1, None)]
    )
    for _ in range(rng.choice((0, 0, 3, 30))):
        body = helper.make_graph([helper.make_node("If", ["a"], ["b"], then_branch=body)], "body", [], body.output)
    if how == "subgraph":
        node.attribute.append(helper.make_attribute("then_branch", body))
        return
    if how == "function":
        imports, itself = [helper.make_opsetid("own", 1)], helper.make_node("f", ["x"], ["y"], domain="own")
        model.functions.append(helper.make_function("own", "f", ["x"], ["y"], [itself], imports))
        model.opset_import.extend(imports)
        nodes.append(helper.make_node("f", ["pixel_values"], ["z"], domain="own"))
        return
    branches = {"then_branch": body, "else_branch": body}
    odd = (
        helper.make_node("If", [nodes[0].output[0] if nodes[0].output else "x"], ["x"], **branches),
        helper.make_node("Loop", ["", ""], ["x"], body=body),
        helper.make_node("Constant", [], ["x"], value_strings=["a"] * 1000),
        *(
            helper.make_node(kind, ["pixel_values"] * 2, ["x"])
            for kind in ("NoSuchOperator", "ConstantOfShape", "Tile", "Range")
        ),
        helper.make_node("Identity", ["pixel_values"], ["x"], domain="com.microsoft"),
    )
    nodes.insert(0, rng.choice(odd))


# Verbs that read each of the other files of a bundle.
READERS = {
    "config.json": ("load", "predict", "quantize", "evaluate", "build-engine", "weights"),
    "preprocessor_config.json": ("load", "predict"),
    "reference": ("verify", "verify", "auto", "torch", "build-engine"),
    "engines": ("inspect", "inspect", "refit"),
    "ranges.json": ("quantize",),
    ".calibration": ("quantize",),
}


def side(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    """The other files of a bundle and of the cache: configurations, references, ranges, layers, weights, engines, timings."""
    target = copied(seeds, rng, folder, seeds.bundles[-1])
    if rng.random() < 0.03:  # of the small bundle: load uses the measurements that are stored in the other one
        shutil.rmtree(target)
        return _timings(seeds, rng, copied(seeds, rng, folder, seeds.bundles[0]))
    found = [
        path for path in sorted(target.rglob("*")) if path.is_file() and path.suffix != ".onnx" and "link" not in path.parts
    ]
    file = rng.choice([path for path in found if path.name != "manifest.json"])
    name = file.relative_to(target).as_posix()
    raw, done = changed_file(rng, file)
    file.write_bytes(raw)
    if rng.random() < 0.9 and name in json.loads((target / "manifest.json").read_text())["files"]:
        change.recorded(target, name)
    else:
        done += ", not recorded"
    only = next((verbs for start, verbs in READERS.items() if name.startswith(start)), ())
    if only == ("quantize",) and rng.random() < 0.8:  # it takes seconds
        return Planned("ranges", f"{name}: {done}", lambda: _read_ranges(target, file))
    return planned(seeds, rng, target, f"{name}: {done}", only if rng.random() < 0.85 else ())


def _read_ranges(bundle: Path, file: Path) -> None:
    from swin_deploy.bundle import Bundle
    from swin_deploy.calib.collect import load_arrays
    from swin_deploy.qat_ranges import RANGES, QatRanges

    if file.name == RANGES:
        QatRanges.from_dict(Bundle.open(bundle).read_json(RANGES))
    else:
        load_arrays(file, "a key")


def _timings(seeds: Seeds, rng: random.Random, bundle: Path) -> Planned:
    """What "auto" measured, in the cache of the user."""

    def call() -> None:
        from swin_deploy.runtimes.user_cache import cache_folder

        _auto(bundle, seeds)
        for file in (cache_folder("auto") or Path()).iterdir():
            file.write_bytes(change.changed_json_file(rng, file.read_bytes())[0])
        _auto(bundle, seeds)

    return Planned("timings", "what auto measured", call)


def _auto(bundle: Path, seeds: Seeds) -> None:
    import swin_deploy

    with swin_deploy.load(bundle) as model:
        model.classify(str(seeds.data / "images/class0/0.png"))
