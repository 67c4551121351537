from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, json_option, print_json, print_table, stdout_kept_clean, verbose_option
from swin_deploy.options import InspectSpec
from swin_deploy.plots import BLUE, CYAN, RED, YELLOW, Bar, bar_chart, check_plot, write_plot

if TYPE_CHECKING:
    from swin_deploy.exporters.inspection.costs import EngineCost, Inspection


@click.command("inspect")
@click.argument("path", metavar="BUNDLE|FILE.onnx", type=click.Path(path_type=Path))
@click.option("--compare", metavar="BUNDLE|FILE.onnx", type=click.Path(path_type=Path), help="Bundle or file to compare with.")
@spec_options(InspectSpec)
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="Draw the engines: .svg, .png or .pdf.")
@verbose_option
@json_option
def command(path: Path, compare: Path | None, plot: Path | None, verbose: bool, as_json: bool, **options: Any) -> None:
    """Count the nodes, parameters and FLOPs of graphs, and the kernels and bytes of engines.

    Engines of a bundle are described from what the compiler reported when it built them. Any other ONNX file is compiled to
    measure it, and the engine is not kept. The roofline is a lower bound for the latency, from bytes, FLOPs and launches at
    the published peaks of the GPU. It is not a measurement.
    """
    import swin_deploy
    from swin_deploy.exporters.inspection.roofline import LAUNCH, find_gpu

    if plot is not None:
        check_plot(plot)
    keywords = given(InspectSpec, options)
    both = [path, *([compare] if compare is not None else [])]
    with console(verbose) as show:
        with stdout_kept_clean():
            found = []
            for one in both:
                own_batches = one.is_dir() and any(map(Path.is_file, both))  # --batch is for the file beside the bundle
                asked = {name: value for name, value in keywords.items() if not (own_batches and name == "batch")}
                found.append(swin_deploy.inspect(one, **asked, progress=show))
        if plot is not None:
            titled = [(_shown(one, engine.name), engine) for one in found for engine in one.engines]
            write_plot(plot, engine_chart(titled, plot.suffix[1:]))
            show.say(f"Wrote {plot}")
        if as_json:
            print_json([one.to_dict() for one in found] if compare is not None else found[0].to_dict())
        else:
            _print_graphs(found)
            if any(one.engines for one in found):
                _print_engines(found)
            if len(found) > 1:
                _print_comparison(found[0], found[1])
            named = dict.fromkeys(cost.roofline.gpu for one in found for cost in one.engines if cost.roofline is not None)
            for gpu in map(find_gpu, named):
                show.say(
                    f"Roofline of {gpu.name}: the larger of memory ({gpu.bandwidth:.0f} GB/s) and compute (TFLOPS: fp32 "
                    f"{gpu.fp32:g}, fp16 {gpu.fp16:g}, int8 {gpu.int8:g}; {gpu.source}), and "
                    f"{LAUNCH * 1e6:g} us for each kernel launch. This is not a measurement."
                )


ROLE_COLOURS = {"attention": BLUE, "product": CYAN, "move": RED, "other": YELLOW}
ROLE_WORDS = {"attention": "fused attention", "product": "matmuls", "move": "data movement", "other": "norms, elementwise"}


def engine_chart(engines: Sequence[tuple[str, EngineCost]], file_format: str) -> bytes:
    """Draw the bytes that the kernels of each engine move, by role; kernels where the bytes of an engine are unknown."""
    by_bytes = all(cost.figures.bytes_moved is not None for _, cost in engines)
    bars = []
    for title, cost in engines:
        rows = ((colour, cost.figures.of(role)) for role, colour in ROLE_COLOURS.items())
        parts = [
            (((row.bytes_read or 0) + (row.bytes_written or 0)) / 1e6 if by_bytes else row.kernels or 0, colour)
            for colour, row in rows
        ]
        note = "kernels unknown" if cost.figures.kernels is None else f"{cost.figures.kernels} kernels"
        if cost.figures.bytes_moved is not None:
            note += f", {cost.figures.bytes_moved / 1e6:.0f} MB"
        if cost.roofline is not None:
            note += f"\nroofline {cost.roofline.seconds * 1e3:.2f} ms on {cost.roofline.gpu}"
        bars.append(Bar(title, parts, note))
    title = f"{'Bytes moved' if by_bytes else 'Kernels'} by role"
    legend = {ROLE_COLOURS[role]: words for role, words in ROLE_WORDS.items()}
    return bar_chart(bars, title, "MB" if by_bytes else "Kernels", legend, file_format)


def _print_graphs(found: Sequence[Inspection]) -> None:
    rows = [
        (
            _shown(one, file),
            sum(cost.nodes.values()),
            round(cost.parameters / 1e6, 2),
            round(cost.parameter_bytes / 1e6, 1),
            "unknown" if cost.total_flops is None else round(cost.total_flops / 1e9 / cost.batch, 2),
            ", ".join(f"{kind} {count}" for kind, count in list(cost.nodes.items())[:6]),
        )
        for one in found
        for file, cost in one.graphs.items()
    ]
    print_table(("graph", "nodes", "M parameters", "MB", "GFLOP per image", "most frequent nodes"), rows)


def _figures(cost: EngineCost) -> dict[str, Any]:
    moved = {f"MB {way}": cost.bytes_of(way) for way in ("read", "written")}
    times = {"memory ms": "memory", "compute ms": "compute", "launch ms": "launch", "roofline ms": "seconds"}
    figures = {
        "kernels": cost.figures.kernels,
        "fused attention": cost.figures.fused_attention,
        "only move data": cost.figures.of("move").kernels,
        **{name: None if count is None else round(count / 1e6, 1) for name, count in moved.items()},
        **{name: cost.roofline and round(getattr(cost.roofline, part) * 1e3, 3) for name, part in times.items()},
    }
    return {name: "unknown" if value is None else value for name, value in figures.items()}


def _print_engines(found: Sequence[Inspection]) -> None:
    engines = [(one, cost) for one in found for cost in one.engines]
    rows = [
        (
            _shown(one, cost.name),
            ":".join(str(size) for size in dict.fromkeys(cost.batch)),
            *_figures(cost).values(),
            ", ".join(f"{kind} {count}" for kind, count in cost.figures.types.items()),
        )
        for one, cost in engines
    ]
    click.echo()
    print_table(("engine", "batch", *_figures(engines[0][1]), "kernels that write"), rows)


def _print_comparison(left: Inspection, right: Inspection) -> None:
    """Print every figure of both and their ratio, for each pair of engines that can be compared."""
    pairs = [(a, next((b for b in right.engines if b.matches(a)), None)) for a in left.engines]
    matched = [(a, b) for a, b in {a.key: (a, b) for a, b in reversed(pairs)}.values() if b is not None]
    for a, b in reversed(matched):
        click.echo()
        batch = ":".join(str(size) for size in dict.fromkeys(a.batch))
        others = _figures(b)
        rows = [
            (name, one, others[name], "-" if not one or "unknown" in (one, others[name]) else f"{others[name] / one:.2f}")
            for name, one in _figures(a).items()
        ]
        print_table((f"{a.precision}, {a.gpu}, batch {batch}", left.path.name, right.path.name, "ratio"), rows)
    if not matched:
        click.echo("\nThe two have no engines of the same precision, GPU and batch.")


def _shown(one: Inspection, file: str) -> str:
    return str(one.path) if one.path.is_file() else str(one.path / file)
