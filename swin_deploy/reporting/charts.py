"""The charts of a report as Vega-Lite specifications. Colours are CSS variables of the page, so they follow its theme."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swin_deploy.errors import shown

COLOURS = tuple(f"var(--chart-{number})" for number in range(1, 6))
INK, WEAK = "var(--ink)", "var(--weak)"
ROLES = {"attention": "fused attention", "product": "matmuls", "move": "data movement", "other": "norms, elementwise"}
LEAST = 1e-9  # of a logarithmic axis
_BLOCK = re.compile(r"stages\.(\d+)\.steps\.block(\d+)\.(.+)")
_MERGE = re.compile(r"merges\.(\d+)\.(.+)")

Row = Mapping[str, Any]
Spec = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A chart: the id of its place in the page, its title, what a screen reader says, and whether it can be zoomed."""

    id: str
    title: str
    text: str
    spec: Spec
    zooms: bool = False


def short_layer(name: str) -> str:
    """Return "2.5 fc1" for the layer stages.2.steps.block5.fc1."""
    if (match := _BLOCK.fullmatch(name)) is not None:
        return shown(f"{match[1]}.{match[2]} {match[3].removeprefix('attention.')}")
    match = _MERGE.fullmatch(name)
    return shown(name if match is None else f"{match[1]} merge {match[2]}")


def short_file(name: str) -> str:
    """Return the name of a graph or engine without its folder and ending."""
    return shown(name.rpartition("/")[2].removesuffix(".onnx").removesuffix(".engine"))


def charts_of(data: Mapping[str, Any]) -> dict[str, Chart]:
    """Return the charts for which `data` has figures, by id."""
    found = [
        _parity(data["parity"]),
        *(chart for number, one in enumerate(data["quantized"]) for chart in _quantization(number, one)),
        *_engines(
            data["inspect"]["engines"], data["inspect"]["graphs"], {one["file"]: one["graph"] for one in data["engines"]}
        ),
        _bench(data["bench"]),
    ]
    return {chart.id: chart for chart in found if chart is not None}


def _parity(rows: Sequence[Row]) -> Chart | None:
    values = [
        {
            "file": short_file(row["file"]),
            "distance": max(row["relative_l2"], LEAST),
            "tolerance": row["tolerance_relative_l2"],
            "source": "stored" if row["from"] == "manifest" else "verify, now",
        }
        for row in rows
        if row.get("relative_l2") is not None and row.get("tolerance_relative_l2")
    ]
    if not values:
        return None
    worst = max(values, key=lambda one: one["distance"] / one["tolerance"])
    text = (
        f"Distance from PyTorch of {len(values)} comparisons on a logarithmic axis, each with its tolerance. Closest to its "
        f"tolerance is {worst['file']}: {worst['distance']:.2g} of {worst['tolerance']:.2g}."
    )
    x = {
        "type": "quantitative",
        "scale": {"type": "log", "nice": True},
        "axis": {"format": ".0e", "tickCount": 6, "labelOverlap": "parity", "labelSeparation": 10},
    }
    tips = [_tip("file"), _tip("source"), _tip("distance", ".2e", "relative L2"), _tip("tolerance", ".0e")]
    layers = [
        _layer(
            "tick",
            thickness=3,
            size=16,
            color=COLOURS[1],
            x={**x, "field": "tolerance", "title": "relative L2 (dot), tolerance (bar)"},
        ),
        _layer("point", filled=True, size=90, color=COLOURS[0], shape="source", x={**x, "field": "distance"}),
    ]
    return Chart("chart-parity", "Distance from PyTorch", text, _rows(values, "file", layers, tips))


