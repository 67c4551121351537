"""The preprocessor equals that of transformers, bit for bit, on photographs and on awkward images."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from awkward_images import awkward_images, without_transparency
from PIL import Image, ImageOps

from swin_deploy.config import SwinConfig
from swin_deploy.errors import InputError, MissingDependencyError
from swin_deploy.exporters.checkpoint_from_request import preprocessing_of
from swin_deploy.models.checkpoints import Checkpoint
from swin_deploy.options import ExportSpec
from swin_deploy.preprocess import Preprocessor, read_image

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CONFIGS: dict[str, dict[str, Any]] = {
    "class defaults": {},
    "feature extractor 224": {"feature_extractor_type": "ViTFeatureExtractor", "resample": 3, "size": 224, **IMAGENET},
    "bicubic 256": {"resample": 3, "size": {"height": 256, "width": 256}, **IMAGENET},
    "bilinear 384": {"resample": 2, "size": [384, 384], **IMAGENET},
    "rectangle 192x160": {"resample": 3, "size": {"height": 192, "width": 160}, **IMAGENET},
    "shortest edge and crop": {
        "resample": 3,
        "size": {"shortest_edge": 256},
        "do_center_crop": True,
        "crop_size": 224,
        **IMAGENET,
    },
    "crop that pads": {"size": 100, "do_center_crop": True, "crop_size": {"height": 133, "width": 60}},
    "crop without resize": {"do_resize": False, "do_center_crop": True, "crop_size": [97, 130], **IMAGENET},
    "no rescale": {"do_rescale": False, "image_mean": [127.5, 127.5, 127.5], "image_std": [127.5, 127.0, 126.5]},
    "no normalize": {"do_normalize": False, "resample": 3},
    "other scale": {"rescale_factor": 1 / 127.5, "image_mean": 1, "image_std": 1.0},
    "convert rgb": {"do_convert_rgb": True, "resample": 3, **IMAGENET},
    "nulls": {"do_resize": None, "do_rescale": None, "do_convert_rgb": None, "do_center_crop": True, "crop_size": 90},
    "stale keys": {"_name_or_path": "x", "processor_class": "y", "feature_extractor_type": "ViTFeatureExtractor"},
}


def reference(config: dict[str, Any], image: Any, **kwargs: Any) -> np.ndarray:
    transformers = pytest.importorskip("transformers")
    processor = transformers.ViTImageProcessorPil.from_dict(dict(config))
    return processor(image, return_tensors="np", **kwargs)["pixel_values"]


def same(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    assert got.shape == expected.shape
    assert np.array_equal(got, expected.astype(np.float32))


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    datasets = pytest.importorskip("sklearn.datasets")
    return [np.array(image) for image in datasets.load_sample_images().images]  # 427x640, china and flower


@pytest.fixture(scope="module")
def odd(photos: list[np.ndarray]) -> dict[str, Image.Image]:
    """RGB images of awkward sizes."""
    china = Image.fromarray(photos[0])
    return {
        "portrait": Image.fromarray(photos[1]).crop((200, 0, 371, 427)),
        "one pixel": china.crop((5, 5, 6, 6)),
        "tiny": china.crop((0, 0, 3, 2)),
        "very wide": china.resize((4000, 3)),
        "very tall": china.resize((2, 900)),
        "exact": china.resize((224, 224)),
    }


@pytest.fixture(scope="module")
def modes(photos: list[np.ndarray]) -> dict[str, Image.Image]:
    """One photograph in every mode of image files, with an alpha channel if the mode has one."""
    photo = Image.fromarray(photos[1]).resize((160, 107))
    alpha = Image.fromarray(photos[0]).convert("L").resize(photo.size)
    rgba, la = photo.copy(), photo.convert("L")
    rgba.putalpha(alpha)
    la.putalpha(alpha)
    palette = photo.quantize(64)
    palette.info["transparency"] = bytes(range(0, 256, 4))
    keyed = photo.copy()
    keyed.info["transparency"] = keyed.getpixel((10, 10))
    return {
        "RGBA": rgba,
        "LA": la,
        "P": photo.quantize(64),
        "P with transparency": palette,
        "RGB with transparency": keyed,
        "L": photo.convert("L"),
        "1": photo.convert("1"),
        "CMYK": photo.convert("CMYK"),
        "YCbCr": photo.convert("YCbCr"),
    }


MODES = ["RGBA", "LA", "P", "P with transparency", "RGB with transparency", "L", "1", "CMYK", "YCbCr"]


@pytest.mark.parametrize("name", CONFIGS)
def test_photographs_are_bit_identical(name: str, photos: list[np.ndarray]) -> None:
    images = [Image.fromarray(photo) for photo in photos]
    expected = reference(CONFIGS[name], images)
    preprocessor = Preprocessor.from_dict(CONFIGS[name])
    same(preprocessor(images), expected)
    same(preprocessor(photos), expected)
    same(preprocessor(images[1]), expected[1:])
    assert len(np.unique(expected)) > 50  # not a comparison of constants


@pytest.mark.parametrize("name", CONFIGS)
def test_awkward_sizes_are_bit_identical(name: str, odd: dict[str, Image.Image]) -> None:
    preprocessor = Preprocessor.from_dict(CONFIGS[name])
    for kind, image in odd.items():
        if kind == "very wide" and preprocessor.shortest_edge:
            continue  # 256x341333 pixels: see test_a_huge_result_is_refused
        same(preprocessor(image), reference(CONFIGS[name], image))


@pytest.mark.parametrize("mean", [0.5, [0.485, 0.456, 0.406], [0, 0, 0], [0.48145466, 0.4578275, 0.40821073]])
@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4, 5])
def test_filters_and_statistics_are_bit_identical(resample: int, mean: Any, photos: list[np.ndarray]) -> None:
    config = {"resample": resample, "size": [61, 83], "image_mean": mean, "image_std": [0.26862954, 0.26130258, 1]}
    same(Preprocessor.from_dict(config)(photos[0]), reference(config, photos[0]))


PROCESSORS = ("ViT", "Bit", "CLIP", "ConvNext", "DeiT", "Beit", "Siglip")
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "smaller": {"size": {"shortest_edge": 57}, "crop_size": {"height": 48, "width": 50}, "resample": 2},
    "integers": {"size": 61, "crop_size": 56, "image_mean": [0.4, 0.5, 0.6]},
    "not square": {"default_to_square": False, "crop_size": [40, 51]},
    "no crop, no rescale": {"do_center_crop": False, "do_rescale": False, "size": {"height": 40, "width": 60}},
    "nulls": {"do_center_crop": None, "do_convert_rgb": None, "do_resize": None},
}
AWKWARD = awkward_images()


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("name", OPTIONS)
def test_all_processors_are_bit_identical_on_awkward_images(kind: str, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = {"image_processor_type": f"{kind}ImageProcessor", **({} if name == "nulls" else {"do_convert_rgb": True})}
    config |= OPTIONS[name]
    if kind == "ConvNext" and name != "nulls":
        config["size"] = {"smaller": {"shortest_edge": 57}, "integers": 61}.get(name, {"shortest_edge": 384})
        config.pop("do_center_crop", None)
    elif kind == "ViT" and name in ("defaults", "nulls", "integers"):
        config["size"] = 50
    processor = getattr(transformers, f"{kind}ImageProcessorPil").from_dict(dict(config))
    preprocessor = Preprocessor.from_dict(config)
    written = Preprocessor.from_dict(preprocessor.to_dict())
    assert written == preprocessor
    for image in AWKWARD.values() if name == "smaller" else list(AWKWARD.values())[::3]:
        plain = image if config.get("do_convert_rgb") else without_transparency(image)
        same(preprocessor(plain), processor(plain, return_tensors="np")["pixel_values"])


RECORDED = json.loads((Path(__file__).parent / "recorded_transforms.json").read_text())


@pytest.mark.parametrize("name", [name for name, value in RECORDED.items() if "config" in value])
def test_timms_transforms_are_bit_identical(name: str) -> None:
    compare_with_recorded(name, Preprocessor.from_timm(RECORDED[name]["config"]))


@pytest.mark.parametrize("name", [name for name in RECORDED if name.startswith("Swin_")])
def test_torchvisions_transforms_are_bit_identical(name: str) -> None:
    depths = (2, 2, 6 if name.endswith("T") else 18, 2)
    version, width = 2 if "V2" in name else 1, 128 if name.endswith("B") else 96
    size, heads = (256 if version == 2 else 224,) * 2, tuple(width // 32 << stage for stage in range(4))
    config = SwinConfig(version=version, embed_dim=width, depths=depths, num_heads=heads, image_size=size)
    stated = preprocessing_of(Checkpoint(config, {}, "", writer="torchvision"), ExportSpec("swinv2-tiny"))
    assert (stated.source, stated.assumed) == ("torchvision's transform of this architecture", "")
    compare_with_recorded(name, stated.preprocessor)


def compare_with_recorded(name: str, preprocessor: Preprocessor) -> None:
    found: list[int | None] = []
    for image in AWKWARD.values():
        try:
            found.append(zlib.crc32(preprocessor(without_transparency(image)).tobytes()))
        except InputError:
            found.append(None)  # one side would have no pixel
    assert [key for key, one, other in zip(AWKWARD, found, RECORDED[name]["crc32"], strict=True) if one != other] == []


def test_every_value_is_bit_identical() -> None:
    values = np.arange(256, dtype=np.uint8)
    image = np.stack([values, values[::-1], np.roll(values, 7)], axis=-1).reshape(16, 16, 3)
    for config in CONFIGS.values():
        small = {**config, "size": 16, "crop_size": 16}
        same(Preprocessor.from_dict(small)(image), reference(small, image))


def test_values_by_hand() -> None:
    image = np.array([[[0, 255, 51]]], dtype=np.uint8)
    output = Preprocessor.imagenet(1)(image)
    expected = [(0 - 0.485) / 0.229, (1 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert output.shape == (1, 3, 1, 1)
    np.testing.assert_allclose(output.ravel(), expected, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_modes_with_and_without_do_convert_rgb_are_bit_identical(mode: str, modes: dict[str, Image.Image]) -> None:
    config, image = CONFIGS["convert rgb"], modes[mode]
    same(Preprocessor.from_dict(config)(image), reference(config, image))
    plain = {key: value for key, value in config.items() if key != "do_convert_rgb"}
    # RGB images are left as they are, as in transformers, which fails on the other modes.
    same(Preprocessor.from_dict(plain)(image), reference(plain if image.mode == "RGB" else config, image))


def test_arrays_with_alpha_or_one_channel_are_bit_identical(modes: dict[str, Image.Image]) -> None:
    config = CONFIGS["convert rgb"]
    for convert in (True, None):
        preprocessor = Preprocessor.from_dict({**config, "do_convert_rgb": convert})
        for array in (np.array(modes["RGBA"]), np.array(modes["L"])[:, :, None]):
            same(preprocessor(array), reference(config, array, input_data_format="channels_last"))
        grey = np.array(modes["L"])
        same(preprocessor(grey), preprocessor(modes["L"]))


def test_an_array_three_rows_high_is_height_first(photos: list[np.ndarray]) -> None:
    for array in (photos[0][:3], photos[0][:4, ::2]):  # by default transformers assumes channels first here
        expected = reference(CONFIGS["bicubic 256"], array, input_data_format="channels_last")
        same(Preprocessor.from_dict(CONFIGS["bicubic 256"])(array), expected)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")  # from Pillow, in transformers too
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGBA", "png"), ("LA", "png"), ("P with transparency", "png"), ("P", "gif"), ("CMYK", "jpg"), ("L", "jpg")],
)
def test_files_are_read_as_load_image_reads_them(mode: str, suffix: str, modes: dict[str, Image.Image], tmp_path: Path) -> None:
    path = tmp_path / f"photo.{suffix}"
    modes[mode].save(path)
    load_image = pytest.importorskip("transformers.image_utils").load_image
    loaded = load_image(str(path))
    assert np.array_equal(read_image(path), loaded)
    for config in (CONFIGS["bicubic 256"], CONFIGS["convert rgb"]):
        preprocessor = Preprocessor.from_dict(config)
        same(preprocessor(path), reference(config, loaded))
        same(preprocessor([str(path), path]), np.concatenate([reference(config, loaded)] * 2))


def test_alpha_is_dropped_from_files_and_blended_with_white_in_pil_images(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    image.save(tmp_path / "clear.png")
    plain = Preprocessor(do_resize=False, do_rescale=False, do_normalize=False)
    assert plain(tmp_path / "clear.png")[0, :, 0, 0].tolist() == [10, 20, 30]
    assert plain(image)[0, :, 0, 0].tolist() == [255, 255, 255]
    assert plain(np.array(image))[0, :, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_rotates_files_and_not_images(orientation: int, odd: dict[str, Image.Image], tmp_path: Path) -> None:
    path, exif = tmp_path / "turned.jpg", Image.Exif()
    exif[0x0112] = orientation
    odd["portrait"].save(path, exif=exif, quality=95)
    load_image = pytest.importorskip("transformers.image_utils").load_image
    config = CONFIGS["rectangle 192x160"]
    preprocessor = Preprocessor.from_dict(config)
    upright = preprocessor(path)
    same(upright, reference(config, load_image(str(path))))
    same(preprocessor(Image.open(path)), reference(config, Image.open(path)))
    assert np.array_equal(upright, preprocessor(Image.open(path))) == (orientation == 1)
    assert read_image(path).size == ImageOps.exif_transpose(Image.open(path)).size


def png16(samples: np.ndarray) -> bytes:
    """Encode samples [height, width, 1 or 3] as a 16-bit PNG. Pillow cannot write 16-bit colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    height, width, channels = samples.shape
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 2 if channels == 3 else 0, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_greyscale_is_scaled_and_not_clipped(photos: list[np.ndarray], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, photos[0].shape[:2])
    grey = photos[0][..., :1].astype(np.uint32) * 256 + noise[..., None]
    (tmp_path / "grey.png").write_bytes(png16(grey))
    (tmp_path / "colour.png").write_bytes(png16(np.repeat(grey, 3, axis=2)))
    Image.fromarray(grey[..., 0].astype(np.uint16)).save(tmp_path / "grey.tif")
    preprocessor = Preprocessor.imagenet(224)
    expected = preprocessor(np.repeat(photos[0][..., :1], 3, axis=2))
    for name in ("colour.png", "grey.png", "grey.tif"):
        same(preprocessor(tmp_path / name), expected)
    same(preprocessor(Image.open(tmp_path / "grey.png")), expected)
    same(preprocessor(Image.fromarray(grey[..., 0].astype(np.int32))), expected)


