"""Hostile files that try to run code, to fill the memory or to read other files. Each is refused with one sentence."""

from __future__ import annotations

import builtins
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from checkpoint_cases import refused, state_dict, tensor_pickle, write_legacy, write_zip

from swin_deploy.models.checkpoints.weight_files import open_weights

STRIP = "ms__SwinTransformer__strip_32x96"


class Call:
    """An object whose pickle calls `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.how = (function, arguments)

    def __reduce__(self) -> Any:
        return self.how


class Built(Call):
    """An object whose pickle calls `function`, and then sets a state."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], state: Any) -> None:
        self.how = (function, arguments, state)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["weight", "beside", "whole"])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, rf"{os.name}\.system"),
        (builtins.eval, r"builtins\.eval"),
        (builtins.exec, r"builtins\.exec"),
        (builtins.getattr, r"builtins\.getattr"),
        (subprocess.call, r"(commands|subprocess)\.call"),
        (torch.load, r"torch\.serialization\.load"),
    ],
)
def test_no_pickle_runs_code(
    function: Callable[..., Any], name: str, place: str, legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call = Call(function, "open('ran', 'w')" if function in (eval, exec) else "touch ran")
    weights = state_dict(STRIP)
    top: Any = {
        "weight": {"model": weights | {"norm.weight": call}},
        "beside": {"model": weights, "config": call},
        "whole": call,
    }[place]
    torch.save(top, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    refused(tmp_path / "a.pth", rf"asks for {name}, which weights do not need: .* nothing of it was run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_no_plain_pickle_runs_code(protocol: int, tmp_path: Path) -> None:
    made = tmp_path / "ran"
    (tmp_path / "a.bin").write_bytes(pickle.dumps(Call(os.system, f"touch {made}"), protocol))
    sentences = {0: "is not a checkpoint. Expected", 1: "is not a checkpoint. Expected", 2: "system, which weights do not need"}
    refused(tmp_path / "a.bin", sentences.get(protocol, f"was saved with pickle protocol {protocol}, and torch loads only"))
    assert not made.exists()
    pickle.loads((tmp_path / "a.bin").read_bytes())  # which would have run it
    assert made.exists()


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (b"(S'touch ran'\nios\nsystem\n.", "the instruction INST"),
        (b"(cbuiltins\nset\nS'x'\no.", "the instruction OBJ"),
        (b"\x82\x01.", "the instruction EXT1"),
        (b"Pid\n.", "the instruction PERSID"),
        (b"cbuiltins\nset.__init__\n.", r"builtins\.set\.__init__"),
        (b"\x8c\x02os\x8c\x06system\x93.", "the instruction STACK_GLOBAL"),
        (b"ctorch.storage\n_load_from_bytes\n.", r"torch\.storage\._load_from_bytes"),
        (b"(cbuiltins\nset\n}\x92.", "the instruction NEWOBJ_EX"),
    ],
)
def test_every_way_to_name_a_callable(code: bytes, what: str, tmp_path: Path) -> None:
    write_zip(tmp_path / "a.pth", {"a/data.pkl": b"\x80\x02" + code})
    refused(tmp_path / "a.pth", what)


def test_a_pickled_module_and_an_unknown_network(tmp_path: Path) -> None:
    for saved in (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).state_dict()):
        torch.save(saved, tmp_path / "a.pth")
        refused(tmp_path / "a.pth", r"holds 2 tensors, and not those of a Swin \(the first is weight\)")
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", r"holds no tensors by name.* save it with torch\.save\(model\.state_dict\(\), \.\.\.\)")


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (b"\x80\x02", "pickle exhausted before seeing STOP"),
        (b"\x80\x02.", "cannot be read as what torch.save writes"),
        (b"\x80\x02h\x07.", "cannot be read as what torch.save writes"),  # a memo that was never written
        (b"\x80\x02N}u.", "cannot be read as what torch.save writes"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "holds no tensors by name"),  # C's unpickler would make room for 4 billion
        (b"\x80\x02X\xff\xff\xff\xffab.", "expected 4294967295 bytes, found 3"),
        (b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\x7fab.", "is truncated or damaged"),
        (b"\x80\x02" + b"(" * 20_000 + b"." + b"0" * 9, "is truncated or damaged"),
        (b"\x80\x02)" + b"\x862" * 60 + b"Ks.", "cannot be read as what torch.save writes"),
        (b"\x80\x02}K\x01" + b"2\x86" * 60 + b"Ns.", "Unsupported operand 50"),  # DUP: a key with 2**60 leaves
        (b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", r"asks for builtins\.bytearray"),  # of 2 GiB
        (b"\x80\x02ctorch\nByteTensor\n(J\xff\xff\xff\x7ftR.", r"asks for torch\.ByteTensor"),
    ],
)
def test_damaged_and_hostile_pickles(code: bytes, sentence: str, tmp_path: Path) -> None:
    write_zip(tmp_path / "a.pth", {"a/data.pkl": code})
    tracemalloc.start()
    refused(tmp_path / "a.pth", sentence)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def long(value: int) -> bytes:
    return b"\x8a\x0c" + value.to_bytes(12, "little")


