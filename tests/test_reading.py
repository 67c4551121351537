"""Files of others: regular ones only, up to a limit, and one sentence about anything odd in them."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from swin_deploy import errors, files
from swin_deploy.bundle import TensorSpec
from swin_deploy.calib.data import samples_from
from swin_deploy.calib.labels import class_names, labels_from_file
from swin_deploy.cli.output import print_json, print_table
from swin_deploy.config import SwinConfig
from swin_deploy.errors import BundleError, CheckpointError, InputError, shown
from swin_deploy.files import json_file, json_from, read_arrays, read_regular
from swin_deploy.preprocess import Preprocessor
from swin_deploy.qat_ranges import QatRanges


def special(kind: str, folder: Path) -> Path:
    """Create a file that is not a regular one of at most 9 bytes."""
    path = folder / kind
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif kind == "loop":
        path.symlink_to(path)
    return {"device": Path("/dev/zero"), "proc": Path("/proc/self/status"), "NUL": folder / "a\0b"}.get(kind, path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("FIFO", "is not a regular file"),
        ("socket", "is not a regular file"),
        ("device", "is not a regular file"),
        ("folder", "is a folder"),
        ("missing", "does not exist"),
        ("loop", "cannot be read: Too many levels"),
        ("NUL", "cannot be read: "),
        ("sparse", "has more than 9 bytes"),
        ("proc", "has more than 9 bytes"),
    ],
)
def test_only_regular_files_of_a_limited_size_are_read(kind: str, said: str, tmp_path: Path) -> None:
    path = special(kind, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        read_regular(path, 9, CheckpointError, "Do that.", "The thing")
    assert str(caught.value).startswith(f"The thing {said}")
    assert str(caught.value).endswith(". Do that.")


def test_a_file_up_to_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"123456789")
    assert read_regular(tmp_path / "link", 9) == b"123456789"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "Expecting property name"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 66 + b"]" * 66, "nested too deeply"),
        (b'{"a":' * 66 + b"1" + b"}" * 66, "nested too deeply"),
        (b"[1, NaN]", "NaN is not a finite number"),
        (b"[-Infinity]", "-Infinity is not a finite number"),
        (b"1e400", "1e400 is not a finite number"),
        (b"1" * 21, "more than 20 digits"),
        (b"-" + b"1" * 5000, "more than 20 digits"),
        (b'{"a": 1, "b": 2, "\\u001b": 3, "\\u001b": 4}', "the key \\x1b occurs twice"),
        (b"[1,2,3,4,5,6,7]", "more than 5 values"),
    ],
)
def test_json_within_limits(text: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "JSON_VALUES", 5 if b"7" in text else 10**6)
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(InputError) as caught:
        json_file(tmp_path / "x.json")
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "x.json"))


def test_json_values_are_those_of_python() -> None:
    text = '\ufeff{"a": [1.5, -18446744073709551615, true, null], "\\ud800": {"ä": "\\u001b"}}'
    assert json_from(text.encode(), "x") == {"a": [1.5, -18446744073709551615, True, None], "\ud800": {"ä": "\x1b"}}


def test_foreign_text_in_messages() -> None:
    assert shown("a\x1b[2J\x9b\u202eb\n\ud800ä") == "a\\x1b[2J\\x9b\\u202eb\\n\\ud800ä"
    assert shown("x" * 1000) == "x" * 297 + "..."
    assert len(shown("\x1b" * 1000)) == 300
    assert shown([10**5000]) == "<list>"
    assert shown({"a": "\x1b"}) == "{'a': '\\x1b'}"
    error = errors.UsageError("two\nlines\x1b[2J" + "x" * 10_000)
    assert str(error).startswith("two\nlines\\x1b[2J")
    assert len(str(error)) < 8100


ARRAYS: dict[str, Any] = {
    "a": np.arange(6.0).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
    "text": np.array(["ab", "c"]),
    "scalar": np.float16(3),
    "empty": np.zeros((0, 3), bool),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_flipped_byte_of_an_archive_is_found(save: Callable[..., None], tmp_path: Path) -> None:
    """An archive with a flipped byte gives the arrays of numpy.load, or one sentence."""
    path = tmp_path / "x.npz"
    save(path, **ARRAYS)
    whole, refused = path.read_bytes(), []
    for place in range(-1, len(whole), 5):
        content = bytearray(whole)
        if place >= 0:
            content[place] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            found = read_arrays(path, 1000)
        except InputError as error:
            refused.append(str(error))
        else:
            assert found.keys() == ARRAYS.keys()
            assert all(np.array_equal(found[name], array) for name, array in ARRAYS.items())
    assert len(refused) > len(whole) // 5 * 0.6
    assert all(said.startswith(f"{path} cannot be read as a NumPy file (") for said in refused)
    assert not any("allow_pickle" in said for said in refused)


def npy(text: str, version: int = 1, length: int | None = None, data: bytes = bytes(8)) -> bytes:
    """Return an .npy file with this header."""
    size = len(text) if length is None else length
    return b"\x93NUMPY" + bytes([version, 0]) + size.to_bytes(2 if version == 1 else 4, "little") + text.encode() + data


def header(descr: str = "'<f4'", order: str = "False", shape: str = "(2,)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (npy(header(shape="(100000000000000000000000,)")), "too large"),
        (npy(header(shape="(100000000000000,)")), "needs 400000000000000 bytes, and it has 8"),
        (npy(header(shape="(3,)"), data=b""), "needs 12 bytes"),
        (npy(header(shape="(2, -1)")), "does not describe"),
        (npy(header(shape="(" + "1," * 40 + ")")), "too large"),
        (npy(header("'|O'")), "Python objects"),
        (npy(header("[('a', '<f4')]")), "does not describe"),
        (npy(header("'<f3'")), ""),
        (npy(header("'<M8[s]'")), "not one of numbers"),
        (npy(header("'<U99999999'")), "needs"),
        (npy(header("'<U999999999'")), "not understood"),
        (npy(header(order="1")), "does not describe"),
        (npy(header() + "9**9**9"), "does not describe"),
        (npy("(" * 5000), "does not describe"),
        (npy("{" + "-" * 9000 + "1}"), "does not describe"),
        (npy(header(), 2, 1 << 31), "the limit is 10000"),
        (npy(header(), 9), "does not start like"),
        (npy("", length=0), "does not describe"),
        (b"\x93NUMPY", "does not start like"),
    ],
)
def test_headers_of_arrays(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.npy cannot be read as a NumPy file") as caught:
        read_arrays(tmp_path / "x.npy", 100)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text", [header(), header("'<f4'").replace("'", '"'), header(shape="(2L,)"), header().replace(" ", "")]
)
def test_headers_of_other_programs(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(npy(text))
    assert np.array_equal(read_arrays(tmp_path / "x.npy", 100)[""], np.zeros(2, np.float32))


def archive(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip archive, without a warning about equal names."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as made:
        for name, content in members:
            made.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


ONE = npy(header())
DAMAGED = {
    "a bomb": (archive(("a.npy", npy(header(shape="(25000000,)"), data=bytes(10**8)))), "take 100000074 bytes, and the limit"),
    "another method": (archive(("a.npy", ONE), method=zipfile.ZIP_LZMA), "in a way that NumPy does not use"),
    "another version": (archive(("a.npy", ONE)).replace(b"PK\1\2\x14\3\x14", b"PK\1\2\x14\3\xff"), "zip file version"),
    "encryption": (archive(("a.npy", ONE)).replace(b"PK\3\4\x14\0\0", b"PK\3\4\x14\0\1"), "encrypted"),
    "too much data": (archive(("a.npy", ONE + b"12")), "more bytes than its shape needs"),
    "a huge directory": (b"x" * (5 << 20) + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 5 << 20, 0, 0), "its directory has"),
    "other text": (b"PK no archive", "not a zip file"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_archives_within_limits(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(DAMAGED[kind][0])
    with pytest.raises(InputError, match="cannot be read as a NumPy file") as caught:
        read_arrays(tmp_path / "x.npz", 1000)
    assert DAMAGED[kind][1] in str(caught.value)


ODD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    *(
        ({key: value}, f"{key}: expected")
        for key in ("embed_dim", "num_channels", "window_size", "image_size", "encoder_stride")
        for value in ("96", True, 96.5, {}, 1e300, 2**64, float("inf"), float("nan"))
    ),
    *(
        ({key: value}, key)
        for key in ("embed_dim", "num_channels", "window_size", "image_size", "patch_size")
        for value in (0, -1)
    ),
    *(
        ({key: value}, "is 1000001|contains 1000001")
        for key in ("embed_dim", "window_size", "image_size", "patch_size")
        for value in (1000001,)
    ),
    *(
        ({key: value}, key)
        for key in ("mlp_ratio", "layer_norm_eps")
        for value in ("4", True, 0, -1, 1e300, float("inf"), float("nan"), [[1]], {})
    ),
    *(
        ({key: value}, f"{key}: expected true or false")
        for key in ("qkv_bias", "use_absolute_embeddings")
        for value in ("no", 2, [])
    ),
    *(({key: [2] * 10**6}, f"{key}: expected a list of at most 100") for key in ("depths", "num_heads", "window_size")),
    ({"mlp_ratio": 1001.0}, "mlp_ratio must be above 0 and at most 1000"),
    ({"mlp_ratio": 0.001}, "mlp_ratio is too small for the width 96 of stage 0"),
    ({"depths": [1] * 17, "num_heads": [1] * 17}, "17 stages, and the limit is 16"),
    ({"depths": [1000, 1, 1, 1]}, "1003 blocks, and the limit is 1000"),
    ({"depths": "2262"}, "depths: expected a list"),
    ({"num_heads": [3, 6, 12, 25]}, "which 25 attention heads do not divide"),
    ({"num_heads": [0, 6, 12, 24]}, "which 0 attention heads do not divide"),
    ({"embed_dim": 60000}, r"describes a network of 1.26e\+13 parameters, and the limit is 2e\+10"),
    ({"num_channels": 1000000, "patch_size": 1000}, "parameters, and the limit is"),
    ({"window_size": 200}, "a window has 200x200 tokens, and the limit is 10000"),
    ({"window_size": 90, "image_size": 4096}, "attention has a bias or mask of .* values, and the limit is 1e"),
    ({"image_size": 30_000}, "an image has 56250000 patches, and the limit is 20000000"),
    ({"model_type": "swinv2", "image_size": 3}, "an image of 3x3 pixels is too small for stage 0"),
    ({"num_labels": 10**9}, "num_labels: expected 0 to 1000000, because each label gets a name"),
    ({"num_labels": -1}, "num_labels: expected 0"),
    ({"id2label": {"1000000000": "cat"}}, "id2label has labels for the classes 1000000000"),
    ({"id2label": {"x": "cat"}}, "invalid literal"),
    ({"id2label": 5}, "id2label: expected an object"),
    ({"out_features": ["stage1"] * 101}, "list of at most 100 names"),
    ({"model_type": "\x1b[2J" * 1000}, r"config.json: model_type '\\x1b\[2J"),
    ({"hidden_act": "\x1b" * 1000}, r'hidden_act is "\\x1b'),
    ({"hidden_act": ["gelu"]}, "hidden_act: expected text"),
    ({"semantics": "\x1b"}, r'framework is "\\x1b"'),
]


@pytest.mark.parametrize(("changes", "said"), ODD_CONFIGS)
def test_configs_within_limits(changes: dict[str, Any], said: str) -> None:
    raw = {"model_type": "swin", "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], **changes}
    with pytest.raises(CheckpointError, match=said) as caught:
        SwinConfig.from_dict(raw)
    assert len(str(caught.value)) < 1200
    assert "\x1b" not in str(caught.value)


def test_the_largest_published_configs_are_within_limits() -> None:
    giant = {"model_type": "swinv2", "embed_dim": 512, "depths": [2, 2, 42, 4], "num_heads": [16, 32, 64, 128]}
    assert SwinConfig.from_dict({**giant, "image_size": 1536, "window_size": 48, "num_labels": 21841}).hidden_size == 4096


BIG = {"height": 30000, "width": 30000}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"crop_size": BIG, "do_center_crop": True}, "at most 44739242 pixels for 3 channels"),
        ({"size": BIG}, "at most 44739242 pixels"),
        ({"size": {"shortest_edge": 10**6}}, "at most 44739242 pixels"),
        ({"size": 2**64}, "Expected a positive whole number"),
        ({"size": 224.0}, "Expected a positive whole number"),
        ({"resample": 3.0}, "Expected a Pillow filter"),
        ({"resample": True}, "Expected a Pillow filter"),
        ({"rescale_factor": 1e300}, "Expected a finite number"),
        ({"image_mean": [float("nan")] * 3}, "Expected three finite numbers"),
        ({"image_mean": [0.5] * 20_000, "image_std": [0.5] * 20_000}, "Expected at most 10000"),
        ({"image_std": [0, 1, 1]}, "above 0"),
        ({"image_std": 1e-40}, "above 0"),
        ({"crop_pct": 1e-320}, "a number from 0.01 to 100"),
        ({"crop_fill": [0.5] * 3}, "a number from 0 to 255"),
        ({"image_processor_type": "\x1b[2J" * 999}, r"names \\x1b\[2J"),
        ({"keep_ratio": "\x1b" * 999}, r"Invalid keep_ratio: '\\x1b"),
    ],
)
def test_preprocessing_within_limits(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Preprocessor.from_dict(changes)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("size", "channels", "frames", "said"),
    [
        ((1, 3000), 3, 1, "would be resized from 3000x1 to 672000x224 pixels"),
        ((200, 200), 3, 1, "more pixels than PIL.Image.MAX_IMAGE_PIXELS"),
        ((100, 100), 20, 20, "more pixels than PIL.Image.MAX_IMAGE_PIXELS"),
        ((8, 8), 4, 5, "has mode [LP] with 1 channel, and this network expects 4"),
    ],
)
def test_images_within_limits(
    size: tuple[int, int], channels: int, frames: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    pictures = [Image.new("L", size, shade) for shade in range(frames)]
    pictures[0].save(tmp_path / "x.gif", save_all=True, append_images=pictures[1:])
    prepare = Preprocessor(shortest_edge=224, image_mean=(0.5,) * channels, image_std=(0.5,) * channels)
    with pytest.raises(InputError, match=said):
        prepare(tmp_path / "x.gif")


NAMES = {
    ".txt": (b"a\n" * 1_000_001, "more than 1000000 lines"),
    ".csv": (b'id,name\n0,"' + b"a" * 200_000 + b'"\n', "field larger than field limit"),
    ".tsv": (b"name\tid\n\x1b\n", "fewer columns than the first one"),
    ".json": (b'{"1000000000": "cat"}', "labels for another number of classes"),
    ".names": (b"\xff\xfe", "not UTF-8 text"),
}


@pytest.mark.parametrize("suffix", NAMES)
def test_label_files_within_limits(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"labels{suffix}"
    path.write_bytes(NAMES[suffix][0])
    with pytest.raises(InputError, match=NAMES[suffix][1]):
        class_names(str(path), 3)
    if suffix == ".csv":
        with pytest.raises(InputError, match="field larger than field limit"):
            labels_from_file(path, ["a"])


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (5, "Invalid classifier: 5. Expected an object"),
        ({"input": {"scale": 0.1, "zero_point": 256, "amplitude": 1}}, "zero_point from 0 to 255"),
        ({"output": {"scale": "0.1", "zero_point": 0, "amplitude": 1}}, "Invalid output of classifier"),
        ({"output": {"scale": 1e39, "zero_point": 0, "amplitude": 1}}, "Invalid output of classifier"),
        ({"weight": []}, "Expected a list of numbers"),
        ({"weight": [1, None]}, "Expected a list of numbers"),
        ({"weight": [0.1, 0.2]}, "Invalid weight of classifier: 2 scales. Expected one, or 3"),
    ],
)
def test_ranges_within_limits(layer: Any, said: str) -> None:
    with pytest.raises(BundleError, match=said):
        QatRanges.from_dict({"layers": {"classifier": layer}}).weight_of("classifier", 3, SwinConfig(2))


def test_a_damaged_archive_of_samples_is_refused(tmp_path: Path) -> None:
    """The samples are streamed, so the checksum is known after the last one."""
    path, inputs = tmp_path / "x.npz", (TensorSpec("pixel_values", "float32", ("batch", 3, 8, 8)),)
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    np.savez(path, images=images)
    path.write_bytes(path.read_bytes().replace(images[3].tobytes()[:8], bytes(8)))
    with pytest.raises(InputError, match="Bad CRC-32"):
        list(samples_from(path, Preprocessor(size=(8, 8)), inputs).batches(2))
    np.savez(path, images=np.arange(10_000_000, dtype=np.uint8).reshape(2, 1000, 1000, 5)[..., :3])
    assert len(samples_from(path, Preprocessor(size=(8, 8)), inputs)) == 2  # a sample is larger than a directory may be
    np.savez_compressed(path, images=np.zeros((20_000_000, 1, 1), np.uint8))
    with pytest.raises(InputError, match=r"has 20000000 samples of 1 bytes\. Expected at most 10000000 samples"):
        samples_from(path, Preprocessor(size=(8, 8)), inputs)


def test_foreign_text_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    label = "\x1b[2J\x9b\u202eä" + "x" * 400
    print_json({"label": label})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"label": label}
    assert "\\u001b[2J\\u009b\\u202eä" in printed
    print_table(("label",), [("\x1b[2J" + "x" * 400,)])
    assert capsys.readouterr().out.splitlines()[1] == "\\x1b[2J" + "x" * 290 + "..."