def greyscale(high: float, kind: str) -> np.ndarray:
    return np.linspace(0, high, 64).round().reshape(8, 8).astype(kind)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (greyscale(255, "int32"), greyscale(255, "uint8")),
        (greyscale(200, "uint16"), greyscale(200, "uint8")),
        (greyscale(200, "float32"), greyscale(200, "uint8")),
        (greyscale(65535, "int32"), greyscale(65535, "int32") >> 8),
        (greyscale(4096, "uint16"), greyscale(4096, "uint16") >> 8),
        (greyscale(65535, "float32"), greyscale(65535, "int32") >> 8),
        (greyscale(0, "int32"), greyscale(0, "uint8")),
        (greyscale(4095, "int32"), "contains values from 0 to 4095. Expected those of 8 or of 16 bits; this range is unclear"),
        (greyscale(256, "uint16"), "contains values from 0 to 256"),
        (greyscale(1, "int32"), "contains values from 0 to 1"),
        (greyscale(70000, "int32"), r"contains values from 0 to 70000\. Expected 0..65535"),
        (greyscale(1, "float32"), "contains 32-bit floats from 0 to 1, whose range is unknown"),
        (greyscale(255, "float32") + np.float32(0.5), "contains 32-bit floats"),
    ],
)
def test_the_maximum_of_greyscale_decides_its_range(image: np.ndarray, expected: Any, tmp_path: Path) -> None:
    plain = Preprocessor(do_resize=False, do_rescale=False, do_normalize=False)
    Image.fromarray(image).save(tmp_path / "grey.tif")
    for one in (Image.fromarray(image), tmp_path / "grey.tif"):
        if isinstance(expected, str):
            with pytest.raises(InputError, match=expected):
                plain(one)
        else:
            assert np.array_equal(plain(one)[0], np.stack([expected] * 3))