def _quantization(number: int, found: Row) -> list[Chart]:
    title, charts = short_file(found["file"]), []
    states, kept = ["quantized", "kept in higher precision"], set(found["kept"])
    values: list[dict[str, Any]] = [
        {"layer": short_layer(one["name"]), "sqnr": one["sqnr_db"], "state": states[one["name"] in kept]}
        for one in found["sensitivity"]
        if one["sqnr_db"] is not None
    ]
    if values:
        worst = ", ".join(f"{one['layer']} ({one['sqnr']:.1f} dB)" for one in values[:3])
        text = f"SQNR of the outputs if only one of {len(values)} layers is quantized. Most sensitive: {worst}."
        tips = [_tip("layer"), _tip("sqnr", ".1f", "SQNR in dB"), _tip("state")]
        layer = _layer(
            "bar", color={"field": "state", "scale": {"domain": states, "range": list(COLOURS[:2])}}, x=_x("sqnr", "SQNR in dB")
        )
        charts.append(
            Chart(
                f"chart-sensitivity-{number}",
                f"Sensitivity of the layers of {title}",
                text,
                _rows(values, "layer", [layer], tips),
            )
        )
    rows = found["ranges"]
    if rows and "observed" in rows[0]:
        charts += _histograms(number, title, rows)
    elif rows:
        values = [{"layer": name, "low": row["low"], "high": row["high"]} for name, row in zip(_names(rows), rows, strict=True)]
        widest = max(values, key=lambda one: one["high"] - one["low"])
        ends = f"{widest['low']:.3g} to {widest['high']:.3g}"
        text = f"Ranges of {len(rows)} quantized activations. The widest is {widest['layer']}: {ends}."
        tips = [_tip("layer"), _tip("low", ".4g"), _tip("high", ".4g")]
        layer = _layer(
            "bar", color=COLOURS[0], x=_x("low", "represented values", scale={"type": "symlog"}), x2={"field": "high"}
        )
        charts.append(
            Chart(f"chart-ranges-{number}", f"Ranges of {title}", text, _rows(values, "layer", [layer], tips, zoom=True), True)
        )
    return charts


def _names(rows: Sequence[Row]) -> list[str]:
    """Return a different name for each activation: of its layer, and the tensor where a layer reads several."""
    layers = [row["layer"] for row in rows]
    names = [
        short_layer(row["layer"]) + ("" if layers.count(row["layer"]) == 1 else f" {shown(row['tensor'])}") for row in rows
    ]
    return [name if names.count(name) == 1 else f"{name} #{place}" for place, name in enumerate(names)]


def _histograms(number: int, title: str, rows: Sequence[Row]) -> list[Chart]:
    names, cells = _names(rows), []
    for name, row in zip(names, rows, strict=True):
        seen = row["observed"]
        most = math.log1p(max(seen["counts"]) or 1)
        cells += [
            {
                "layer": name,
                "from": round(seen["first"] + place * seen["width"], 2),
                "to": round(seen["first"] + (place + 1) * seen["width"], 2),
                "share": round(100 * count / max(seen["values"], 1), 6),
                "weight": round(math.log1p(count) / most, 3),
            }
            for place, count in enumerate(seen["counts"])
            if count
        ]
    first = rows[0]["observed"]
    low = first["first"] + 8 * first["width"]
    high = low + 64 * first["width"]
    limits = {
        "data": {"values": [{"limit": low}, {"limit": high}]},
        "mark": {"type": "rule", "color": COLOURS[1], "strokeDash": [4, 3]},
        "encoding": {"x": {"field": "limit", "type": "quantitative"}},
    }
    worst = max(zip(names, rows, strict=True), key=lambda one: one[1]["observed"]["clipped"])
    text = (
        f"How the values of {len(rows)} activations fill their ranges. Dashed lines are the limits. Most values are cut off in "
        f"{worst[0]}: {worst[1]['observed']['clipped']:.2%}."
    )
    tips = [
        _tip("layer"),
        _tip("from", ".0f", "quantized value from"),
        _tip("to", ".0f"),
        _tip("share", ".4f", "% of the values"),
    ]
    x = _x("from", "quantized value", scale={"domain": [first["first"], first["first"] + 80 * first["width"]], "nice": False})
    heat = _layer(
        "rect",
        color=COLOURS[0],
        x=x,
        x2={"field": "to"},
        opacity={"field": "weight", "type": "quantitative", "legend": None, "scale": {"range": [0.08, 1]}},
    )
    overview = _rows(cells, "layer", [heat, limits], tips, step=15, zoom=True)
    chosen = {"name": "layer", "value": worst[0], "bind": {"input": "select", "name": "Layer ", "options": names}}
    bar = _layer(
        "bar",
        color=COLOURS[0],
        x=x,
        x2={"field": "to"},
        y={"field": "share", "type": "quantitative", "title": "% of the values"},
        y2={"datum": 0},
        tooltip=tips[1:],
    )
    bar["transform"] = [{"filter": "datum.layer === layer"}]
    one = {
        "data": {"values": cells},
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "height": 220,
        "layer": [{**bar, "params": [_zoom()]}, limits],
        "params": [chosen],
    }
    return [
        Chart(f"chart-ranges-{number}", f"Values in the ranges of {title}", text, overview, True),
        Chart(
            f"chart-range-{number}",
            "Values of one activation",
            f"Histogram of the values of one activation, at first {worst[0]}.",
            one,
            True,
        ),
    ]


