"""Changed checkpoints: weight files of every format, archives that become large, and configurations."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from . import mutators as change
from .runner import Planned, WrongTensorError
from .seeds import Seeds

Expect = Callable[[Path], Mapping[str, Any] | None]  # what another library reads from a file; None: it has no answer
CLASSES = "image-classification"


def command(verb: str, *arguments: object) -> Callable[[], object]:
    """Return a call of the command line."""

    def call() -> None:
        from swin_deploy.cli import main

        sys.argv = ["swin-deploy", verb, *map(str, arguments)]
        main()

    return call


def task_of(source: Path) -> str:
    """Return the task of a checkpoint by its name."""
    name = str(source)
    return "masked-image-modeling" if "MIM" in name or "Masked" in name else "backbone" if "Backbone" in name else CLASSES


def read_weights(file: Path, expect: Expect) -> None:
    """Read every tensor of a file, and compare its type, shape and bytes with those that another library reads."""
    from swin_deploy.models.checkpoints.weight_files import open_weights

    read = {name: stored.read() for name, stored in open_weights(file).tensors.items()}
    expected = expect(file)
    if expected is not None:
        known = {_content(tensor) for tensor in expected.values()}
        for name, tensor in read.items():
            if _content(tensor) not in known:
                raise WrongTensorError(f"{name} {list(tensor.shape)} is not in the file")


def read_checkpoint(path: Path, task: str = CLASSES) -> None:
    """Recognize a checkpoint, read its preprocessing and the tensors that its network needs, and build the network."""
    from swin_deploy.exporters.checkpoint_from_request import preprocessing_of
    from swin_deploy.models.checkpoints import checkpoint_from_path
    from swin_deploy.models.swin import SwinNetwork
    from swin_deploy.options import ExportSpec
    from swin_deploy.tasks import TaskSpec

    checkpoint = checkpoint_from_path(path, TaskSpec(task))
    preprocessing_of(checkpoint, ExportSpec(weights=path))
    SwinNetwork(checkpoint.config, checkpoint.config.image_size, checkpoint.tensors, TaskSpec(task), "tensorrt")


def _content(tensor: Any) -> tuple[str, tuple[int, ...], bytes]:
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(data).digest()


def _changed(rng: random.Random, folder: Path, source: Path, data: bytes, done: str, expect: Expect) -> Planned:
    """Write a checkpoint with changed weights. One in 300 that is accepted is exported."""
    target = folder / "inputs/checkpoint"
    shutil.copytree(source.parent, target)
    file, task, export = target / source.name, task_of(source), rng.random() < 0.003
    file.write_bytes(data)
    path = rng.choice((target, file))

    def call() -> None:
        read_weights(file, expect)
        read_checkpoint(path, task)
        if export:
            command("export", "--weights", path, "--task", task, "-o", folder / "bundle/out")()

    return Planned("export" if export else "read", f"{source.parent.name}: {done}", call)


def _alone(file: Path, done: str, expect: Expect) -> Planned:
    def call() -> None:
        read_weights(file, expect)
        read_checkpoint(file)

    return Planned("read", done, call)


def safetensors(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    """The header and the numbers of safetensors files."""
    from safetensors.torch import load_file

    source = rng.choice(seeds.files(".safetensors"))
    data, done = change.changed_safetensors(rng, source.read_bytes())
    return _changed(rng, folder, source, data, done, load_file)


# --- files of torch.save


def torch_load(file: Path | io.BytesIO) -> Mapping[str, Any] | None:
    """Return what torch.load reads from a file; None if it refuses classes, for which swin-deploy has placeholders."""
    import torch

    try:
        return _flat(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:
        if "GLOBAL" in str(error) or "weights_only" in str(error):
            return None
        raise WrongTensorError(f"torch.load refuses this file: {type(error).__name__} {str(error)[:200]}") from error


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    import torch

    if isinstance(value, torch.Tensor):
        return {name: value}
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {key: tensor for part, inside in entries for key, tensor in _flat(inside, f"{name}.{part}").items()}


def pth(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    """The bytes, zip headers, pickles and numbers of files that torch.save wrote."""
    source = rng.choice(seeds.files(".pth", ".bin"))
    data, how, expect = source.read_bytes(), rng.random(), torch_load
    known = torch_load(io.BytesIO(data))
    if known is not None and rng.random() < 0.15:
        data, how = _legacy(data), 0.0
    elif not data.startswith(b"PK"):
        how = 0.0
    if how < 0.4:
        if data.startswith(b"PK"):  # the archive has checksums, so damage in the weights must be found
            expect = lambda file: known  # noqa: E731
        data, done = change.changed_bytes(rng, data, [(0, 2000), (len(data) - 9000, len(data))])
    elif how < 0.6:
        data, done = change.changed_zip(rng, data)
    elif how < 0.9:
        entries = change.entries_of(data)
        name = next(name for name in entries if name.endswith("data.pkl"))
        entries[name], done = change.changed_pickle(rng, entries[name])
        data = change.zip_of(entries)
    else:
        data, done = change.changed_entries(rng, data, lambda rng, name, content: change.changed_bytes(rng, content))
    return _changed(rng, folder, source, data, done, expect)


def _legacy(data: bytes) -> bytes:
    """Return a checkpoint in the format that torch wrote before 1.6."""
    import torch

    buffer = io.BytesIO()
    torch.save(torch.load(io.BytesIO(data), weights_only=True), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def tensor_code(rng: random.Random) -> tuple[bytes, str]:
    """Return a pickle with one tensor of an odd shape, stride, offset, type or storage."""
    odd = (0, 1, 2, 3, 4, 5, 16, 17, 2**20, 2**31, 2**40, 2**62, 2**63 - 1, 2**64, -1, -4)
    shape = tuple(rng.choice(odd) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 60))))
    stride = tuple(rng.choice((0, 0, 1, 1, *odd)) for _ in range(len(shape) if rng.random() < 0.9 else 1))
    offset, count = rng.choice((0, 0, 0, *odd)), rng.choice((4, 4, 4, *odd))
    storage = rng.choice(["Float", "Float", "Long", "Half", "Untyped", "Bool", "QInt8", "ComplexFloat"]) + "Storage"
    key, device = rng.choice(("0", "0", "0", "1", "../0", "", "é")), rng.choice(("cpu", "cpu", "cpu", "cuda:0", "meta", "x"))

    def numbers(values: Iterable[int]) -> bytes:
        return b"(" + b"".join(map(change.long_integer, values)) + b"t"

    kind = change.global_code(b"torch\n" + storage.encode())
    identity = [change.text_code("storage"), kind, change.text_code(key), change.text_code(device), change.long_integer(count)]
    made = [change.global_code(b"torch._utils\n_rebuild_tensor_v2"), b"((", *identity, b"tQ", change.long_integer(offset)]
    made += [numbers(shape), numbers(stride), b"\x89", change.global_code(b"collections\nOrderedDict"), b")RtR"]
    code = b"\x80\x02}" + change.text_code("patch_embed.proj.weight") + b"".join(made) + b"s."
    return code, f"{storage} {shape[:4]} {stride[:4]} {offset} {count} {key} {device}"


def pickles(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    """Pickles that ask for code, time or memory, and tensors of odd shapes, in a zip archive, a legacy file or alone."""
    code, done = tensor_code(rng) if rng.random() < 0.5 else change.hostile_pickle(rng)
    if rng.random() < 0.3:
        code, more = change.changed_pickle(rng, code)
        done += f", {more}"
    how = rng.random()
    if how < 0.7:
        code = change.zip_of({"a/data.pkl": code, "a/data/0": bytes(16), "a/version": b"3\n"})
    elif how < 0.9:
        heads = (b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", b"M\xe9\x03", b"}X\x0d\0\0\0little_endian\x88s")
        numbers = b"\x80\x02]X\x01\0\0\x000a." + struct.pack("<q", 4) + bytes(16)
        code = b"".join(b"\x80\x02" + head + b"." for head in heads) + code + numbers
    file = folder / "inputs/a.pth"
    file.write_bytes(code)
    return _alone(file, done, torch_load)


# --- files that are small, and claim or become large


def bombs(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    """Archives that become large, headers that claim large arrays, and devices and FIFOs in place of files."""
    makers = (
        _zip_bomb,
        _array_bomb,
        _picture_bomb,
        _hdf5_bomb,
        _config_bomb,
        _config_bomb,
        _table_bomb,
        _special_file,
        _special_weights,
    )
    return rng.choice(makers)(seeds, rng, folder)


def _zeros(file: Path, name: str, size: int, head: bytes, entries: int = 0) -> None:
    """Write a compressed archive with an entry of `head` and up to 1 GiB of zeros, and empty entries."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open(name, "w", force_zip64=True) as stream:
            stream.write(head)
            for _ in range(size >> 20):
                stream.write(bytes(1 << 20))
        for number in range(entries):
            archive.writestr(f"a/data/{number}", b"")