def test_reported_files(tmp_path: Path) -> None:
    """A palette file with a transparent colour, and 8 bits in a 32-bit file."""
    transformers = pytest.importorskip("transformers")
    reported, config = Path(__file__).parent / "reported", {"do_convert_rgb": True, "size": 32}
    preprocessor = Preprocessor.from_dict(config)
    same(preprocessor(reported / "i32.tif"), reference(config, Image.open(reported / "i32.tif")))
    for name, image in {"P": Image.open(reported / "pal_trns.png"), **AWKWARD}.items():
        if name in ("P", "P with key", "RGB with key", "L with key"):
            image.save(tmp_path / "keyed.png")
            same(preprocessor(tmp_path / "keyed.png"), reference(config, image))
            loaded = transformers.image_utils.load_image(str(tmp_path / "keyed.png"))
            same(preprocessor(tmp_path / "keyed.png"), reference(config, loaded))


def write_tiff(path: Path, bands: np.ndarray, order: str = "<", *, planes: bool = False, **options: Any) -> None:
    """Write [height, width, channels] in strips of 5 rows."""
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed")
    layout = {"planarconfig": "separate" if planes else "contig", "rowsperstrip": 5, **options}
    samples = bands.transpose(2, 0, 1) if planes else bands
    tifffile.imwrite(path, samples, byteorder=order, photometric="minisblack", metadata=None, **layout)