COLLIDING = [long(n * sys.hash_info.modulus) for n in range(1, 5200)]
COPIES = {"set": b"cbuiltins\nset\n", "encode": b"c_codecs\nencode\n"}


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (
            b"}(" + b"N".join(COLLIDING) + b"Nu.",
            "has more than 5000 keys that are neither text nor small numbers in its pickle",
        ),
        (
            COPIES["set"] + b"](" + b"".join(COLLIDING) + b"e\x85R.",
            "more than 5000 keys that are neither text nor small numbers",
        ),
        (b"}N" + b"\x85q\0h\0\x86" * 60 + b"Ns.", "tuples in tuples in tuples as a key"),
        (b"}" + b"ctorch\nfloat32\nK\1K\2\x86\x86Ns.", "holds no tensors by name"),  # {(torch.float32, (1, 2)): None}
        (b"(" + COPIES["set"] + b"q\0](" + b"K\1" * 900 + b"eq\1" + b"h\0h\1\x85R" * 900 + b"t.", "copy the same values"),
        (
            b"(" + COPIES["encode"] + b"q\0" + text("x" * 9000) + text("latin1") + b"\x86q\1" + b"Rh\0h\1" * 9 + b"Rt.",
            "its calls copy the same text again and again",
        ),
        (COPIES["encode"] + text("x") + text("idna") + b"\x86R.", "a call of _codecs.encode with arguments"),
        (b"ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R.", "a call of torch.FloatStorage with arguments"),
        (b"](" + b"K\1" * 39_000 + b"e.", "holds no tensors by name"),  # the losses of a training
        (b"]" + b"}" * 20_001 + b".", "has more than 20000 instructions in its pickle"),
        (tensor_pickle((10**12,), (0,))[2:], r"claims shape \[1000000000000\], and the file holds 4 numbers"),
        (tensor_pickle((4,), (1,), names=("x" * 301,))[2:], "the name of a tensor has more than 300 characters"),
        (tensor_pickle((4,), (1,), names=("\x1b[2J",))[2:], r"a tensor called \\x1b\[2J"),
        (tensor_pickle((4,), (1,))[2:-1] + tensor_pickle((2,), (1,), storage="HalfStorage")[3:-2] + b"s.", "0 has two sizes"),
    ],
)
def test_pickles_that_torch_would_load_for_hours(
    code: bytes, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swin_deploy.models.checkpoints.pickle_scan.MOST_STEPS", 20_000)
    write_zip(tmp_path / "a.pth", {"a/data.pkl": b"\x80\2" + code, "a/data/0": bytes(16)})
    refused(tmp_path / "a.pth", sentence)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda data: data + b"\0", "its tensors end at"),
        (lambda data: data[:-1], "its tensors end at"),
        (lambda data: data[:-24] + bytes(8) + data[-16:], "storage 0 is cut off, or of another size"),
        (
            lambda data: data[:-24].replace(b"\x000q\1a.", b"\x001q\1a.") + data[-24:],
            "does not name those of its tensors",
        ),
        (
            lambda data: data[:148] + b"%06o\0 " % (sum(data[:148]) + 256 + sum(data[156:512])) + data[156:],
            "like a tar archive|damaged",
        ),
    ],
)
def test_legacy_files_hold_exactly_their_tensors(change: Callable[[bytes], bytes], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    write_legacy(path, tensor_pickle((4,), (1,), view=b"N"), bytes(16))
    refused(path, "and not those of a Swin")
    path.write_bytes(change(path.read_bytes()))
    refused(path, sentence)


def test_hostile_sizes_in_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refused(path, "cannot be read as safetensors")
    header = b'{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,8]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(path, "cannot be read as safetensors")
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    refused(path, "holds 0 tensors, and not those of a Swin")
    entry = '"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,%d]}'
    for entries, data, sentence in (
        (f"{entry % ('1,2', 8)},{entry % ('2,1', 8)}", 8, "the key a occurs twice"),
        (entry % ("0,9999999", 0), 0, r"a claims shape \[0, 9999999\], and is empty"),
        (entry % ("1," * 70 + "1", 4), 4, "not those of a Swin"),
        (entry.replace("a", "a" * 301, 1) % ("1", 4), 4, "a tensor called aaa.* names of up to 300 printable characters"),
        (",".join(f'"{i}":{{}}' for i in range(20_001)), 0, "holds 20001 tensors. Expected at most 20000"),
    ):
        header = f"{{{entries}}}".encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(data))
        refused(path, sentence)


