"""Files of results, by their ending: Parquet, JSON lines and CSV. Parts of a result are written first and joined at the end."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from swin_deploy.dependencies import require
from swin_deploy.errors import UsageError

from .image_runner import Answers

LABELS, INDICES, SCORES, FEATURES, ERROR = "labels", "indices", "scores", "features", "error"
GROUP_ROWS = 16_384  # of a row group in a Parquet file, at least


class ResultFile(Protocol):
    """Writes rows of results. The first column names the image, the last one is the reason if it could not be read."""

    ending: str

    def piece(self, keys: Sequence[str], answers: Answers) -> Any:
        """Return rows in the form that `write` accepts."""

    def write(self, path: Path, pieces: Sequence[Any]) -> None:
        """Write a part."""

    def join(self, parts: Sequence[Path], path: Path) -> None:
        """Write the rows of all parts into one file."""


def result_file(path: Path, column: str, labels: Sequence[str] | None, width: int) -> ResultFile:
    """Return what writes the file at `path`. `labels` are those of the classes; None for features of that `width`."""
    kinds: dict[str, Any] = {".parquet": ParquetResult, ".jsonl": JsonLinesResult, ".csv": CsvResult}
    if path.suffix.lower() not in kinds:
        raise UsageError(f"The output {path} has an unknown file name extension. Expected {', '.join(kinds)}.")
    made: ResultFile = kinds[path.suffix.lower()](column, labels, width)
    return made


def _text(key: str) -> str:
    """Return a path as text: bytes that are not UTF-8 are escaped."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class ParquetResult:
    """Parquet with columns of lists: labels, int32 and float64, or of float32 lists of a fixed size for features."""

    ending = ".parquet"

    def __init__(self, column: str, labels: Sequence[str] | None, width: int) -> None:
        self._arrow, self._parquet = (require(name, "write Parquet files") for name in ("pyarrow", "pyarrow.parquet"))
        arrow = self._arrow
        self._width = width
        self._labels = None if labels is None else arrow.array(labels, arrow.string())
        found = [(FEATURES, arrow.list_(arrow.float32(), width))]
        if labels is not None:
            found = [
                (LABELS, arrow.list_(arrow.string())),
                (INDICES, arrow.list_(arrow.int32())),
                (SCORES, arrow.list_(arrow.float64())),
            ]
        self._schema = arrow.schema([(column, arrow.string()), *found, (ERROR, arrow.string())])

    def piece(self, keys: Sequence[str], answers: Answers) -> Any:
        import numpy as np

        arrow, errors = self._arrow, answers.errors
        failed = np.zeros(len(keys), np.bool_)
        failed[list(errors)] = True
        reasons = arrow.nulls(len(keys), arrow.string())
        if errors:
            reasons = arrow.array([errors.get(number) for number in range(len(keys))], arrow.string())
        try:
            names = arrow.array(keys, arrow.string())
        except UnicodeEncodeError:
            names = arrow.array(map(_text, keys), arrow.string())
        if self._labels is None:
            flat = arrow.array(answers.values.reshape(-1))
            found = [arrow.FixedSizeListArray.from_arrays(flat, self._width, mask=arrow.array(failed))]
        else:
            kept = np.ones(answers.values.shape, np.bool_) if answers.above is None else answers.above.copy()
            kept[failed] = False
            offsets = np.concatenate([[0], kept.sum(axis=1).cumsum()]).astype(np.int32)
            indices = arrow.array(answers.values[kept])
            assert answers.scores is not None
            columns = (self._labels.take(indices), indices, arrow.array(answers.scores[kept]))
            found = [arrow.ListArray.from_arrays(offsets, one) for one in columns]
        return arrow.record_batch([names, *found, reasons], schema=self._schema)

    def write(self, path: Path, pieces: Sequence[Any]) -> None:
        self._parquet.write_table(self._arrow.Table.from_batches(pieces, self._schema), path)

    def join(self, parts: Sequence[Path], path: Path) -> None:
        with self._parquet.ParquetWriter(path, self._schema) as writer:
            held: list[Any] = []
            for part in parts:
                held.append(self._parquet.read_table(part))
                if sum(map(len, held)) >= GROUP_ROWS:
                    writer.write_table(self._arrow.concat_tables(held))
                    held = []
            if held:
                writer.write_table(self._arrow.concat_tables(held))


class JsonLinesResult:
    """One JSON object a line."""

    ending = ".jsonl"

    def __init__(self, column: str, labels: Sequence[str] | None, width: int) -> None:
        self.names = [column, *((FEATURES,) if labels is None else (LABELS, INDICES, SCORES)), ERROR]
        self._labels = labels

    def piece(self, keys: Sequence[str], answers: Answers) -> bytes:
        rows = (dict(zip(self.names, row, strict=True)) for row in self.rows(keys, answers))
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "backslashreplace")

    def rows(self, keys: Sequence[str], answers: Answers) -> list[list[Any]]:
        """Return the rows as lists. Numbers that are not finite, which JSON does not have, are None."""
        made: list[list[Any]] = []
        values = answers.values.tolist()
        scores = None if answers.scores is None else answers.scores.tolist()
        for number, key in enumerate(keys):
            error, first = answers.errors.get(number), values[number]
            if self._labels is None or scores is None:
                found: list[Any] = [None if error else [_finite(one) for one in first]]
            elif error:
                found = [[], [], []]
            else:
                second = [_finite(one) for one in scores[number]]
                if answers.above is not None:
                    above = answers.above[number]
                    first, second = ([one for one, kept in zip(part, above, strict=True) if kept] for part in (first, second))
                found = [[self._labels[index] for index in first], first, second]
            made.append([_text(key), *found, error])
        return made

    def write(self, path: Path, pieces: Sequence[bytes]) -> None:
        path.write_bytes(b"".join(pieces))

    def head(self) -> bytes:
        """Return what comes before the first row."""
        return b""

    def join(self, parts: Sequence[Path], path: Path) -> None:
        with path.open("wb") as joined:
            joined.write(self.head())
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, joined, 1 << 20)


class CsvResult(JsonLinesResult):
    """CSV with a head line. Lists are written as JSON."""

    ending = ".csv"

    def head(self) -> bytes:
        return f"{','.join(self.names)}{os.linesep}".encode()

    def piece(self, keys: Sequence[str], answers: Answers) -> bytes:
        text = io.StringIO()
        lines = csv.writer(text, lineterminator=os.linesep)
        for key, *found, error in self.rows(keys, answers):
            lists = ["" if one is None else json.dumps(one, ensure_ascii=False) for one in found]
            lines.writerow([key, *lists, error])
        return text.getvalue().encode("utf-8", "backslashreplace")


def _finite(number: float) -> float | None:
    return number if number - number == 0 else None