@pytest.mark.parametrize("channels", [2, 4, 5, 6])
def test_images_of_many_bands(channels: int, tmp_path: Path) -> None:
    bands = np.random.default_rng(channels).integers(0, 256, (13, 17, channels), dtype=np.uint8)
    plain = Preprocessor(
        do_resize=False, do_rescale=False, image_mean=tuple(range(channels)), image_std=tuple(range(1, channels + 1))
    )
    expected = plain(bands)[0]
    for channel in range(channels):
        assert np.array_equal(expected[channel], (bands[..., channel].astype(np.float32) - channel) / (channel + 1))
    np.save(tmp_path / "a.npy", bands)
    np.savez(tmp_path / "b.npz", image=bands)
    frames = [Image.fromarray(bands[..., channel].copy()) for channel in range(channels)]
    frames[0].save(tmp_path / "c.tif", save_all=True, append_images=frames[1:])
    codecs: list[dict[str, Any]] = [{}, *({"compression": name, "predictor": True} for name in ("zlib", "lzw", "zstd"))]
    for order in "<>":
        for planes in (False, True):
            for index, codec in enumerate(codecs):
                write_tiff(tmp_path / f"d{order}{planes}{index}.tif", bands, order, planes=planes, **codec)
    write_tiff(tmp_path / "e.tif", bands.astype(np.uint16) * 257, **codecs[1])
    write_tiff(tmp_path / "f.tif", bands, rowsperstrip=None, tile=(16, 16), compression="packbits")
    write_tiff(tmp_path / "g.tif", bands, bigtiff=True, compression="lzma")
    for path in tmp_path.iterdir():
        assert np.array_equal(plain(path)[0], expected), path
        assert path.suffix != ".tif" or np.array_equal(plain(path.read_bytes())[0], expected), path
    for image in (np.dstack([bands, bands]), Image.new("RGB", (5, 5)), tmp_path / "rgb.png"):
        Image.new("RGB", (5, 5)).save(tmp_path / "rgb.png")
        with pytest.raises(InputError, match=rf"network expects {channels}( channels)?\."):
            plain(image)
    with pytest.raises(InputError, match=r"Move the channels last: array.transpose\(1, 2, 0\)"):
        plain(bands.transpose(2, 0, 1))
    with pytest.raises(InputError, match=r"shape .*\. Expected uint8"):
        Preprocessor()(tmp_path / "a.npy") if channels in (2, 5, 6) else plain(bands.astype(np.float32))