@pytest.mark.parametrize(
    ("shape", "stride", "sentence"),
    [
        ((4,), (1,), "holds 1 tensors, and not those of a Swin"),  # a good file
        ((5,), (1,), r"claims shape \[5\], and the file holds 4 numbers for it. It is truncated or damaged"),
        ((2,), (4,), r"claims shape \[2\], and the file holds 4 numbers"),
        ((1 << 62, 1 << 62), (1 << 62, 1), "is truncated or damaged"),
        ((1 << 40,), (1,), "is truncated or damaged"),
        ((1 << 20,), (0,), r"claims shape \[1048576\], and the file holds 4 numbers"),  # one number, a million times
        ((0, 1 << 60), (1, 1), r"claims shape \[0, 1152921504606846976\], and is empty"),
        ((2, 2), (1,), "is truncated or damaged"),
        ((-1,), (1,), "is truncated or damaged"),
        ((2,), (-1,), "is truncated or damaged"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_sizes_in_a_pickle(
    shape: tuple[int, ...], stride: tuple[int, ...], sentence: str, legacy: bool, tmp_path: Path
) -> None:
    code = tensor_pickle(shape, stride, view=b"N" if legacy else b"")
    if legacy:
        write_legacy(tmp_path / "a.pth", code, bytes(16))
        refused(tmp_path / "a.pth", sentence)
    else:
        write_zip(tmp_path / "a.pth", {"a/data.pkl": code, "a/data/0": bytes(16)})
        refused(tmp_path / "a.pth", sentence)


def test_storages_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    write_zip(path, {"a/data.pkl": tensor_pickle((4,), (1,), key="1"), "a/data/0": bytes(16)})
    refused(path, "storage 1 has 16 bytes, and its record is missing.* is truncated or damaged")
    write_zip(path, {"a/data.pkl": tensor_pickle((4,), (1,)), "a/data/0": bytes(8), "a/data/1": bytes(32)})
    refused(path, "storage 0 has 16 bytes, and its record 8")  # the numbers of another tensor follow
    write_zip(path, {"a/data.pkl": tensor_pickle((4,), (1,), storage="QInt8Storage"), "a/data/0": bytes(16)})
    refused(path, r"asks for torch\.QInt8Storage")


def test_hdf5_that_reaches_out_of_its_file(tmp_path: Path) -> None:
    """HDF5 can store data in other files, link to them, and declare data that was never written."""
    path = tmp_path / "tf_model.h5"
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(4096))
    with h5py.File(path, "w") as file:
        file.create_dataset("a", (1024,), "f4", external=[(str(secret), 0, 4096)])
    refused(path, "a is stored in another file")
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout((16,), "f4")
        layout[:] = h5py.VirtualSource(str(secret), "a", (16,))
        file.create_virtual_dataset("a", layout)
    refused(path, "a is stored in another file")
    with h5py.File(path, "w") as file:
        file.create_dataset("a", (1 << 40,), "f4", chunks=(1 << 20,))
    refused(path, r"a claims shape \[1099511627776\], and the file holds 0 bytes for it")
    with h5py.File(path, "w") as file:
        file["a"] = h5py.ExternalLink(str(secret), "/")
        file["b"] = np.array(["text"], dtype=h5py.string_dtype())
    refused(path, "claims shape|holds 1 tensors, and not those of a Swin")
    with h5py.File(path, "w") as file:
        file.create_dataset("a", data=np.zeros(1 << 16, "f4"), compression="gzip")
    refused(path, r"a is compressed. Decompress the file: h5repack -f NONE tf_model.h5 FILE.h5")
    with h5py.File(path, "w") as file:
        file.create_group("g/" * 40)
    refused(path, "more than 32 groups in each other")


def test_weight_files_are_regular(tmp_path: Path) -> None:
    """A FIFO would block for ever, and a device never ends."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "shard"}}')
    os.mkfifo(tmp_path / "fifo")
    for target in (tmp_path / "fifo", Path("/dev/zero")):
        (tmp_path / "shard").symlink_to(target)
        for path in (tmp_path, tmp_path / "shard"):
            refused(path, "shard is not a regular file")
        (tmp_path / "shard").unlink()
    index.write_text('{"weight_map": {"a": "shard", "a": "shard"}}')
    refused(tmp_path, "the key a occurs twice")


def test_dictionaries_in_dictionaries_are_read_once(tmp_path: Path) -> None:
    """Ten references to each of twelve dictionaries are 10**12 paths; a list in a list 50,000 times overflows a stack."""
    bomb: Any = {"x": 1}
    for _ in range(12):
        bomb = {str(i): bomb for i in range(10)}
    itself: dict[str, Any] = {"x": 1}
    itself["itself"] = itself
    torch.save({"bomb": bomb, "itself": itself}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "holds no tensors by name")
    write_zip(tmp_path / "a.pth", {"a/data.pkl": b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * 50_000 + b"a" * 49_999 + b"s."})
    refused(tmp_path / "a.pth", "holds no tensors by name")
    torch.save({"model": state_dict(STRIP), "config": bomb, "args": itself}, tmp_path / "a.pth")
    assert open_weights(tmp_path / "a.pth").extras["args"] == {"x": 1, "itself": None}


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (1 << 40,)},
        {"shape": (-1, 3)},
        {"shape": "x"},
        {"kind": "O8"},
        {"kind": "V8"},
        {"data": b"abc"},
        {"data": None},
        {"data": (1 << 20,)},
    ],
)
def test_hostile_numpy_arrays(change: dict[str, Any], tmp_path: Path) -> None:
    given = {"shape": (2,), "kind": "f4", "data": bytes(8)} | change
    kind = Built(np.dtype, (given["kind"], False, True), (3, "<", None, None, None, -1, -1, 0))
    array = Built(np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, given["shape"], kind, False, given["data"]))
    torch.save({"patch_embed.proj.weight": array}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "cannot be read as what torch.save writes")
