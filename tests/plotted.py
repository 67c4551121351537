"""Read a chart back from its SVG file."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET


def bar_widths(svg: bytes) -> list[list[float]]:
    """The width of each part of each bar, in points."""
    widths: dict[int, list[float]] = {}
    for group in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}g"):
        if match := re.fullmatch(r"bar-(\d+)-\d+", group.get("id", "")):
            path = group[0].attrib["d"]
            x = [float(number) for number in re.findall(r"[ML] ([-\d.]+) ", path)]
            widths.setdefault(int(match[1]), []).append(max(x) - min(x))
    return list(widths.values())