def _zip_bomb(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    file, name, size = folder / "inputs/a.pth", rng.choice(("a/data.pkl", "a/data/0")), rng.choice((1 << 20, 1 << 28, 1 << 30))
    entries = rng.choice((0, 0, 50_000))
    _zeros(file, name, size, b"\x80\x02", entries)
    return _alone(file, f"{name} {size} {entries} entries", torch_load)


def _array_bomb(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    size, file = rng.choice((1 << 20, 1 << 28, 1 << 30)), folder / f"inputs/data.{rng.choice(('npz', 'npz', 'npy'))}"
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size // 2304}, 24, 32, 3), }}"
    header = b"\x93NUMPY\x01\x00v\x00" + text.ljust(117).encode() + b"\n"
    kind = "zeros"
    if file.suffix == ".npy" or rng.random() < 0.5:
        header, kind = change.changed_npy(rng, header)
        file.write_bytes(change.zip_of({"images.npy": header + bytes(2304)}) if file.suffix == ".npz" else header)
    else:
        _zeros(file, "images.npy", size, header)
    return Planned("evaluate", f"{file.name} {kind} {size}", command("evaluate", seeds.bundles[0], "--data", file))


def _picture_bomb(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    side, file = rng.choice((9000, 20_000, 65_535, 2**31 - 1)), folder / f"inputs/a.{rng.choice(('png', 'tif'))}"
    tags = ((256, side), (257, side), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, side), (279, 100))
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    text = ((b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 28), 1)),) if rng.random() < 0.3 else ()
    png = change.png_of(side, side, 2, bytes(min(side * 3 + 1, 100_000) * 100), text)
    tiff = b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(200)
    file.write_bytes(png if file.suffix == ".png" else tiff)
    call = command("predict", seeds.bundles[0], file, "--precision", "fp32", "--backend", "onnxruntime")
    return Planned("predict", f"{file.name} {side} {len(text)}", call)


