"""Horizontal bar charts, drawn with matplotlib."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .dependencies import require
from .errors import UsageError

FORMATS = ("svg", "png", "pdf")
BLUE, RED, CYAN, YELLOW, GREY = "#4477aa", "#ee6677", "#66ccee", "#ccbb44", "#bbbbbb"


@dataclass(frozen=True)
class Bar:
    """One row of a chart: its label, the length and colour of each part, a note to the right, and a line over an interval."""

    label: str
    parts: Sequence[tuple[float, str]]
    note: str = ""
    interval: tuple[float, float] | None = None


def bar_chart(
    bars: Sequence[Bar], title: str, axis: str, legend: Mapping[str, str] | None = None, file_format: str = "svg"
) -> bytes:
    """Draw horizontal bars, the first one at the top; `legend` has the meaning of each colour.

    The same arguments give the same bytes. In an SVG file, part `p` of bar `b` is the group with the id `bar-b-p`.
    """
    matplotlib, figures = require("matplotlib", "draw a plot"), require("matplotlib.figure", "draw a plot")
    written = io.BytesIO()
    style = {"svg.fonttype": "none", "svg.hashsalt": "swin-deploy", "text.parse_math": False, "font.size": 9}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the viewer of the file chooses another font for these
        figure = figures.Figure(figsize=(8, 0.9 + 0.3 * len(bars)))
        axes = figure.add_subplot()
        for row, bar in enumerate(bars):
            left = 0.0
            for number, (length, colour) in enumerate(bar.parts):
                axes.barh(row, length, 0.7, left, color=colour)[0].set_gid(f"bar-{row}-{number}")
                left += length
            if bar.interval is not None:
                axes.plot(bar.interval, (row, row), "|-", color="#222222", gid=f"interval-{row}")
                left = max(left, bar.interval[1])
            axes.annotate(bar.note, (left, row), (5, 0), textcoords="offset points", verticalalignment="center")
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axes.set(xlim=(0, None), ylim=(len(bars) - 0.5, -0.5), xlabel=axis)
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        if legend:
            patches = [matplotlib.patches.Patch(color=colour, label=meaning) for colour, meaning in legend.items()]
            figure.legend(handles=patches, loc="upper left", bbox_to_anchor=(0, 0), ncols=len(patches), frameon=False)
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(file_format)
        figure.savefig(written, format=file_format, bbox_inches="tight", metadata=metadata)
    return written.getvalue()


def check_plot(path: Path) -> None:
    """Check that a plot can be written to `path`, before the work whose result it shows."""
    try:
        folder = path.absolute().parent
        writable = folder.is_dir() and os.access(folder, os.W_OK) and not path.is_dir()
    except (OSError, ValueError):  # a loop of links, a name that is too long
        writable = False
    if not writable or path.suffix.removeprefix(".") not in FORMATS:
        raise UsageError(
            f"Cannot write the plot {path}. Expected a file name that ends in .svg, .png or .pdf, in a folder that can be "
            "written."
        )
    require("matplotlib", "draw a plot")


def write_plot(path: Path, content: bytes) -> None:
    """Write the content of a plot to `path`."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UsageError(f"Cannot write the plot {path}: {error.strerror}. Choose a file in another folder.") from error
