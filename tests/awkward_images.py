"""Fifty images that image processors stumble over: extreme sizes, aspect ratios and values, and every mode of image files."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIZES = (
    *((1, 1), (1, 2), (2, 1), (2, 3), (3, 2), (1, 9), (9, 1), (5, 40), (40, 5), (7, 7), (8, 8), (15, 16), (16, 15), (17, 31)),
    *((31, 17), (31, 32), (32, 31), (32, 32), (33, 33), (45, 60), (60, 45), (63, 64), (64, 63), (64, 64), (65, 66), (71, 71)),
    *((71, 72), (72, 71), (73, 95), (97, 101), (20, 190), (190, 20), (128, 96), (96, 128), (150, 151), (151, 150), (213, 320)),
    (300, 299),
)  # height, width
MODES = ("L", "1", "P", "P with alpha", "P with key", "RGB with key", "L with key", "RGBA", "LA", "CMYK", "YCbCr", "I")


def awkward_images() -> dict[str, Image.Image]:
    """Return the images by name."""
    images = {f"{height}x{width}": Image.fromarray(_pixels(height, width, 3)) for height, width in SIZES}
    return images | {mode: _in_mode(mode) for mode in MODES}


def without_transparency(image: Image.Image) -> Image.Image:
    """Return the image in RGB. What lies beside its bands is dropped."""
    image = image.copy()
    image.info.clear()
    return image.convert("RGB")


def _pixels(height: int, width: int, channels: int) -> np.ndarray:
    """Noise, black and white noise, or noise on a gradient."""
    rng = np.random.default_rng(height * 1009 + width)
    noise = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    if (height + width) % 3 == 0:
        return noise // 128 * np.uint8(255)
    rows, columns = np.mgrid[:height, :width]
    slope = (255 * (rows + columns) // max(height + width - 2, 1)).astype(np.uint8)[..., None]
    return noise if (height + width) % 3 == 1 else slope // 2 + noise // 2


def _in_mode(mode: str) -> Image.Image:
    bands = _pixels(45, 61, 4)
    kind = mode.split()[0]
    if kind in ("RGB", "L", "RGBA", "LA"):
        count = len(kind)
        image = Image.fromarray(bands[..., :count] if count > 1 else bands[..., 0] // 16 * 16)
    elif kind in ("CMYK", "YCbCr"):
        image = Image.merge(kind, [Image.fromarray(bands[..., band].copy()) for band in range(4 if kind == "CMYK" else 3)])
    elif kind == "P":
        image = Image.fromarray(bands[..., 0] // 16).convert("P")
        image.putpalette(bands[:16, 0, :3].tobytes())
    else:
        image = Image.fromarray(bands[..., 0] > 127 if kind == "1" else bands[..., 0].astype(np.int32))
    if mode.endswith("key"):
        image.info["transparency"] = image.getpixel((3, 5))
    elif mode.endswith("alpha"):
        image.info["transparency"] = bytes(range(0, 256, 17))
    return image
