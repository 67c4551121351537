"""Changes one input at random: bytes, JSON, zip archives, NumPy files, pickles, HDF5, protobuf and lines of text."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import pickle
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ESC = "\x1b[2J\x1b]0;title\x07"
DEEP = "@deep@"  # stands for 100,000 nested lists, which json.dumps cannot write
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e-310, 1e308, -1e308, math.nan, math.inf, -math.inf, 255, 65_536),
    *(10**6, 10**9, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30, 10**400, "", " ", "x", "1", "0.5", "nan", "1e309"),
    *("../victim/v.onnx", "../../victim/v.onnx", "/etc/passwd", "/dev/zero", "..", ".", "a\\b", "a/../../b", "a\0b", ESC),
    *(
        "\ud800",
        "a\u202eb",
        "\u0660",
        "é" * 300,
        "x" * 100_000,
        "line\nline",
        [],
        {},
        [[]],
        [{}],
        [None],
        [1],
        [0, 0],
        [1, 2, 3],
    ),
    *([-1, -1], [math.nan] * 3, ["a"], [0] * 10_000, {"": ""}, {"a": {"a": {"a": 1}}}, {str(n): n for n in range(5_000)}, DEEP),
    [[[[[[[[[[1]]]]]]]]]],
)
INTEGERS = (
    *(0, 1, 2, 3, 4, 7, 8, 16, 127, 128, 255, 256, 32_767, 65_535),
    *(2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1),
)


def changed_bytes(rng: random.Random, data: bytes, hot: Sequence[tuple[int, int]] = ()) -> tuple[bytes, str]:
    """Change a file in one to three places, half of them in the ranges `hot`, such as its headers."""
    changed, done = bytearray(data), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        first, end = rng.choice(hot) if hot and rng.random() < 0.5 else (0, len(changed))
        at = rng.randrange(first, max(end, first + 1)) if len(changed) else 0
        size = rng.choice((1, 2, 8, 64, 512, 2048, 5000))
        how = rng.choice(("flip", "flip", "set", "zeros", "cut", "remove", "insert", "repeat", "integer", "swap"))
        if how == "flip":
            for _ in range(rng.choice((1, 1, 4, 16))):
                place = min(at + rng.randrange(8), len(changed) - 1)
                if place >= 0:
                    changed[place] ^= 1 << rng.randrange(8)
        elif how == "set":
            changed[at : at + 1] = bytes([rng.choice((0, 1, 127, 128, 255, 10, 34, 92, rng.randrange(256)))])
        elif how == "zeros":
            changed[at : at + size] = bytes(len(changed[at : at + size]))
        elif how == "cut":
            del changed[at:]
        elif how == "remove":
            del changed[at : at + size]
        elif how == "insert":
            changed[at:at] = rng.choice((rng.randbytes(size), bytes(size), b"\xff" * size))
        elif how == "repeat":
            changed[at:at] = changed[at : at + size]
        elif how == "integer":
            width, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
            changed[at : at + width] = (rng.choice(INTEGERS) % (1 << 8 * width)).to_bytes(width, order)  # type: ignore[arg-type]
        else:
            other = rng.randrange(max(len(changed), 1))
            one, two = bytes(changed[at : at + size]), bytes(changed[other : other + size])
            changed[at : at + len(two)], changed[other : other + len(one)] = two, one
        done.append(f"{how} {size} at {at} of {len(data)}")
    return bytes(changed), ", ".join(done)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in entries:
        yield (*path, key)
        yield from places(inside, (*path, key))


def changed_json(rng: random.Random, value: Any, odd: Sequence[Any] = ODD) -> tuple[Any, str]:
    """Change one to three values, keys or containers of a JSON value."""
    value, done = copy.deepcopy(value), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(places(value))
        if not found:
            return rng.choice(odd), "another value"
        path = rng.choice(found)
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        key, old = path[-1], holder[path[-1]]
        how = rng.choice(("odd", "odd", "odd", "odd", "remove", "scale", "rename", "add", "copy", "wrap"))
        if how == "remove":
            del holder[key]
        elif how == "scale" and isinstance(old, int | float) and not isinstance(old, bool):
            holder[key] = rng.choice(
                (-old, old + 1, old - 1, old * 2, old * 1000, old * 10**12, old / 2, str(old), [old], old // 3)
            )
        elif how == "rename" and isinstance(holder, dict):
            escapes = ("../victim/v.onnx", f"onnx/../../victim/v{Path(str(key)).suffix}", ESC, "a\0b", f"/{key}", f"./{key}")
            new = rng.choice((f"{key}x", "", str(key).upper(), *escapes, "x" * 5000, "onnx", "manifest.json", "é"))
            holder[new] = holder.pop(key)
        elif how == "add":
            new = rng.choice(odd)
            if isinstance(holder, dict):
                holder[rng.choice(("extra", "__class__", "", "1"))] = new
            else:
                holder.insert(rng.randrange(len(holder) + 1), new)
        elif how == "copy":
            source = value
            for part in rng.choice(found)[: rng.choice((1, 2, 9))]:
                source = source[part] if isinstance(source, dict | list) and _has(source, part) else source
            holder[key] = copy.deepcopy(source)
        elif how == "wrap":
            holder[key] = rng.choice(([old], {"a": old}, [old, old], str(old)[:1000]))
        else:
            holder[key] = rng.choice(odd)
        done.append(
            f"{how} {'/'.join(map(str, path))[:200]} = {str(holder.get(key) if isinstance(holder, dict) else '')[:80]!a}"
        )
    return value, ", ".join(done)


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else isinstance(key, int) and key < len(holder)


def json_text(value: Any, **options: Any) -> str:
    """Return JSON text. DEEP becomes lists deeper than Python's limit."""
    return json.dumps(value, **options).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)