def _engines(engines: Sequence[Row], graphs: Mapping[str, Row], sources: Mapping[str, str]) -> list[Chart]:
    charts, named = [], [(_engine_name(one, engines), one) for one in engines]
    values = [
        {
            "engine": name,
            "role": ROLES[role],
            "kernels": figures["kernels"],
            "megabytes": ((figures.get("bytes_read") or 0) + (figures.get("bytes_written") or 0)) / 1e6,
        }
        for name, one in named
        for role, figures in one["roles"].items()
        if role in ROLES and figures.get("kernels") is not None
    ]
    for field, what, key in (("megabytes", "MB moved", "bytes"), ("kernels", "kernels", "kernels")):
        totals = {name: sum(one[field] for one in values if one["engine"] == name) for name, _ in named}
        if not any(totals.values()):
            continue
        listed = "; ".join(f"{name}: {total:.4g}" for name, total in totals.items())
        colour = {
            "field": "role",
            "sort": list(ROLES.values()),
            "scale": {"domain": list(ROLES.values()), "range": list(COLOURS[:4])},
        }
        layer = _layer("bar", color=colour, x=_x(field, what), order={"field": "role"})
        tips = [_tip("engine"), _tip("role"), _tip("kernels"), _tip("megabytes", ".2f", "MB")]
        spec = _rows(values, "engine", [layer], tips, step=34)
        charts.append(
            Chart(f"chart-{key}", f"{what[0].upper()}{what[1:]} by role", f"Total {what} of each engine: {listed}.", spec)
        )
    bounds = [(name, one, one["roofline"]) for name, one in named if one["roofline"]]
    if bounds:
        parts = [
            {"engine": name, "part": part, "ms": bound[part] * 1e3}
            for name, _, bound in bounds
            for part in ("memory", "compute", "launch")
        ]
        listed = "; ".join(f"{name}: {bound['seconds'] * 1e3:.3g} ms" for name, _, bound in bounds)
        layer = _layer(
            "bar",
            color={"field": "part", "sort": None, "scale": {"range": list(COLOURS[:3])}},
            x=_x("ms", "milliseconds"),
            yOffset={"field": "part", "sort": None},
        )
        spec = _rows(parts, "engine", [layer], [_tip("engine"), _tip("part"), _tip("ms", ".4f")], step=54)
        text = f"Lower bounds of the latency: the larger of memory and compute, plus launches. {listed}."
        charts.append(Chart("chart-bounds", "Lower bounds of the latency (not a measurement)", text, spec))
        charts += _roofline(bounds, graphs, sources)
    return charts


def _roofline(bounds: Sequence[tuple[str, Row, Row]], graphs: Mapping[str, Row], sources: Mapping[str, str]) -> list[Chart]:
    """Draw attainable rates over operations per byte: roofs of the GPUs, and the bound of each engine."""
    from swin_deploy.exporters.inspection.roofline import find_gpu

    points = []
    for name, one, bound in bounds:
        graph = graphs.get(sources.get(one["engine"], ""))
        if graph is None or not graph["flops"] or not one["bytes_moved"]:
            continue
        flops = sum(graph["flops"].values()) / graph["batch"] * one["batch"][1]
        points.append(
            {"engine": name, "x": flops / one["bytes_moved"], "y": flops / bound["seconds"] / 1e12, "line": bound["gpu"]}
        )
    if not points:
        return []
    ends = (min(one["x"] for one in points) / 8, max(one["x"] for one in points) * 8)
    lines = []
    for gpu in map(find_gpu, dict.fromkeys(one["line"] for one in points)):
        for kind in ("fp32", "fp16", "int8"):
            if peak := getattr(gpu, kind):
                ridge = peak * 1e3 / gpu.bandwidth
                places = sorted({ends[0], min(max(ridge, ends[0]), ends[1]), ends[1]})
                lines += [{"roof": f"{gpu.name} {kind}", "x": x, "y": min(peak, gpu.bandwidth * x / 1e3)} for x in places]
    x = {
        "field": "x",
        "type": "quantitative",
        "scale": {"type": "log", "nice": False},
        "title": "operations per byte",
        "axis": {"tickCount": 5},
    }
    y = {"field": "y", "type": "quantitative", "scale": {"type": "log"}, "title": "TFLOPS", "axis": {"tickCount": 5}}
    tips = [_tip("engine"), _tip("x", ".1f", "operations per byte"), _tip("y", ".2f", "TFLOPS at the bound")]
    colour = {"field": "roof", "type": "nominal", "title": None, "scale": {"range": list(COLOURS)}}
    spec = {
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "height": 260,
        "layer": [
            {
                "data": {"values": lines},
                "mark": {"type": "line", "strokeWidth": 2},
                "encoding": {"x": x, "y": y, "color": colour, "tooltip": [_tip("roof")]},
                "params": [_zoom(("x", "y"))],
            },
            {
                "data": {"values": points},
                "mark": {"type": "point", "filled": True, "size": 110, "color": INK, "opacity": 1},
                "encoding": {"x": x, "y": y, "tooltip": tips},
            },
        ],
    }
    listed = "; ".join(f"{one['engine']}: {one['x']:.3g} operations per byte, {one['y']:.3g} TFLOPS" for one in points)
    return [Chart("chart-roofline", "Roofline", f"Bound of each engine under the roofs of its GPU. {listed}.", spec, True)]


