"""A drawing of what engines spend their kernels and bytes on, as SVG: text that every browser shows, and no library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from swin_deploy.exporters.engines.layer_report import ROLES

from .costs import EngineCost

_COLOURS = {"attention": "#4477aa", "product": "#66ccee", "move": "#ee6677", "other": "#ccbb44"}
_WORDS = {
    "attention": "fused attention",
    "product": "matrix products",
    "move": "only moving data",
    "other": "norms, element by element",
}
_WIDTH, _BAR, _ROW, _LEFT = 900, 22, 58, 20


def svg_from_engines(engines: Sequence[tuple[str, EngineCost]]) -> str:
    """One bar for each engine, which comes with its title: the bytes its kernels move, by what they are for.

    Where the bytes of one are not known, because its batch is free, all bars are of kernels instead.
    """
    by_bytes = all(cost.figures["bytes_moved"] is not None for _, cost in engines)
    amounts = [{role: _amount(cost, role, by_bytes) for role in ROLES} for _, cost in engines]
    most = max((sum(parts.values()) for parts in amounts), default=0) or 1
    height = _ROW * len(engines) + 70
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#222">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-weight="bold">{"Bytes moved" if by_bytes else "Kernels"} by what they are for</text>',
    ]
    for number, role in enumerate(ROLES):
        x = _LEFT + 205 * number
        lines.append(f'<rect x="{x}" y="36" width="12" height="12" fill="{_COLOURS[role]}"/>')
        lines.append(f'<text x="{x + 18}" y="47">{_WORDS[role]}</text>')
    for number, ((title, cost), parts) in enumerate(zip(engines, amounts, strict=True)):
        y = 84 + _ROW * number
        lines.append(f'<text x="{_LEFT}" y="{y}">{escape(title)}: {escape(_summary(cost))}</text>')
        left = float(_LEFT)
        for role, amount in parts.items():
            width = amount / most * (_WIDTH - 2 * _LEFT)
            shown = f"{amount / 1e6:.1f} MB" if by_bytes else f"{amount} kernels"
            kernels = cost.figures["roles"][role]["kernels"]
            lines.append(
                f'<rect x="{left:.1f}" y="{y + 7}" width="{width:.1f}" height="{_BAR}" fill="{_COLOURS[role]}">'
                f"<title>{_WORDS[role]}: {kernels} kernels, {shown}</title></rect>"
            )
            left += width
    return "\n".join([*lines, "</svg>", ""])


def _amount(cost: EngineCost, role: str, by_bytes: bool) -> int:
    figures = cost.figures["roles"][role]
    return int(figures["bytes_read"] + figures["bytes_written"]) if by_bytes else int(figures["kernels"] or 0)


def _summary(cost: EngineCost) -> str:
    figures = cost.figures
    parts = ["kernels unknown" if figures["kernels"] is None else f"{figures['kernels']} kernels"]
    if figures["bytes_moved"] is not None:
        parts.append(f"{figures['bytes_moved'] / 1e6:.0f} MB")
    if cost.roofline is not None:
        parts.append(f"roofline {cost.roofline.seconds * 1e3:.2f} ms on {cost.roofline.gpu}")
    return ", ".join(parts)
