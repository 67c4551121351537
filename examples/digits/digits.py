"""The digits as 8-bit images, with the split that training, evaluation and tests share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Split(NamedTuple):
    """Images as uint8 [count, 8, 8, 3] (grey, three equal channels), and their digits as int64 [count]."""

    train_images: np.ndarray
    train_digits: np.ndarray
    test_images: np.ndarray
    test_digits: np.ndarray


def split() -> Split:
    """Return the handwritten digits of scikit-learn: 1347 for training and 450 held out, always the same."""
    data = load_digits()
    grey = np.rint(data.images * (255 / 16)).astype(np.uint8)  # the values are 0 to 16
    images = np.repeat(grey[..., None], 3, axis=-1)
    train_images, test_images, train_digits, test_digits = train_test_split(
        images, data.target, test_size=0.25, random_state=0, stratify=data.target
    )
    return Split(train_images, train_digits, test_images, test_digits)