def changed_json_file(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Change the content of a JSON file, and now and then its bytes."""
    if rng.random() < 0.15:
        return rng.choice(
            (b"", b"null", b"[]", b'"x"', b"\xff\xfe{}", b"{" * 10**6, b'{"a":' * 10**5, b"9" * 10**5)
        ), "whole file"
    if rng.random() < 0.2:
        return changed_bytes(rng, data)
    value, done = changed_json(rng, json.loads(data))
    return json_text(value).encode("utf-8", "surrogatepass"), done


def changed_manifest(rng: random.Random, folder: Path) -> str:
    """Change the manifest of a bundle, and compute its digest again."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if rng.random() < 0.25:  # file names deserve more than their share
        files = manifest["files"]
        old = rng.choice(sorted(files))
        suffix = Path(old).suffix
        outside = (f"onnx/../../victim/v{suffix}", f"../victim/v{suffix}", f"/tmp/{old}", f"link/v{suffix}", f"onnx\\{old}")
        inside = (f"./{old}", f"{old}\0", old.upper(), "manifest.json", "onnx", "", ESC, f"{old}/", f"a//{old}", "v" * 300)
        new = rng.choice((*outside, *inside, "onnx/model_int8.onnx"))
        files[new] = files.pop(old) if rng.random() < 0.7 else dict(files[old])
        changed, done = manifest, f"key {old} -> {new[:80]!a}"
    else:
        changed, done = changed_json(rng, manifest)
    write_manifest(folder, changed)
    return done


def write_manifest(folder: Path, manifest: Any) -> None:
    """Write a manifest with its digest, whatever is in it."""
    text = "null"
    if isinstance(manifest, dict):
        manifest.pop("sha256", None)
        digest = hashlib.sha256(json_text(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        text = json_text({**manifest, "sha256": digest}, indent=2)
    (folder / "manifest.json").write_text(text + "\n")


def recorded(folder: Path, file: str) -> None:
    """Write the size and the sha256 that a file has now into the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / file).read_bytes()
    manifest["files"][file] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_manifest(folder, manifest)


def changed_safetensors(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Change a safetensors file: its bytes, the length of its header, or what the header says."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + size], data[8 + size :]
    how = rng.random()
    if how < 0.4:
        return changed_bytes(rng, data, [(0, 8), (8, 8 + size)])
    if how < 0.5:
        length = rng.choice((*INTEGERS, size + 1, size - 1, len(data)))
        return struct.pack("<Q", length % 2**64) + data[8:], f"header of {length} bytes"
    parsed = json.loads(header)
    odd = (
        *ODD,
        "F32",
        "F16",
        "BF16",
        "F64",
        "I64",
        "BOOL",
        "F8_E4M3",
        "C64",
        "F4",
        [0, 0],
        [0, len(body)],
        [-1, 1],
        [2**62, 4],
    )
    value, done = changed_json(rng, parsed, odd)
    text = json_text(value).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body, done


def changed_zip(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Change the headers of a zip archive: a local one, a central one or the end."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
    starts = [(entry.header_offset, 30 + len(entry.filename)) for entry in entries]
    at, central = data.rfind(b"PK\x05\x06"), []
    place = struct.unpack("<L", data[at + 16 : at + 20])[0]
    for _ in entries:
        central.append((place, 46))
        place += 46 + sum(struct.unpack("<3H", data[place + 28 : place + 34]))
    first, size = rng.choice((rng.choice(starts), rng.choice(central), rng.choice(central), (at, 22)))
    changed = bytearray(data)
    width = rng.choice((1, 2, 2, 4, 4))
    field = first + 4 + rng.randrange(size - 4)
    changed[field : field + width] = (rng.choice(INTEGERS) % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(changed), f"zip header {first}, byte {field - first}"


def zip_of(entries: Mapping[str, bytes] | Sequence[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items() if isinstance(entries, Mapping) else entries:
            archive.writestr(name, content)
    return buffer.getvalue()


def entries_of(data: bytes) -> dict[str, bytes]:
    """Return the entries of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def changed_entries(
    rng: random.Random, data: bytes, change: Callable[[random.Random, str, bytes], tuple[bytes, str]]
) -> tuple[bytes, str]:
    """Change one entry of a zip archive with `change`, and write the archive again with right checksums."""
    entries = entries_of(data)
    name = rng.choice(sorted(entries))
    how = rng.random()
    if how < 0.75:
        entries[name], done = change(rng, name, entries[name])
        done = f"{name}: {done}"
    elif how < 0.85:
        done = f"{name} left out"
        del entries[name]
    else:
        new = rng.choice((name.upper(), f"../{name}", f"{name}.py", "x/data.pkl", "a/../data.pkl", ESC, "é/data/0", f"/{name}"))
        entries[new] = entries.pop(name) if rng.random() < 0.5 else entries[name]
        done = f"{name} -> {new!a}"
    return zip_of(entries, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))), done


ODD_SHAPES = (
    *(
        f"({10**23},)",
        "(-1,)",
        "(0,)",
        "()",
        "(2**40,)",
        "(1099511627776,)",
        "(3, 1073741824, 1073741824)",
        "(True,)",
        "(1.5,)",
    ),
    *(
        "('a',)",
        "[2, 3]",
        "None",
        "(4294967296, 4294967296)",
        "(1,)" * 300,
        "(" * 2000 + ")" * 2000,
        "(0, 1152921504606846976)",
    ),
)
ODD_TYPES = (
    *("'<f4'", "'|O'", "'<U1000000000'", "'|V9'", "'<f8'", "'>f2'", "'<M8[s]'", "'|S0'", "[('a', '<f4')]", "'x'", "3", "None"),
    *("'<c16'", "'|b1'", "'<U5'", "[('a', '|O')]", "'<f16'", "('<f4', (1000, 1000, 1000))", f"'{ESC}'"),
)


def changed_npy(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Change a .npy file: its bytes, or the type, the shape and the order in its header."""
    if rng.random() < 0.4 or data[:6] != b"\x93NUMPY":
        return changed_bytes(rng, data, [(0, 128)])
    size = struct.unpack("<H", data[8:10])[0]
    header = eval(data[10 : 10 + size].decode("latin-1"), {"__builtins__": {}})
    shape, kind = repr(header["shape"]), repr(header["descr"])
    if rng.random() < 0.6:
        shape = rng.choice(ODD_SHAPES)
    if rng.random() < 0.5:
        kind = rng.choice(ODD_TYPES)
    order = rng.choice(("False", "False", "False", "True", "1", "None"))
    text = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}"
    if rng.random() < 0.1:
        text = rng.choice(("{}", "", "__import__('os').system('id')", "{'descr': '<f4'}", "[" * 5000, "1" * 20_000, "\0"))
    encoded = text.encode("utf-8") + b"\n"
    version = rng.choice(((1, 0), (1, 0), (2, 0), (3, 0), (9, 9)))
    length = struct.pack("<H" if version == (1, 0) else "<I", rng.choice((len(encoded), len(encoded), len(encoded), 65_535)))
    return b"\x93NUMPY" + bytes(version) + length + encoded + data[10 + size :], f"header {version} {text[:150]}"


def changed_npz(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Change a .npz file: its bytes, the headers of its archive, or one of its arrays."""
    how = rng.random()
    if how < 0.25:
        return changed_bytes(rng, data)
    if how < 0.5:
        return changed_zip(rng, data)
    return changed_entries(rng, data, lambda rng, name, content: changed_npy(rng, content))


NAMES = [
    name.replace(" ", "\n").encode()
    for name in """os system,builtins eval,builtins bytearray,torch ByteTensor,torch._utils _rebuild_tensor_v2,torch Size,é é,
    a.b C,collections OrderedDict,collections Counter,builtins set,argparse Namespace,numpy.core.multiarray _reconstruct,
    numpy dtype,torch FloatStorage,torch.nn.modules.linear Linear,yacs.config CfgNode,builtins range,collections deque,
    torch.nn.parameter Parameter,torch._utils _rebuild_parameter,torch float32,torch device,torch.storage UntypedStorage,
    _codecs encode,datetime datetime,functools partial,builtins frozenset,pathlib PosixPath""".replace("\n    ", "").split(",")
]
# fmt: off
SNIPPETS = (
    b"N", b"}", b"]", b")", b"(", b"0", b"2", b"1", b"a", b"s", b"u", b"e", b"t", b"\x85", b"\x86", b"\x87", b"R", b"b", b"Q",
    b"q\x00", b"h\x00", b"\x88", b"K\x01", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 8 + b"\x00", b"X\x01\0\0\0a", b".",
    b"\x81", b"\x80\x02", b"X\xff\xff\xff\x7fa", b"r\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f", b"U\x03abc", b"]q\x01h\x01a",
    b"}q\x02X\x01\0\0\0ah\x02s", b"h\x01h\x01\x86", b"\x91", b"\x8f", b"\x90", b"B\x03\0\0\0abc", b"I999\n",
    b"G\x7f\xf0\0\0\0\0\0\0",
)
# fmt: on


def changed_pickle(rng: random.Random, code: bytes) -> tuple[bytes, str]:
    """Change the instructions of a pickle in one to three places."""
    try:
        parsed = [(op, argument, at or 0) for op, argument, at in pickletools.genops(code)]
    except Exception:  # noqa: BLE001 - it is damaged by then
        return changed_bytes(rng, code)
    ends = [at for _, _, at in parsed[1:]] + [len(code)]
    parts = [code[at:end] for (_, _, at), end in zip(parsed, ends, strict=True)]
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(parts))
        op = parsed[at][0].name if at < len(parsed) else ""
        how = rng.choice(("remove", "repeat", "insert", "argument", "argument", "argument", "swap", "bytes"))
        if how == "remove":
            del parts[at]
        elif how == "repeat":
            parts[at:at] = [parts[at]] * rng.choice((1, 2, 1000))
        elif how == "insert":
            parts.insert(at, b"".join(rng.choices(SNIPPETS, k=rng.choice((1, 2, 5)))))
        elif how == "swap":
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif how == "bytes":
            parts[at] = changed_bytes(rng, parts[at])[0]
        else:
            parts[at] = _other_argument(rng, op, parts[at])
        done.append(f"{how} {op} {at}")
        if not parts:
            break
    return b"".join(parts), ", ".join(done)


def _other_argument(rng: random.Random, op: str, part: bytes) -> bytes:
    """Return an instruction of the same kind with another argument."""
    if op == "GLOBAL":
        return global_code(rng.choice(NAMES))
    if "INT" in op or "LONG" in op:
        return pickle.dumps(rng.choice((*INTEGERS, -1, -(2**63), 2**61 - 1, 10**300)), 2)[2:-1]
    if "UNICODE" in op:
        texts = ("", "cpu", "cuda:0", "meta", "0", "1", "../0", "weight", "x" * 10_000, ESC, "a\0b", "é", "model", "state_dict")
        return text_code(rng.choice(texts))
    if op in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT"):
        return rng.choice(SNIPPETS)
    return part


def long_integer(value: int) -> bytes:
    """Return the instruction that pushes an integer."""
    return pickle.dumps(value, 2)[2:-1]


def text_code(text: str) -> bytes:
    """Return the instruction that pushes a text."""
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def global_code(name: bytes) -> bytes:
    """Return the instruction that names a class or a function, "module\\nname"."""
    return b"c" + name + b"\n"


PRIME = (1 << 61) - 1  # integers that are equal modulo this number have the same hash


def hostile_pickle(rng: random.Random) -> tuple[bytes, str]:
    """Return a pickle that asks for time, memory or code, of a random kind and size."""
    count, rounds = rng.choice((10, 1000, 20_000, 100_000)), rng.choice((10, 40, 200))
    some, name = min(count, 5000), rng.choice(NAMES)
    keys = [long_integer(k * PRIME) for k in range(1, min(count, 50_000))]
    numbers, pairs = b"".join(keys), b"N".join([*keys, b""])
    memo = b"".join(b"](h" + bytes([n]) + b"h" + bytes([n]) + b"eq" + bytes([n + 1]) for n in range(rounds))
    encoded = rng.choice(("latin1", "zlib", "rot13"))
    codes = {
        "colliding keys": b"}(" + pairs + b"u",
        "colliding set": global_code(b"builtins\nset") + b"](" + numbers + b"e\x85R",
        "colliding counter": global_code(b"collections\nCounter") + b"](" + numbers + b"e\x85R",
        "colliding tuples": b"}(" + b"\x85N".join([*keys, b""]) + b"u",
        "colliding ordered": global_code(b"collections\nOrderedDict") + b")R(" + pairs + b"u",
        "memo bomb": b"]q\x00K\x01a" + memo,
        "nested": b"]" * count + b"a" * (count - 1),
        "repeated keys": b"}K\x01" + b"2\x86" * rounds + b"Ns",
        "long text": b"}" + text_code("x" * (count * 100)) + b"Ns",
        "long integer": b"\x8b" + struct.pack("<i", count) + b"\x7f" * count,
        "memo": b"N" + b"".join(b"r" + struct.pack("<I", n * 1000) for n in range(1, min(count, 1000))) + b"Nr\xff\xff\xff\x7f",
        "marks": b"(" * count + b"t" * rng.choice((1, count)),
        "lists": b"](" + b"]" * count + b"e",
        "names": b"}(" + b"".join(text_code(f"{n:06d}") + b"N" for n in range(count)) + b"u",
        "calls": b"](" + (global_code(name) + b")R") * some + b"e",
        "recursion": b"}q\x01X\x01\0\0\0ah\x01sX\x01\0\0\0b]q\x02h\x02ah\x01as",
        "build": global_code(b"argparse\nNamespace") + b")\x81" + b"}X\x01\0\0\0aNsb" * some,
        "encode": global_code(b"_codecs\nencode") + text_code("abc") + text_code(encoded) + b"\x86R",
        "size": global_code(b"torch\nSize") + b"(" + long_integer(10**6) * some + b"t\x85R",
    }
    kind = rng.choice(list(codes))
    code = codes[kind]
    if rng.random() < 0.5:
        code = b"}(" + text_code("model") + code + text_code("a") + b"Nu"
    return b"\x80\x02" + code + b".", f"{kind} {count}"


def changed_lines(rng: random.Random, text: str) -> tuple[bytes, str]:
    """Change a text file of lines, such as CSV: fields, quotes, line ends and encoding."""
    lines, done = text.split("\n"), []
    odd = (
        *("", ",", '"', '""', '"a', 'a"b', "'", "\0", ESC, "x" * 140_000, ",".join("abc" * 5000), "é", "\u2028", "-1", "1e309"),
        *(
            "nan",
            "999999999999",
            "\r",
            "\t\t",
            "a,b,c,d,e",
            "../victim/v.png",
            "/etc/passwd",
            "#",
            "\ufeff",
            "1" * 5000,
            "True",
        ),
        *('"' + "x" * 140_000 + '"', "[1", "1 2 3"),
    )
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        how = rng.choice(("line", "field", "field", "remove", "repeat", "insert", "character"))
        if how == "line":
            lines[at] = rng.choice(odd)
        elif how == "field":
            fields = lines[at].split(",")
            fields[rng.randrange(len(fields))] = rng.choice(odd)
            lines[at] = ",".join(fields)
        elif how == "remove" and len(lines) > 1:
            del lines[at]
        elif how == "repeat":
            lines[at:at] = [lines[at]] * rng.choice((1, 1000, 100_000))
        elif how == "character":
            place = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:place] + rng.choice('",\0;\t\r\x1b') + lines[at][place + rng.randrange(2) :]
        else:
            lines.insert(at, rng.choice(odd))
        done.append(f"{how} {at}")
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"))
    end = rng.choice(("\n", "\n", "\r\n", "\r"))
    return end.join(lines).encode(encoding, "replace"), f"{', '.join(done)} in {encoding}"


