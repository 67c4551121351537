"""Sources of samples, selection, and refusals."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_network import INPUTS, PREPROCESSOR, SIDE, folder, images

from swin_deploy.calib.data import Samples, class_balanced, evenly_spread, samples_from
from swin_deploy.errors import InputError


def taken(source: Any, samples: int | None = None) -> Samples:
    return samples_from(source, PREPROCESSOR, INPUTS, samples)


def names(samples: Samples) -> tuple[str, ...]:
    return tuple(map(samples.source.name, samples.chosen))


def pixels(samples: Samples, size: int = 3, start: int = 0) -> np.ndarray:
    return np.concatenate([feeds["pixel_values"] for feeds in samples.batches(size, start)])


def test_every_source_gives_the_same_pixels(tmp_path: Path) -> None:
    raw = images(7)
    expected = PREPROCESSOR(list(raw))
    paths = []
    for number, image in enumerate(raw):
        paths.append(tmp_path / "flat" / f"{number}.png")
        paths[-1].parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(paths[-1])
    np.savez(tmp_path / "images.npz", images=raw, labels=np.arange(7))
    np.savez_compressed(tmp_path / "pixels.npz", pixel_values=expected.astype(np.float64))
    np.save(tmp_path / "images.npy", raw)
    sources: list[Any] = [
        tmp_path / "flat",
        tmp_path / "images.npz",
        tmp_path / "pixels.npz",
        str(tmp_path / "images.npy"),
        raw,
        expected,
        paths,
        [Image.fromarray(image) for image in raw],
        [(image, "label") for image in raw],
        (image for image in raw),
        iter([(path, 3) for path in paths]),
    ]
    for source in sources:
        samples = taken(source)
        assert len(samples) == 7
        np.testing.assert_array_equal(pixels(samples), expected)
        np.testing.assert_array_equal(pixels(samples, start=4), expected[4:])  # a second pass, from the middle


def test_labels_come_with_the_samples(tmp_path: Path) -> None:
    raw = images(4)
    np.savez(tmp_path / "with.npz", images=raw, labels=np.array([3, 1, 0, 2]))
    assert taken(tmp_path / "with.npz").labels == (3, 1, 0, 2)
    assert taken([(image, "cat") for image in raw]).labels == ("cat",) * 4
    assert taken((image, place) for place, image in enumerate(raw)).labels == (0, 1, 2, 3)
    assert taken(raw).labels is None

    class Pictures:  # labels are known without reading images, like a torchvision data set
        targets = (3, 1, 2)
        read: list[int] = []  # noqa: RUF012 - shared on purpose

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            self.read.append(index)
            return images(3)[index], self.targets[index]

    samples = taken(Pictures(), 2)
    assert samples.labels == (3, 2)
    assert set(Pictures.read) == set(samples.chosen)


def test_class_folders_are_labels_at_any_depth(tmp_path: Path) -> None:
    root = folder(tmp_path / "classes", {"cat": 2, "dog/brown": 1, "dog/white": 1})
    (root / "dog" / "readme.txt").write_text("no image")
    (root / "cat" / ".hidden.png").write_text("no image")
    found = taken(root)
    assert names(found) == ("cat/0.png", "cat/1.png", "dog/brown/0.png", "dog/white/0.png")
    assert found.labels == ("cat", "cat", "dog", "dog")
    assert taken(folder(tmp_path / "one" / "val", {"cat": 2, "dog": 2}).parent).labels == ("cat", "cat", "dog", "dog")
    assert taken(folder(tmp_path / "single", {"cat": 2})).labels == ("cat", "cat")
    assert taken(folder(tmp_path / "flat", {"": 2})).labels is None
    assert taken(folder(tmp_path / "mixed", {"": 2, "cat": 2})).labels is None


def test_a_link_to_a_parent_folder_is_followed_once(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"cat": 2, "dog": 1})
    (root / "cat" / "again").symlink_to(root, target_is_directory=True)
    assert names(taken(root)) == ("cat/0.png", "cat/1.png", "dog/0.png")


def test_samples_are_spread_and_balanced(tmp_path: Path) -> None:
    assert evenly_spread(range(10), 5) == (1, 3, 5, 7, 9)
    assert evenly_spread(range(3), 5) == (0, 1, 2)
    labels = ["a"] * 50 + ["b"] * 3 + ["c"] * 20
    for count in (1, 2, 3, 4, 13, 40, 73, 100):
        chosen = class_balanced(labels, count)
        numbers = Counter(labels[index] for index in chosen)
        assert len(chosen) == len(set(chosen)) == min(count, 73)
        assert list(chosen) == sorted(chosen)
        unfilled = [numbers[name] for name, size in (("a", 50), ("b", 3), ("c", 20)) if numbers[name] < size]
        assert not unfilled or max(numbers.values()) - min(unfilled) <= 1
    root = folder(tmp_path / "classes", {"cat": 6, "dog": 2})
    assert Counter(taken(root, 4).labels or ()) == {"cat": 2, "dog": 2}
    assert names(taken(root, 4)) == names(taken(root, 4))
    assert len(taken(iter(images(9)), 4)) == 4


def test_the_fingerprint_depends_on_names_contents_and_preparation(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", {"cat": 3, "dog": 3})
    first = taken(root).fingerprint
    assert taken(folder(tmp_path / "b", {"cat": 3, "dog": 3})).fingerprint == first  # regardless of the path
    assert taken(root, 4).fingerprint != first
    assert samples_from(root, PREPROCESSOR.imagenet((SIDE, SIDE)), INPUTS).fingerprint == first
    other = PREPROCESSOR.from_dict({**PREPROCESSOR.to_dict(), "resample": 2})
    assert samples_from(root, other, INPUTS).fingerprint != first
    (root / "cat" / "0.png").rename(root / "cat" / "00.png")
    assert taken(root).fingerprint != first
    Image.fromarray(images(1, seed=99)[0]).save(root / "cat" / "0.png")
    (root / "cat" / "00.png").unlink()
    assert taken(root).fingerprint != first
    assert taken(images(5)).fingerprint != taken(images(5)[::-1]).fingerprint


def test_only_one_batch_is_in_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "many.npy", np.random.default_rng(0).standard_normal((3000, 3, SIDE, SIDE)).astype(np.float32))
    samples = taken(tmp_path / "many.npy")
    tracemalloc.start()
    assert sum(len(feeds["pixel_values"]) for feeds in samples.batches(10)) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000  # the file has 2.3 MB, a batch 7.7 kB


def refusals(tmp_path: Path) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Return invalid data and the parts of the expected message, by name."""
    good = images(4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    damaged = folder(tmp_path / "damaged", {"cat": 3})
    (damaged / "cat" / "1.png").write_bytes((damaged / "cat" / "1.png").read_bytes()[:60])
    same = tmp_path / "same"
    same.mkdir()
    for place in range(3):
        Image.fromarray(good[0]).save(same / f"{place}.png")
    np.savez(tmp_path / "none.npz", images=good[:0])
    np.savez(tmp_path / "other.npz", pictures=good)
    np.savez(tmp_path / "nothing.npz")
    np.savez(tmp_path / "objects.npz", images=np.array([{}, None], dtype=object))
    np.savez(tmp_path / "short.npz", images=good, labels=np.arange(3))
    np.savez(tmp_path / "shape.npz", pixel_values=np.zeros((2, 3, 9, 9), np.float32))
    np.savez(tmp_path / "whole.npz", pixel_values=np.zeros((2, 3, SIDE, SIDE), np.int64))
    np.save(tmp_path / "order.npy", np.asfortranarray(good.astype(np.float32).transpose(0, 3, 1, 2)))
    np.save(tmp_path / "cut.npy", good)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-50])
    (tmp_path / "no.npz").write_bytes(b"PK no archive")
    (tmp_path / "file.txt").write_text("x")
    bad = np.ones((3, 3, SIDE, SIDE), np.float32) * np.arange(SIDE, dtype=np.float32)
    bad[1, 0, 0, 0] = np.nan
    return {
        "absent": (tmp_path / "absent", ("does not exist", "absent")),
        "long": ("x" * 300, ("does not exist",)),
        "empty": (tmp_path / "empty", ("contain no image", "empty")),
        "notes": (tmp_path / "notes", ("contain no image", "notes")),
        "damaged": (damaged, ("1.png", "damaged")),
        "same": (same, ("all 3 samples are the same",)),
        "black": ([np.zeros((SIDE, SIDE, 3), np.uint8), np.full((SIDE, SIDE, 3), 9, np.uint8)], ("a single colour each",)),
        "none": (tmp_path / "none.npz", ("no samples", "[0, 8, 8, 3]")),
        "other": (tmp_path / "other.npz", ("pixel_values or images", "pictures")),
        "nothing": (tmp_path / "nothing.npz", ("but nothing",)),
        "objects": (tmp_path / "objects.npz", ("Python objects",)),
        "short": (tmp_path / "short.npz", ("one label for each of 4",)),
        "shape": (tmp_path / "shape.npz", ("[2, 3, 9, 9]", "[n, 3, 8, 8]")),
        "whole": (tmp_path / "whole.npz", ("int64",)),
        "order": (tmp_path / "order.npy", ("Fortran",)),
        "cut": (tmp_path / "cut.npy", ("needs 768 bytes, and it has 718",)),
        "no": (tmp_path / "no.npz", ("cannot be read as a NumPy file",)),
        "text": (tmp_path / "file.txt", ("neither a folder nor",)),
        "nan": (bad, ("sample 1", "NaN")),
        "small": ([np.zeros((3, 4, 4), np.float32)], ("[3, 4, 4]", "[3, 8, 8]")),
        "kind": ([3, 4], ("sample 0", "int")),
        "list": ([], ("no samples",)),
        "generator": (iter(()), ("no samples",)),
        "number": (5, ("int",)),
        "mapping": ({"a": 1}, ("dict",)),
    }


def test_invalid_data_is_refused(tmp_path: Path) -> None:
    for name, (source, parts) in refusals(tmp_path).items():
        with pytest.raises(InputError) as caught:
            list(taken(source).batches(2))
        for part in parts:
            assert part in str(caught.value), (name, str(caught.value))
        assert "\n" not in str(caught.value)


def test_an_image_of_another_size_is_refused() -> None:
    shortest = PREPROCESSOR.from_dict({"size": {"shortest_edge": SIDE}})
    with pytest.raises(InputError, match="sample 0 has 8x16 pixels"):
        samples_from([np.zeros((4, 8, 3), np.uint8)], shortest, INPUTS)
