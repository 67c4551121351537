"""Labels: the names of a network's classes, and what the samples of a data set are labelled with."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import swin_deploy
from swin_deploy.config import MOST_LABELS, SwinConfig, complete_labels
from swin_deploy.errors import InputError, sentence, shown
from swin_deploy.files import json_from, read_regular
from swin_deploy.options import Array

WORDNET = re.compile(r"n\d{8}")
EXPECTED = "a line with file and class for each image, such as cat/1.jpg,cat"
EXPECTED_NAMES = "one label per line, JSON, or CSV with a column name"
IMAGENET = "imagenet-1k"  # its 1000 labels, the lemmas of WordNet, are part of the package
NAMES = ("name", "label", "class", "label_name", "class_name")  # columns of a CSV file, by preference
NUMBERS = ("id", "index", "idx", "number", "label_id", "class_id", "class_index")
NAMES_BYTES, LABELS_BYTES = 1 << 26, 1 << 28  # largest files with the names of classes, and with the labels of samples
MOST_LINES = 5_000_000
BITS = {"0": False, "0.0": False, "False": False, "1": True, "1.0": True, "True": True}


def class_names(source: str, classes: int) -> tuple[dict[int, str], str | None]:
    """Read the label of each of `classes` from a file, and a note if some have none.

    `source` is a text file with one label per line, a JSON list or object, a CSV file with the columns of NAMES and NUMBERS,
    or "imagenet-1k". Raises InputError if it cannot be read, or is for another number of classes.
    """
    path = Path(source)
    if source == IMAGENET and not path.exists():
        path = Path(swin_deploy.__file__).with_name(f"{IMAGENET}.txt")
    content, name = _content(path, NAMES_BYTES, EXPECTED_NAMES), f"The label file {source}"
    try:
        if path.suffix == ".json":
            found = json_from(content, name, advice=f"Expected {EXPECTED_NAMES}.")
        else:
            found = _names_from_lines(_lines(content, MOST_LABELS), path.suffix)
        listed = isinstance(found, list) and all(isinstance(name, str) for name in found)
        if isinstance(found, Mapping):
            found = found.get("id2label", found)
            by_name = all(isinstance(value, int) for value in found.values())
            found = {int(k): v for k, v in ((v, k) if by_name else (k, v) for k, v in found.items())}
        elif listed:
            found = dict(enumerate(found))
        else:
            raise ValueError("it holds no labels")
        exact = sorted(found) == list(range(1, classes + 1)) or len(found) == classes
        fits = exact if listed else exact or max(found, default=0) < classes
        labels, note = complete_labels(found, classes) if fits else ({}, None)
    except InputError:
        raise
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise InputError(f"{name} cannot be read: {sentence(shown(str(error)))}. Expected {EXPECTED_NAMES}.") from error
    if not fits:
        raise InputError(f"{source} has labels for another number of classes than {classes}. Pass one label for each class.")
    return labels, note


def _names_from_lines(lines: list[str], suffix: str) -> Any:
    """Return the labels in a CSV file, by number if it has such a column; of other files, every line."""
    while lines and not lines[-1].strip():
        lines.pop()
    if suffix not in (".csv", ".tsv"):
        return [line.strip() for line in lines]
    rows = [row for row in csv.reader(_ended(lines), delimiter="\t" if suffix == ".tsv" else ",") if row]
    head = [cell.strip().casefold() for cell in rows[0]] if rows else []
    name = next((head.index(column) for column in NAMES if column in head), None)
    number = next((head.index(column) for column in NUMBERS if column in head), None)
    if name is None:
        if any(len(row) != 1 for row in rows):
            raise ValueError(f"its columns are {shown(', '.join(head))}")
        return [row[0].strip() for row in rows]
    if any(len(row) <= max(name, number or 0) for row in rows):
        raise ValueError("it has lines with fewer columns than the first one")
    if number is None:
        return [row[name].strip() for row in rows[1:]]
    return {int(row[number]): row[name].strip() for row in rows[1:]}


def labels_from_file(path: Path, names: Sequence[str], prediction: str = "classes") -> tuple[Any, ...]:
    """Read what each of `names`, which are paths, is labelled with, from lines "file,class" or "file class", or JSON.

    `file` is a path or only its last part; a heading is ignored. JSON is an object from files to labels. Unless `prediction`
    (see SwinConfig) is "classes", an image has a tuple of labels: all columns of all its lines. A table of 0 and 1 with the
    labels in its heading is read, too.
    """
    content, where = _content(path, LABELS_BYTES, EXPECTED), f"The label file {path}"
    if path.suffix == ".json":
        listed = json_from(content, where, advice=f"Expected {EXPECTED}.")
        if not isinstance(listed, dict):
            raise InputError(f"{where} is not a JSON object. Expected {EXPECTED}.")
        rows = [[str(file), *map(str, label if isinstance(label, list) else [label])] for file, label in listed.items()]
    else:
        try:
            rows = [row for row in csv.reader(_ended(_lines(content, MOST_LINES))) if row]
        except (ValueError, csv.Error) as error:
            raise InputError(f"{where} cannot be read: {sentence(shown(str(error)))}. Expected {EXPECTED}.") from error
        if rows and all(len(row) == 1 for row in rows):
            rows = [row[0].rsplit(maxsplit=1) for row in rows if row[0].strip()]
    if prediction == "labels" and len(rows) > 1 and len(rows[0]) > 2 and not set(rows[0][1:]) <= BITS.keys():
        heading, table = rows[0], rows[1:]
        if all(len(row) == len(heading) and set(row[1:]) <= BITS.keys() for row in table):
            rows = [[row[0], *(name for name, bit in zip(heading[1:], row[1:], strict=True) if BITS[bit])] for row in table]
    known: dict[str, Any] = {}
    for row in rows:
        if len(row) < 2 and prediction != "labels":
            raise InputError(f"{where} has a line {shown(repr(','.join(row)))}. Expected {EXPECTED}.")
        file, label = row[0].strip().replace("\\", "/").removeprefix("./"), tuple(cell.strip() for cell in row[1:])
        known[file] = label[0] if prediction == "classes" else known.get(file, ()) + label
    last = Counter(file.rsplit("/", 1)[-1] for file in known)
    short = {name: label for file, label in known.items() if last[name := file.rsplit("/", 1)[-1]] == 1}
    found = [known.get(name, short.get(name.rsplit("/", 1)[-1])) for name in names]
    if None in found:
        raise InputError(f"{where} has no line for {shown(names[found.index(None)])}. Expected {EXPECTED}.")
    return tuple(found)


def _content(path: Path, limit: int, expected: str) -> bytes:
    return read_regular(path, limit, InputError, f"Expected {expected}.", f"The label file {path}")


def _lines(content: bytes, limit: int) -> list[str]:
    """Return the lines of UTF-8 text, whatever the system ends lines with."""
    if max(content.count(b"\n"), content.count(b"\r")) > limit:
        raise ValueError(f"it has more than {limit} lines")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _ended(lines: list[str]) -> Iterator[str]:
    """Return lines with their ends, which quoted text in CSV may contain."""
    return (f"{line}\n" for line in lines)


def targets_from_labels(labels: Sequence[Any], config: SwinConfig) -> tuple[Array, str]:
    """Return what the network should predict for each sample, and the rule by which labels were matched to its classes.

    That is a class number; bool [samples, labels] where a sample has several labels; or float [samples, outputs] of a
    regression. Raises InputError if labels do not fit the network.
    """
    if config.prediction == "classes":
        numbers, rule = class_numbers(labels, config.id2label)
        return np.array([numbers[label] for label in labels]), rule
    count, rows = config.num_labels, [_parts(label) for label in labels]
    if config.prediction == "values":
        try:
            values = np.array(rows, np.float64).reshape(len(rows), count)
        except ValueError as error:
            raise InputError(
                f"The labels, such as {shown(repr(labels[0]))}, are not {count} numbers for each image, which this network "
                f"predicts. Pass them with --labels, or --ignore-labels."
            ) from error
        return values, "values"
    if all(len(row) == count and all(str(one) in BITS for one in row) for row in rows):
        return np.array([[BITS[str(one)] for one in row] for row in rows]), "0 or 1 for each label"
    numbers, rule = class_numbers(list(dict.fromkeys(one for row in rows for one in row)), config.id2label)
    held = np.zeros((len(rows), count), dtype=bool)
    for place, row in enumerate(rows):
        held[place, [numbers[one] for one in row]] = True
    return held, rule


def _parts(label: Any) -> tuple[Any, ...]:
    """Return the labels of one sample; in text they may be separated by ";" or "|"."""
    given = label if isinstance(label, tuple) else (label,)
    parts = [one.split(";" if ";" in one else "|") if isinstance(one, str) else [one] for one in given]
    return tuple(one.strip() if isinstance(one, str) else one for part in parts for one in part if one not in ("", " "))


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
    first = shown(id2label[0])
    raise InputError(
        f'The label "{shown(unknown)}" is not a class of this network ("{first}", ...), and there are {len(texts)} labels for '
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
