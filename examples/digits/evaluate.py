"""Run the held-out digits through an exported bundle, and fail when it is right less often than it should be.

From the root of the repository: `python examples/digits/evaluate.py BUNDLE`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from digits import split

import swin_deploy


def accuracy(bundle: Path) -> float:
    """Return the fraction of the 450 held-out images whose first prediction is the right digit, by the fp32 graph."""
    data = split()
    samples = list(zip(data.test_images, data.test_digits, strict=True))
    share = swin_deploy.evaluate(bundle, samples, batch=32, precisions=["fp32"]).score("fp32").top1
    assert share is not None  # the samples have labels
    return share


def main() -> int:
    """Return the exit code: 0 when the accuracy is high enough, 1 when it is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a directory that swin-deploy exported")
    parser.add_argument("--at-least", type=float, default=0.97, help="the lowest accuracy that passes")
    options = parser.parse_args()
    measured = accuracy(options.bundle)
    print(f"{options.bundle}: held-out accuracy {measured:.4f}, at least {options.at_least:.4f} expected")
    return 0 if measured >= options.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