def test_damaged_and_oversized_tiff_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, plain = tmp_path / "a.tif", Preprocessor(do_resize=False, image_mean=(0,) * 5, image_std=(1,) * 5)

    def refused(pattern: str, changes: dict[int, int] | None = None, cut: int | None = None, **options: Any) -> None:
        write_tiff(path, np.zeros((13, 17, 5), dtype=options.pop("dtype", np.uint8)), **options)
        data = bytearray(path.read_bytes())
        for tag, value in (changes or {}).items():
            place = data.index(struct.pack("<H", tag), 8)
            data[place + 8 : place + 12] = struct.pack("<I", value)
        path.write_bytes(data[:cut])
        with pytest.raises(InputError, match=pattern):
            plain(path)

    for tag in (256, 257):  # width and height
        refused("more pixels than", {tag: 2**31 - 1})
        refused("is damaged", {tag: 50})
    refused("more pixels than", {322: 2**20, 323: 2**20}, rowsperstrip=None, tile=(16, 16))
    refused("is a TIFF file with 9 channels", {277: 9})
    refused("compression that are not supported", {259: 7})
    refused("compression that are not supported", dtype=np.complex64)
    refused("is damaged", cut=-300)
    for module in ("tifffile", "imagecodecs"):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingDependencyError, match=rf"{module} is needed to read a TIFF file .*swin-deploy\[tiff\]"):
            plain(path)
        monkeypatch.undo()


