"""Write patches of fourteen photographs as image folders; the class of a patch is its photograph. The result is reproducible.

    python examples/patches/patches.py FOLDER        # FOLDER/train and FOLDER/test, a class folder for each photograph

The photographs come from scikit-image (`pip install scikit-image`) and this repository. Each is converted to grey and cut into
tiles. A quarter of the tiles are for the test. A patch lies within one tile, so no pixel is in both parts.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

# Scenes with many objects (such as the astronaut and the motorcycle) are left out: their parts have little in common.
PHOTOS = Path(__file__).resolve().parents[1] / "photos"
OURS = {"china": "china.jpg", "flower": "flower.jpg"}
THEIRS = {
    "brick": "brick.png",
    "cat": "chelsea.png",
    "coins": "coins.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "moon": "moon.png",
    "page": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "text": "text.png",
    "tissue": "ihc.png",
}
LABELS = tuple(sorted({**OURS, **THEIRS}))
TILE, SIDE = 56, 48  # pixels of a photograph that is at most 640 pixels wide and high
TILES, PATCHES = 40, 4  # maximum number of tiles per photograph, and patches per tile
PLAIN = 6.0  # minimum standard deviation of a tile, of 255: sky and darkness look the same everywhere


def photographs() -> dict[str, Image.Image]:
    """Return every photograph by label: grey, at most 640 pixels wide and high."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("The photographs come from scikit-image, which is not installed. Run: pip install scikit-image")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    files = {**{label: PHOTOS / name for label, name in OURS.items()}, **{k: folder / name for k, name in THEIRS.items()}}
    found = {}
    for label in LABELS:
        photo = Image.open(files[label]).convert("RGB").convert("L")
        scale = min(1, 640 / max(photo.size))
        found[label] = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
    return found


def changed(patch: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Rotate, mirror and blur a patch, and change its brightness, contrast and noise."""
    patch = patch.rotate(90 * int(rng.integers(4)))
    if rng.random() < 0.5:
        patch = patch.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    patch = patch.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.5)))
    values = np.asarray(patch, dtype=np.float64)
    values = (values - values.mean()) * rng.uniform(0.85, 1.15) + values.mean() + rng.uniform(-20, 20)
    values += rng.standard_normal(values.shape) * rng.uniform(0, 5)
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def write(folder: Path, seed: int = 0) -> dict[str, int]:
    """Write both parts and return the number of patches in each."""
    counts = {"train": 0, "test": 0}
    for label, photo in photographs().items():
        rng = np.random.default_rng([seed, LABELS.index(label)])
        places = [(x, y) for y in range(0, photo.height - TILE + 1, TILE) for x in range(0, photo.width - TILE + 1, TILE)]
        tiles = [photo.crop((x, y, x + TILE, y + TILE)) for x, y in places]
        tiles = [tile for tile in tiles if np.asarray(tile).std() >= PLAIN]
        chosen = rng.permutation(len(tiles))[:TILES]
        for number, index in enumerate(chosen):
            part = "test" if number < len(chosen) / 4 else "train"
            (folder / part / label).mkdir(parents=True, exist_ok=True)
            for patch in range(PATCHES):
                x, y = rng.integers(0, TILE - SIDE + 1, 2)
                cut = changed(tiles[index].crop((x, y, x + SIDE, y + SIDE)), rng)
                cut.save(folder / part / label / f"{index:03d}-{patch}.png")
                counts[part] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for train and test, which must not exist")
    options = parser.parse_args()
    if (options.folder / "train").exists() or (options.folder / "test").exists():
        sys.exit(f"{options.folder} already contains train or test. Remove them, or choose another folder.")
    try:
        counts = write(options.folder)
    except BaseException:
        for part in ("train", "test"):
            shutil.rmtree(options.folder / part, ignore_errors=True)
        raise
    print(f"{options.folder}: {counts['train']} patches to train on, {counts['test']} to test with, {len(LABELS)} classes")


if __name__ == "__main__":
    main()