def _engine_name(one: Row, engines: Sequence[Row]) -> str:
    several = sum(other["engine"] == one["engine"] for other in engines) > 1
    return short_file(one["engine"]) + (f" batch {one['batch'][1]}" if several else "")


def _bench(found: Row | None) -> Chart | None:
    if found is None or not found["rows"]:
        return None
    values, several = [], len({row["batch"] for row in found["rows"]}) > 1
    for row in found["rows"]:
        rounds = sorted(ms / row["batch"] for ms in row["round_ms"])
        low, median, high = (rounds[round((len(rounds) - 1) * part)] for part in (0.25, 0.5, 0.75))
        name = f"{row['precision']} {row['backend']}" + ("" if row["model"] == "swin-deploy" else f" ({row['model']})")
        name += ("" if row["device"] == "cpu" else f" on {row['device']}") + (f", batch {row['batch']}" if several else "")
        values.append({"case": shown(name), "ms": median, "low": low, "high": high, "rate": row["images_per_second"]})
    best = min(values, key=lambda one: one["ms"])
    tips = [
        _tip("case"),
        _tip("ms", ".3f", "ms for each image, median of the rounds"),
        _tip("low", ".3f"),
        _tip("high", ".3f"),
        _tip("rate", ".1f", "images/s"),
    ]
    layers = [
        _layer("bar", color=COLOURS[0], x=_x("ms", "ms for each image")),
        _layer("rule", strokeWidth=3, color=INK, x=_x("low", ""), x2={"field": "high"}),
    ]
    text = f"Median times of {len(values)} candidates, with quartiles. Fastest: {best['case']}, {best['ms']:.3g} ms."
    return Chart("chart-bench", "Time for each image", text, _rows(values, "case", layers, tips))


def _rows(
    values: Sequence[Row], field: str, layers: Sequence[Spec], tips: Sequence[Spec], step: int = 24, zoom: bool = False
) -> Spec:
    """Return a chart with a row for each value of `field`, in their order."""
    names = list(dict.fromkeys(one[field] for one in values))
    y = {"field": field, "type": "nominal", "sort": None, "title": None, "scale": {"domain": names}}
    drawn: list[Spec] = []
    for number, layer in enumerate(layers):
        own = {} if "data" in layer else {"y": y, "tooltip": list(tips)}
        drawn.append(
            {**layer, "encoding": {**own, **layer["encoding"]}, **({"params": [_zoom()]} if zoom and not number else {})}
        )
    return {
        "data": {"values": list(values)},
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "height": step * len(names),
        "layer": drawn,
    }


def _layer(mark: str, color: Any = None, **settings: Any) -> Spec:
    """Return one layer: settings that are channels of an encoding, and those of the mark."""
    channels = {"x", "x2", "y", "y2", "yOffset", "opacity", "order", "tooltip"}
    encoding = {name: value for name, value in settings.items() if name in channels}
    style = {name: value for name, value in settings.items() if name not in channels and name != "shape"}
    if "shape" in settings:
        encoding["shape"] = {"field": settings["shape"], "title": None}
    if isinstance(color, dict):
        encoding["color"] = {"type": "nominal", "title": None, **color}
    elif color is not None:
        style["color"] = color
    return {"mark": {"type": mark, **style}, "encoding": encoding}


def _x(field: str, title: str, **more: Any) -> Spec:
    return {"field": field, "type": "quantitative", "title": title, **more}


def _tip(field: str, style: str | None = None, title: str | None = None) -> Spec:
    return {"field": field, "title": title or field, **({} if style is None else {"format": style, "type": "quantitative"})}


def _zoom(encodings: Sequence[str] = ("x",)) -> Spec:
    """Return the parameter that zooms with Ctrl and the wheel and moves with the mouse, so that pages scroll as usual."""
    return {
        "name": "zoom",
        "select": {
            "type": "interval",
            "encodings": list(encodings),
            "zoom": "wheel![event.ctrlKey]",
            "translate": "[pointerdown[event.pointerType === 'mouse'], window:pointerup] > window:pointermove!",
        },
        "bind": "scales",
    }
