"""Match labels of samples (folder names, a file, numbers) to the class numbers of a network."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swin_deploy.errors import InputError

WORDNET = re.compile(r"n\d{8}")
EXPECTED = "a line with file and class for each image, such as cat/1.jpg,cat"


def labels_from_file(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Read the class of each of `names`, which are paths, from lines "file,class" or "file class".

    `file` is a path or only its last part; a heading is ignored.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = str(error.strerror) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"The label file {path} cannot be read: {why}. Expected {EXPECTED}.") from error
    rows = [row for row in csv.reader(lines) if row]
    if rows and all(len(row) == 1 for row in rows):
        rows = [row[0].rsplit(maxsplit=1) for row in rows if row[0].strip()]
    known: dict[str, str] = {}
    for row in rows:
        if len(row) < 2:
            raise InputError(f"The label file {path} has a line {','.join(row)!r}. Expected {EXPECTED}.")
        known[row[0].strip().replace("\\", "/").removeprefix("./")] = row[1].strip()
    last = Counter(file.rsplit("/", 1)[-1] for file in known)
    short = {name: label for file, label in known.items() if last[name := file.rsplit("/", 1)[-1]] == 1}
    found = [known.get(name, short.get(name.rsplit("/", 1)[-1])) for name in names]
    if None in found:
        raise InputError(f"The label file {path} has no line for {names[found.index(None)]}. Expected {EXPECTED}.")
    return tuple(str(label) for label in found)


def class_numbers(labels: Sequence[Any], id2label: Mapping[int, str]) -> tuple[dict[Any, int], str]:
    """Match the distinct labels of a whole data set to class numbers.

    The first rule that fits is used: labels are integers; labels are class names of the network (ignoring case, "_" and "-";
    one of several names separated by commas suffices); labels are numbers as text; there are as many labels as classes, and
    the classes are the sorted labels, as in ImageNet.

    Returns the class number of each distinct label and the name of the rule. Raises InputError if no rule fits.
    """
    distinct = list(dict.fromkeys(labels))
    count = len(id2label)
    if all(isinstance(label, int | np.integer) for label in distinct):
        if outside := [label for label in distinct if label not in id2label]:
            raise InputError(f"Invalid label {outside[0]}. Expected a class number from 0 to {count - 1}.")
        return {label: int(label) for label in distinct}, "class numbers"
    texts = {label: str(label) for label in distinct}
    find = _names(id2label)
    numbers = {label: find(text) for label, text in texts.items()}
    if all(number is not None for number in numbers.values()):
        return {label: int(number or 0) for label, number in numbers.items()}, "names of classes"
    numeric = [text for text in texts.values() if re.fullmatch(r"[0-9]{1,9}", text)]
    if len(numeric) == len(texts) and all(int(text) in id2label for text in numeric):
        return {label: int(text) for label, text in texts.items()}, "class numbers"
    if len(texts) == count and not numeric:  # in sorted order, 10 would come before 2
        order = {label: number for number, label in enumerate(sorted(distinct, key=str))}
        words = all(WORDNET.fullmatch(text) for text in texts.values())
        return order, f"the {count} {'WordNet ids' if words else 'labels'} in sorted order"
    strange = [text for label, text in texts.items() if numbers[label] is None]
    unknown = next((text for text in strange if text not in numeric or int(text) not in id2label), strange[0])
    raise InputError(
        f'The label "{unknown}" is not a class of this network ("{id2label[0]}", ...), and there are {len(texts)} labels for '
        f"its {count} classes. Name the folders like the classes, pass --labels with class numbers, or --ignore-labels."
    )


def _names(id2label: Mapping[int, str]) -> Callable[[str], int | None]:
    whole: dict[str, set[int]] = {}
    part: dict[str, set[int]] = {}
    for number, name in id2label.items():
        whole.setdefault(_plain(name), set()).add(number)
        for one in name.split(","):
            part.setdefault(_plain(one), set()).add(number)

    def find(text: str) -> int | None:
        """Return the class with that name; None if there are several ("crane" is a bird and a machine)."""
        found = whole.get(_plain(text)) or part.get(_plain(text)) or set()
        return next(iter(found)) if len(found) == 1 else None

    return find


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.strip().casefold()))
