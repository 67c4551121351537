"""What clients that print labels share."""

import json

import numpy as np


def rows(folder, answers):
    """Return probabilities [images, classes] of lists of {"label", "score"}."""
    index = json.loads((folder / "config.json").read_text())["label2id"]
    found = np.zeros((len(answers), len(index)))
    for row, answer in zip(found, answers, strict=True):
        for one in answer:
            row[index[one["label"]]] = one["score"]
    return found