def _hdf5_bomb(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    import h5py
    import numpy as np

    file, size = folder / "inputs/tf_model.h5", rng.choice((1 << 20, 1 << 28, 3 << 30))
    packed: dict[str, Any] = {"compression": "gzip"}
    options = rng.choice((packed, packed | {"shuffle": True}, {"fillvalue": 1.0}, {"chunks": (1 << 16,)}))
    with h5py.File(file, "w") as stream:
        dataset = stream.create_dataset("a/b/c", (size >> 2,), "f4", **options)
        for start in range(0, min(size >> 2, 1 << 26), 1 << 22) if "compression" in options else ():
            dataset[start : start + (1 << 22)] = np.zeros(min(1 << 22, (size >> 2) - start), "f4")
    return _alone(file, f"h5 {size} {options}", lambda file: None)


def _config_bomb(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    target = _copied(seeds, folder)
    config = json.loads((target / "config.json").read_text())
    numbers = ("num_labels", "embed_dim", "image_size", "window_size", "mlp_ratio")
    numbers += ("patch_size", "num_channels", "num_heads", "depths")
    kind = rng.choice((*numbers, "text", "crop", "crop"))
    value = rng.choice((30_000, 10**6, 10**9, 2**64, 1e308))
    if kind == "text":
        texts = (b"[" * 10**6, b'{"a":' * 10**6, b" " * (1 << 28), b'"' + b"a" * (1 << 28) + b'"', b"9" * 10**6)
        (target / rng.choice(("config.json", "preprocessor_config.json"))).write_bytes(rng.choice(texts))
    elif kind == "crop":
        raw = {"do_center_crop": True, "crop_size": value, "size": {"shortest_edge": value}}
        (target / "preprocessor_config.json").write_text(json.dumps(raw))
        return Planned("export", f"crop {value}", command("export", "--weights", target, "-o", folder / "bundle/out"))
    else:
        (target / "config.json").write_text(
            json.dumps({**config, kind: [value] if isinstance(config.get(kind), list) else value})
        )
    return Planned("read", f"config {kind} {value}", lambda: read_checkpoint(target))


def _copied(seeds: Seeds, folder: Path) -> Path:
    return Path(shutil.copytree(seeds.checkpoint, folder / "inputs/checkpoint"))


def _table_bomb(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    file = folder / "inputs/labels.csv"
    rows = rng.choice((b"a" * (1 << 28), b'"' * 10**6, b"a,b\n" * 10**6, b'"' + b"\n" * 10**7))
    file.write_bytes(b"file,label\n" + rows)
    call = command("evaluate", seeds.bundles[0], "--data", seeds.data / "images", "--labels", file)
    return Planned("evaluate", f"labels of {len(rows)} bytes, {rows[:5]!r}", call)


def _special(file: Path, rng: random.Random) -> str:
    """Make a FIFO, or a link to a device, and return which."""
    if rng.random() < 0.5:
        os.mkfifo(file)
        return "fifo"
    file.symlink_to("/dev/zero")
    return "device"


def _special_file(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    bundle, out = seeds.bundles[0], folder / "bundle/out"
    file = folder / f"inputs/a{rng.choice(('.npz', '.npy', '.csv', '.json', '.png', '.txt', '.onnx'))}"
    kind = _special(file, rng)
    calls = {
        "evaluate": ("evaluate", bundle, "--data", file),
        "labels": ("evaluate", bundle, "--data", seeds.data / "images", "--labels", file),
        "names": ("export", "--weights", seeds.checkpoint, "--labels", file, "-o", out),
        "predict": ("predict", bundle, file, "--precision", "fp32"),
        "quantize": ("quantize", bundle, "--int8", "--data", file),
        "ranges": ("quantize", bundle, "--int8", "--ranges", file),
        "inspect": ("inspect", file),
        "preprocessor": ("export", "--weights", seeds.checkpoint, "--preprocessor", file, "-o", out),
    }
    verb = rng.choice(list(calls))
    return Planned(f"{verb} {kind}", file.name, command(*calls[verb]))


def _special_weights(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    target = _copied(seeds, folder)
    names = (
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "adapter_config.json",
    )
    name = rng.choice(names)
    (target / name).unlink(missing_ok=True)
    kind = _special(target / name, rng)
    return Planned("read", f"{kind} {name}", lambda: read_checkpoint(target))


# --- HDF5


def h5(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    """The bytes, data sets, links and attributes of HDF5 files."""
    import h5py

    source = rng.choice(seeds.files(".h5"))
    data = source.read_bytes()
    if rng.random() < 0.5:
        data, done = change.changed_bytes(rng, data, [(0, 4000)])
    else:
        file = folder / "inputs/seed.h5"
        file.write_bytes(data)
        with h5py.File(file, "r+") as stream:
            done = _changed_hdf5(rng, stream)
        data = file.read_bytes()

    def expect(path: Path) -> Mapping[str, Any] | None:
        import torch

        found: dict[str, Any] = {}

        def visit(name: str, entry: Any) -> None:
            if isinstance(entry, h5py.Dataset):
                found[name] = torch.from_numpy(entry[...].astype(entry.dtype.newbyteorder("=")))

        with h5py.File(path, "r") as stream:
            try:
                stream.visititems(visit)
            except RuntimeError:  # it cannot visit all of a damaged file whose data sets it still reads by name
                return None
        return found

    return _changed(rng, folder, source, data, done, expect)


def _changed_hdf5(rng: random.Random, stream: Any) -> str:
    import h5py
    import numpy as np

    names: list[str] = []
    stream.visit(names.append)
    name = rng.choice(names)
    entry = stream[name]
    kinds = ("remove", "type", "shape", "link", "external", "attribute", "attribute", "virtual", "soft", "rename")
    how = rng.choice((*kinds, "text", "scalar", "null"))
    if how == "attribute":
        holder = rng.choice((stream, entry))
        key = rng.choice((*holder.attrs, "weight_names", "layer_names", "top_level_model_weights"))
        values = (b"x", 1, 1e308, np.zeros(1000), ["a"] * 100, np.zeros((3, 0)), change.ESC.encode(), [b"\xff"])
        holder.attrs[key] = rng.choice(values)
        return f"attribute {key} of {name}"
    if how == "rename":
        stream.move(name, rng.choice((f"{name}x", "a", "é", "x" * 500, "b")))
        return f"rename {name}"
    del stream[name]
    if how == "type":
        enumeration = h5py.enum_dtype({"a": 1})
        types = ("i8", "u1", "f8", "f2", "S5", "c8", ">f4", "?", [("a", "f4"), ("b", "i4")], h5py.string_dtype(), enumeration)
        stream.create_dataset(name, (3, 2), rng.choice(types))
    elif how == "shape":
        shape = rng.choice(((), (0,), (1 << 40,), (2, 2), (1,) * 20, (0, 1 << 40)))
        stream.create_dataset(name, shape, "f4", chunks=True if np.prod(shape, dtype=float) > 1e6 else None)
    elif how == "link":
        stream[name] = stream["/"]
    elif how == "external":
        stream.create_dataset(name, (16,), "f4", external=[("../victim/v.npz", 0, 64)])
    elif how == "virtual":
        layout = h5py.VirtualLayout((16,), "f4")
        layout[:] = h5py.VirtualSource("../victim/v.npz", "a", (16,))
        stream.create_virtual_dataset(name, layout)
    elif how == "soft":
        links = (h5py.SoftLink(f"/{name}"), h5py.SoftLink("/nowhere"), h5py.ExternalLink("../victim/v.npz", "/"))
        stream[name] = rng.choice(links)
    elif how == "text":
        stream[name] = rng.choice(("x" * 1000, change.ESC, np.array([b"a", b"b"])))
    elif how == "scalar":
        stream[name] = rng.choice((1.0, 1, np.float64("nan"), True))
    elif how == "null":
        stream[name] = h5py.Empty("f4")
    return f"{how} {name}"


# --- configurations


def configs(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    """Configurations beside the weights, the arguments of a training script in them, and options that do not fit them."""
    if rng.random() < 0.12:
        return _arguments(seeds, rng, folder)
    source = rng.choice((seeds.checkpoint, rng.choice([path for path in seeds.checkpoints if list(path.glob("*.json"))])))
    target, task = folder / "inputs/checkpoint", task_of(source)
    shutil.copytree(source, target)
    options: dict[str, Any] = {}
    if rng.random() < 0.05:
        sizes = [{"image_size": rng.choice(("1", "2", "3", "64", "1x64"))}, {"window_size": rng.choice((1, 2, 7, 64, 10**6))}]
        smaller = {"image_size": "2", "window_size": 2}
        framework = {"framework": rng.choice(("timm", "torchvision", "microsoft")), "image_size": "3"}
        options = rng.choice((*sizes, smaller, framework, {"crop_pct": 0.02}, {"embed_resize": rng.choice(("1", "2x3"))}))
        done = str(options)
    else:
        file = rng.choice(sorted(target.glob("*.json")))
        data, done = change.changed_json_file(rng, file.read_bytes())
        file.write_bytes(data)
        done = f"{source.name}/{file.name}: {done}"
    if rng.random() < (0.1 if options else 0.004):
        flags = [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
        call = command("export", "--weights", target, "--task", task, "-o", folder / "bundle/out", *flags)
        return Planned("export", done, call)
    if options:
        return Planned("options", done, lambda: _with_options(target, task, options))
    return Planned("read", done, lambda: read_checkpoint(target, task))


def _with_options(path: Path, task: str, options: Mapping[str, Any]) -> None:
    """Load a checkpoint with options of an export, and build its network."""
    from swin_deploy.exporters.checkpoint_from_request import checkpoint_from_request
    from swin_deploy.models.swin import SwinNetwork
    from swin_deploy.options import ExportSpec

    given = dict(options)
    size = given.pop("image_size", None)
    spec = ExportSpec(weights=path, task=task, image_sizes=[size] if size else None, **given)
    checkpoint = checkpoint_from_request(spec)
    sizes = spec.image_sizes or (checkpoint.config.image_size,)
    SwinNetwork(checkpoint.config, sizes[0], checkpoint.tensors, spec.task_spec(), "tensorrt")


STATED = {  # what training scripts of Microsoft and timm save beside the weights
    "DATA": {"IMG_SIZE": 32, "INTERPOLATION": "bicubic"},
    "TEST": {"CROP": True},
    "MODEL": {"NUM_CLASSES": 10, "SWIN": {"WINDOW_SIZE": 4, "DEPTHS": [2, 2], "NUM_HEADS": [2, 4], "EMBED_DIM": 16}},
    **{
        "mean": [0.5] * 3,
        "img_size": 32,
        "crop_pct": 0.9,
        "model": "swin_tiny_patch4_window7_224",
        "interpolation": "bilinear",
    },
}


def _arguments(seeds: Seeds, rng: random.Random, folder: Path) -> Planned:
    import torch

    sources = [file for file in seeds.files(".pth", ".bin") if "train_ckpt" not in str(file)]
    source = rng.choice(sources)
    saved = torch.load(source, weights_only=True)
    value, done = change.changed_json(rng, STATED, [odd for odd in change.ODD if odd != change.DEEP])
    file = folder / "inputs/a.pth"
    torch.save({"model": saved.get("model", saved), rng.choice(("config", "args", "hyper_parameters", "cfg")): value}, file)
    return Planned("read", f"arguments in {source.parent.name}: {done}", lambda: read_checkpoint(file, task_of(source)))