def changed_message(rng: random.Random, message: Any) -> str:
    """Change one field of a protobuf message, somewhere inside."""
    reached = [message]
    while True:
        inside = []
        for field, value in reached[-1].ListFields():
            if field.message_type is not None:
                inside += list(value) if field.is_repeated else [value]
        if not inside or (len(reached) > 1 and rng.random() < 0.25):
            break
        reached.append(rng.choice(inside))
    target = reached[-1]
    field = rng.choice(target.DESCRIPTOR.fields)
    where = f"{target.DESCRIPTOR.name}.{field.name}"
    kinds = {field.CPPTYPE_STRING: _odd_text, field.CPPTYPE_FLOAT: _odd_float, field.CPPTYPE_DOUBLE: _odd_float}
    repeated = field.is_repeated
    if field.message_type is not None:
        held = getattr(target, field.name)
        if rng.random() < 0.3:
            target.ClearField(field.name)
        elif not repeated:
            held.SetInParent()
        elif held and rng.random() < 0.7:
            one = held[rng.randrange(len(held))]
            held.extend([one] * rng.choice((1, 1, 2000)))
        else:
            held.add()
        return where
    value = kinds.get(field.cpp_type, _odd_integer)(rng, field)
    if repeated:
        held = getattr(target, field.name)
        if held and rng.random() < 0.7:
            held[rng.randrange(len(held))] = value
        else:
            held.extend([value] * rng.choice((1, 1, 9, 1000)))
    else:
        setattr(target, field.name, value)
    return f"{where} = {str(value)[:80]!a}"


