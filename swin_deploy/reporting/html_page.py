"""The page of a report: one HTML file with its pictures, its figures as JSON, and the library that draws its charts.

Names and labels come from strangers. Jinja escapes them, those in JSON included, and a content security policy allows only the
two scripts of the page, by their digests, and no request.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swin_deploy.bundle import size_text
from swin_deploy.dependencies import require
from swin_deploy.errors import shown

from .charts import charts_of, short_file
from .report_data import ReportContents, figure_or_none

TEMPLATE = "report_page.html"
DRAW = """
const read = id => JSON.parse(document.getElementById(id).textContent);
const text = { labelColor: "var(--ink)", titleColor: "var(--ink)", labelFontSize: 12, titleFontSize: 12, titleFontWeight: 400 };
const lines = { gridColor: "var(--line)", domainColor: "var(--weak)", tickColor: "var(--weak)" };
let width;
async function draw() {
  if (innerWidth === width) return;
  width = innerWidth;
  const narrow = width < 600, limit = narrow ? Math.round(0.36 * width) : 330;
  const config = {
    background: "transparent", font: "system-ui, sans-serif", view: { stroke: null }, axis: { ...text, ...lines },
    axisX: { tickCount: narrow ? 4 : 10, labelOverlap: true, labelSeparation: 10 }, axisY: { labelLimit: limit },
    legend: { ...text, orient: "top", columns: narrow ? 1 : 5, labelLimit: 200 },
  };
  for (const { id, spec } of read("charts"))
    await vegaEmbed(document.getElementById(id), spec, {
      mode: "vega-lite", renderer: "svg", config, actions: { export: true, source: false, compiled: false, editor: false },
    });
  document.body.dataset.ready = "yes";
}
let waiting;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(draw, 200); });
draw();
const open = () => document.querySelectorAll("details:not(.vega-embed *)").forEach(one => one.open = true);
addEventListener("beforeprint", open);
"""


def page_from_report(contents: ReportContents) -> str:
    """Return the HTML of a report."""
    jinja = require("jinja2", "write a report")
    library, data = _vega(), contents.data
    charts = charts_of(data)
    environment = jinja.Environment(
        autoescape=True,
        undefined=jinja.ChainableUndefined,  # results of other releases may lack a figure
        trim_blocks=True,
        lstrip_blocks=True,
        # One line of printable text, whatever a manifest or a label has; markup is what the template marks as safe.
        finalize=lambda value: shown(value) if isinstance(value, str) and not hasattr(value, "__html__") else value,
    )
    environment.filters |= {
        "sci": _sci,
        "fixed": _fixed,
        "percent": _percent,
        "size": _size,
        "bytes": _bytes,
        "file": short_file,
    }
    environment.filters |= {"number": figure_or_none}
    template = environment.from_string(Path(__file__).with_name(TEMPLATE).read_text(encoding="utf-8"))
    safe = jinja.utils.markupsafe.Markup
    policy = " ".join(_digest(script) for script in (library, DRAW))
    page: str = template.render(
        **data,
        data=data,
        views=contents.views,
        charts=charts,
        specs=[{"id": one.id, "spec": {**one.spec, "description": one.text}} for one in charts.values()],
        library=safe(library),
        draw=safe(DRAW),
        policy=safe(policy),
        safe=safe,
        path=shlex.quote(data["bundle"]["path"]),
        filled=_filled,
    )
    return page


@functools.cache
def _vega() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as the text of one script, which vl-convert-python has."""
    bundle: str = require("vl_convert", "draw the charts of a report").javascript_bundle()
    # A closing tag in a string of the script would end it, and an opening comment would hide what follows.
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _sci(value: Any) -> str:
    return "-" if (found := figure_or_none(value)) is None else f"{found:.2e}"


def _fixed(value: Any, digits: int = 2) -> str:
    return "-" if (found := figure_or_none(value)) is None else f"{found:,.{digits}f}"


def _percent(value: Any, digits: int = 2) -> str:
    return "-" if (found := figure_or_none(value)) is None else f"{found:.{digits}%}"


def _size(value: Any) -> str:
    return "-" if value is None else size_text((value[0], value[1]))


def _bytes(value: Any) -> str:
    if (found := figure_or_none(value)) is None:
        return "-"
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if found >= unit), (1, "bytes"))
    return f"{found / unit:.3g} {name}" if found < 1000 * unit else f"{found / unit:.0f} {name}"


def _filled(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> tuple[list[str], list[list[Any]]]:
    """Leave out the columns of a table in which no row has a figure."""
    kept = [place for place in range(len(head)) if place == 0 or any(row[place] != "-" for row in rows)]
    return [head[place] for place in kept], [[row[place] for place in kept] for row in rows]
