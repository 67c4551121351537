"""Measure the accuracy of an exported bundle on the held-out digits, and fail if it is too low.

From the root of the repository: `python examples/digits/evaluate.py BUNDLE`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from digits import split

import swin_deploy


def accuracy(bundle: Path) -> float:
    """Return the top-1 accuracy of the fp32 graph on the 450 held-out images."""
    data = split()
    samples = list(zip(data.test_images, data.test_digits, strict=True))
    share = swin_deploy.evaluate(bundle, samples, batch=32, precisions=["fp32"]).score("fp32").top1
    assert share is not None  # the samples have labels
    return share


def main() -> int:
    """Return 0 if the accuracy is high enough, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a directory that swin-deploy exported")
    parser.add_argument("--at-least", type=float, default=0.97, help="the lowest accuracy that passes")
    options = parser.parse_args()
    measured = accuracy(options.bundle)
    print(f"{options.bundle}: held-out accuracy {measured:.4f}, at least {options.at_least:.4f} expected")
    return 0 if measured >= options.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