def _odd_text(rng: random.Random, field: Any) -> Any:
    words = (
        "pixel_values logits x If Loop Scan Where Conv Resize NonMaxSuppression QuantizeLinear com.microsoft ai.onnx.ml batch"
    )
    words += " Constant Range ConstantOfShape Tile Expand Gather Reshape Attention location offset 18446744073709551615 -1"
    names = (*words.split(), "", "../victim/v.onnx_data", "/etc/passwd", "a\0b", ESC, "x" * 50_000)
    text = rng.choice(names)
    return rng.choice((text.encode(), rng.randbytes(9), b"")) if field.type == field.TYPE_BYTES else text


def _odd_float(rng: random.Random, field: Any) -> float:
    return rng.choice((0.0, -1.0, 1e38, -1e38, math.nan, math.inf, 1e-45))


def _odd_integer(rng: random.Random, field: Any) -> Any:
    if field.cpp_type == field.CPPTYPE_ENUM:
        return rng.choice(list(field.enum_type.values_by_number))
    signed = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
    wide = field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64)
    limit = 2 ** ((64 if wide else 32) - signed)
    low = -limit if signed else 0
    return rng.choice([n for n in (*INTEGERS, -1, -2, -(2**31), -(2**63), 10**6, 10**9, 1000, 17, 21, 22) if low <= n < limit])


def png_of(width: int, height: int, kind: int = 2, rows: bytes = b"", extra: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """Return a PNG file with any dimensions in its header."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)),
        *extra,
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body
