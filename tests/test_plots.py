"""Charts: bars to scale, the same bytes for the same data, and a refusal before any measurement."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from plotted import bar_widths

from swin_deploy.errors import MissingDependencyError, UsageError
from swin_deploy.plots import BLUE, RED, Bar, bar_chart, check_plot, write_plot

BARS = [Bar("a & <b> $x_1$", [(3.0, BLUE), (1.0, RED)], "first", (3.5, 4.5)), Bar("c", [(2.0, BLUE)])]


def test_bars_are_to_scale_and_texts_are_text() -> None:
    svg = bar_chart(BARS, "title", "ms", {BLUE: "ours"})
    (first, second), (third,) = bar_widths(svg)
    assert [second / first, third / first] == pytest.approx([1 / 3, 2 / 3])
    assert all(f">{text}</text>" in svg.decode() for text in ("a &amp; &lt;b&gt; $x_1$", "first", "title", "ms", "ours"))
    assert svg == bar_chart(BARS, "title", "ms", {BLUE: "ours"})


def test_the_file_ending_decides_the_format(tmp_path: Path) -> None:
    for ending, start in (("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")):
        path = tmp_path / f"a.{ending}"
        check_plot(path)
        write_plot(path, bar_chart(BARS, "title", "ms", file_format=ending))
        assert path.read_bytes().startswith(start)


def test_where_a_plot_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in ("a.gif", "a", "no/a.svg", "loop/a.svg", "x" * 300 + "/a.svg"):
        with pytest.raises(UsageError, match=r"Cannot write the plot .* ends in \.svg, \.png or \.pdf"):
            check_plot(tmp_path / path)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no /proc")
def test_a_plot_that_the_system_refuses() -> None:
    with pytest.raises(UsageError, match=r"Cannot write the plot /proc/a.svg: "):
        write_plot(Path("/proc/a.svg"), b"<svg/>")


def test_without_matplotlib_the_check_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "swin-deploy\[plots\]"'):
        check_plot(tmp_path / "a.svg")
