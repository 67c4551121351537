"""A drawing of what `bench` measured, as SVG: text that every browser shows, and no library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from swin_deploy.bench.race import Measurement

_COLOURS = {"swin-deploy": "#4477aa", "pytorch": "#bbbbbb", "others": "#ccbb44"}
_WIDTH, _LEFT, _RIGHT, _ROW, _BAR, _TOP = 900, 270, 190, 26, 16, 62


def svg_from_rows(rows: Sequence[Measurement], machine: str, reference: str) -> str:
    """A bar for each row: milliseconds for one image, the median; the line across its end spans the quartiles of the rounds."""
    spans = [tuple(np.quantile(row.round_ms, (0.25, 0.5, 0.75)) / row.candidate.batch) for row in rows]
    scale = (_WIDTH - _LEFT - _RIGHT) / max(high for _, _, high in spans)
    height = _TOP + _ROW * len(rows) + 16
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#222">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        '<text x="20" y="24" font-weight="bold">Milliseconds for one image; shorter is faster</text>',
        f'<text x="20" y="44" fill="#666">{escape(machine)}; ratios to {escape(reference)}</text>',
    ]
    for number, (row, (low, middle, high)) in enumerate(zip(rows, spans, strict=True)):
        y = _TOP + _ROW * number
        ratio = f", x {row.ratio.median:.2f}"
        kind = "pytorch" if row.candidate.backend in ("pytorch", "torch.compile") else row.candidate.model
        lines += [
            f'<text x="{_LEFT - 10}" y="{y + 13}" text-anchor="end">{escape(str(row.candidate))}</text>',
            f'<rect class="bar" x="{_LEFT}" y="{y}" width="{middle * scale:.1f}" height="{_BAR}" '
            f'fill="{_COLOURS.get(kind, _COLOURS["others"])}"><title>{escape(row.run_by)}: {row.runs} runs, '
            f"{row.images_per_second:.1f} images/s, {row.peak_memory_mb:.0f} MB</title></rect>",
            f'<path class="interval" d="M{_LEFT + low * scale:.1f} {y + 4}v8m0 -4H{_LEFT + high * scale:.1f}m0 -4v8" '
            'stroke="#222" fill="none"/>',
            f'<text x="{_LEFT + high * scale + 8:.1f}" y="{y + 13}">{middle:.2f} ms{ratio}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