def test_four_channels_are_those_of_transformers() -> None:
    """Pillow weights the bands of an image with four of them with the last one, in transformers, too."""
    config = {"size": [20, 31], "resample": 3, "image_mean": [0.1, 0.2, 0.3, 0.4], "image_std": [0.5, 0.6, 0.7, 0.8]}
    image = AWKWARD["RGBA"]
    for one in (image, np.asarray(image)):
        same(Preprocessor.from_dict(config)(one), reference(config, np.asarray(one), input_data_format="channels_last"))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_transformers(name: str, photos: list[np.ndarray], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    preprocessor = Preprocessor.from_dict(CONFIGS[name])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor.to_dict()))
    read_back = transformers.ViTImageProcessorPil.from_pretrained(tmp_path)
    for processor in (read_back, transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")):
        same(preprocessor(photos), processor(photos, return_tensors="np")["pixel_values"].astype(np.float32))
    read_back.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())
    assert written == json.loads(json.dumps(preprocessor.to_dict()))
    assert Preprocessor.from_dict(written) == preprocessor
    assert Preprocessor.from_dict({**CONFIGS[name], "image_processor_type": "ViTImageProcessorFast"}) == preprocessor


@pytest.mark.parametrize("name", ["class defaults", "bicubic 256", "shortest edge and crop", "convert rgb"])
def test_config_is_written_as_transformers_writes_it(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    written = transformers.ViTImageProcessorPil.from_dict(dict(CONFIGS[name])).to_json_string()
    assert json.loads(written) == Preprocessor.from_dict(CONFIGS[name]).to_dict()


def test_null_values_take_the_class_defaults() -> None:
    nulls = ["size", "resample", "rescale_factor", "image_mean", "image_std", "crop_size", "do_pad"]
    assert Preprocessor.from_dict(dict.fromkeys(nulls)) == Preprocessor()


def test_default_to_square_false_means_the_shortest_edge(photos: list[np.ndarray]) -> None:
    config = {"size": 100, "default_to_square": False}
    assert Preprocessor.from_dict(config).shortest_edge == 100
    same(Preprocessor.from_dict(config)(photos), reference(config, photos))
    assert Preprocessor.from_dict({"shortest_edge": 100}) == Preprocessor()  # not a key of the format


def test_imagenet_equals_the_published_checkpoints() -> None:
    published = CONFIGS["feature extractor 224"]
    assert Preprocessor.imagenet(224) == Preprocessor.from_dict(published)
    assert Preprocessor.imagenet((192, 160)).size == (192, 160)
    assert hash(Preprocessor.imagenet(224)) == hash(Preprocessor.imagenet((224, 224)))


def test_inputs_are_not_changed(photos: list[np.ndarray]) -> None:
    array = photos[0].copy()
    image = Image.fromarray(array)
    Preprocessor(do_resize=False)([array, image])
    assert np.array_equal(array, photos[0])
    assert np.array_equal(image, photos[0])


BAD_CONFIGS: list[tuple[Any, str]] = [
    ([1], r"Invalid config: \[1\]\. Expected a JSON object"),
    ({"size": 0}, r"Invalid size: 0\. Expected a positive whole number"),
    ({"size": True}, "Invalid size: True"),
    ({"size": "224"}, "Invalid size: '224'"),
    ({"size": 224.0}, r"Invalid size: 224\.0"),
    ({"size": [224]}, r"Invalid size: \[224\]"),
    ({"size": [224, -1]}, r"Invalid size: \[224, -1\]"),
    ({"size": {"height": 224}}, r"Invalid size: \{'height': 224\}"),
    ({"size": {"shortest_edge": 224, "longest_edge": 300}}, r"longest_edge.* Expected .*shortest_edge"),
    ({"size": {"shortest_edge": None}}, r"Invalid size: \{'shortest_edge': None\}"),
    ({"size": {"shortest_edge": 0}}, r"Invalid shortest_edge: 0\. Expected a positive whole number"),
    ({"do_center_crop": True}, "Invalid crop_size: None"),
    ({"crop_size": {"shortest_edge": 3}}, "Invalid crop_size: "),
    ({"do_resize": "yes"}, r"Invalid do_resize: 'yes'\. Expected true or false"),
    ({"do_convert_rgb": 1}, r"Invalid do_convert_rgb: 1\. Expected true or false"),
    ({"resample": 9}, r"Invalid resample: 9\. Expected a Pillow filter number"),
    ({"resample": "cubic"}, "Invalid resample: 'cubic'"),
    ({"rescale_factor": float("nan")}, r"Invalid rescale_factor: nan\. Expected a finite number"),
    ({"rescale_factor": "1/255"}, "Invalid rescale_factor: '1/255'"),
    ({"image_mean": [0.5, 0.5]}, r"Invalid image_std: .* Expected 2 finite numbers, one per channel, above 0"),
    ({"image_mean": [0.5, 0.5, float("inf")]}, "Invalid image_mean: .*inf.* Expected three finite numbers"),
    ({"image_std": [0.2, 0, 0.2]}, "Invalid image_std: .* Expected three finite numbers.* above 0"),
    ({"image_std": [0.2, 1e-60, 0.2]}, "Invalid image_std: .* above 0"),
    ({"do_pad": True}, r"Invalid do_pad: True\. Expected false: padded batches are not supported"),
]


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS)
def test_bad_configs_are_refused(config: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Preprocessor.from_dict(config)
    assert str(caught.value).endswith(". Correct preprocessor_config.json.")


def encoded(mode: str, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def float_tiff() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(buffer, "TIFF")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("text.jpg", b"not an image", "is not a valid image. Expected a format that Pillow reads"),
        ("empty.png", b"", "is not a valid image"),
        ("cut.jpg", encoded("RGB", "JPEG")[:1500], r"is damaged .*truncated.*\. Save it again"),
        ("cut.png", encoded("RGB", "PNG")[:1500], r"is damaged .*\. Save it again"),
        ("float.tif", float_tiff(), r"contains 32-bit floats from 0 to 1, whose range is unknown\. Scale it"),
        ("wide.tif", encoded("I", "TIFF")[:-4] + b"\xff\xff\xff\x7f", "contains values from .* Expected 0..65535"),
    ],
)
def test_bad_files_are_refused(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        Preprocessor()(path)
    assert str(path) in str(caught.value)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    for kind in ("PNG", "GIF", "BMP", "TIFF", "WEBP"):
        data = encoded("RGB", kind)
        for size in range(0, len(data) - 24, max(1, len(data) // 40)):  # a PNG is whole without its checksum and end
            (tmp_path / "cut").write_bytes(data[:size])
            with pytest.raises(InputError, match=r"Image file .*cut"):
                read_image(tmp_path / "cut")


def test_missing_files_folders_and_pipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Image file '.*absent\.jpg' does not exist\. Pass the path"):
        read_image(tmp_path / "absent.jpg")
    with pytest.raises(InputError, match=r"is a folder\. Pass the image files in it"):
        Preprocessor()([tmp_path])
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png.* is not a regular file"):
        read_image(tmp_path / "pipe.png")


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Image.new("RGB", (50, 50)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"bomb\.png' has more pixels than PIL.Image.MAX_IMAGE_PIXELS allows"):
        read_image(tmp_path / "bomb.png")


def test_a_huge_result_is_refused() -> None:
    preprocessor = Preprocessor(shortest_edge=224)
    with pytest.raises(InputError, match=r"from 1x65000 to 224x14560000 pixels, .* Crop the image"):
        preprocessor(np.zeros((1, 65000, 3), dtype=np.uint8))


GOOD = np.zeros((8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "The list of images is empty"),
        (None, "The image has type NoneType. Expected a path, a PIL image or a uint8 array"),
        (b"\xff\xd8", "The image is not a valid image"),
        ([GOOD, 3], "Image 1 of the list has type int"),
        (GOOD.astype(np.float32), "array of type float32 .* Expected uint8"),
        (GOOD[None][[0, 0]], r"an array of 2 images with shape \(2, 8, 8, 3\)\. Pass a list .*: list\(array\)"),
        (GOOD[None][:0], "an array of 0 images"),
        (GOOD.transpose(2, 0, 1), r"shape \(3, 8, 8\)\. Expected .*\[height, width, 3\]"),
        (GOOD[..., :2], r"shape \(8, 8, 2\)\. Expected"),
        (GOOD[:0], r"shape \(0, 8, 3\)\. Expected"),
        (np.zeros(5, dtype=np.uint8), r"shape \(5,\)\. Expected"),
        (Image.new("RGB", (0, 5)), "The image has no pixels"),
        (Image.new("F", (5, 5)), "The image contains 32-bit floats"),
        (Image.fromarray(np.full((2, 2), -1, dtype=np.int32)), "contains values from -1 to -1"),
        (Image.open(io.BytesIO(encoded("RGB", "JPEG")[:1500])), r"The image is damaged .*truncated"),
        (Image.new("La", (5, 5)), "The image is damaged or has an unknown format .*conversion from La to"),
    ],
)
def test_bad_images_are_refused(images: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Preprocessor()(images)


def test_a_batch_of_two_sizes_is_refused() -> None:
    with pytest.raises(InputError, match=r"Image 1 of the list has 4x8 pixels .* has 8x8\. A batch has one size"):
        Preprocessor(do_resize=False)([GOOD, GOOD[:4]])


def test_importing_is_cheap() -> None:
    code = "import sys, swin_deploy.preprocess, swin_deploy.variants; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
