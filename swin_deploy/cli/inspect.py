from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swin_deploy.cli.output import (
    json_option,
    print_json,
    print_table,
    stdout_kept_clean,
    teller,
)
from swin_deploy.plots import BLUE, CYAN, RED, YELLOW, Bar, bar_chart, check_plot, write_plot

if TYPE_CHECKING:
    from swin_deploy.exporters.inspection.costs import EngineCost, Inspection


@click.command("inspect", short_help="Count what graphs and engines hold, compute and move.")
@click.argument("path", metavar="BUNDLE|FILE.onnx", type=click.Path(path_type=Path))
@click.option("--compare", metavar="BUNDLE|FILE.onnx", type=click.Path(path_type=Path), help="Another one, side by side.")
@click.option("--gpu", metavar="NAME", help="GPU of the roofline: rtx-4090, l4, h100, sm_89, ... Default: the engine's kind.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="What a FILE.onnx is compiled for.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
    default="auto",
    show_default=True,
    help="What compiles a FILE.onnx.",
)
@click.option(
    "--plot", metavar="FILE", type=click.Path(path_type=Path), help="Draw the engines into a .svg, .png or .pdf file."
)
@click.option("-v", "--verbose", is_flag=True, help="Show all of TensorRT's own messages, not only its warnings.")
@json_option
def command(
    path: Path,
    compare: Path | None,
    gpu: str | None,
    batch: int,
    backend: str,
    plot: Path | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Count the nodes, parameters and operations of graphs, and the kernels and bytes of engines.

    The engines of a bundle are described from what the compiler said when it made them. Any other ONNX file is compiled for
    its figures, and the engine is not kept. The roofline is the time that bytes, operations and launches need at the GPU's
    published peaks: a bound to compare with, and no measurement.
    """
    import swin_deploy

    if plot is not None:
        check_plot(plot)
    say = teller()
    found = []
    try:
        with stdout_kept_clean():
            both = [path, *([compare] if compare is not None else [])]
            # A bundle beside a file has engines for batches of its own.
            batches = [1 if one.is_dir() and any(map(Path.is_file, both)) else batch for one in both]
            for one, size in zip(both, batches, strict=True):
                found.append(swin_deploy.inspect(one, gpu=gpu, batch=size, backend=backend, progress=say.follow))
    finally:
        say.clear()
    if plot is not None:
        titled = [(_shown(one, engine.name), engine) for one in found for engine in one.engines]
        write_plot(plot, engine_chart(titled, plot.suffix[1:]))
        say(f"Wrote {plot}")
    if as_json:
        print_json([one.to_dict() for one in found] if compare is not None else found[0].to_dict())
        return
    _print_graphs(found)
    if any(one.engines for one in found):
        click.echo()
        _print_engines(found)
    if compare is not None:
        _print_comparison(found[0], found[1])
    _explain(found, say)


ROLE_COLOURS = {"attention": BLUE, "product": CYAN, "move": RED, "other": YELLOW}
ROLE_WORDS = {"attention": "fused attention", "product": "matmuls", "move": "data movement", "other": "norms, elementwise"}


def engine_chart(engines: Sequence[tuple[str, EngineCost]], file_format: str) -> bytes:
    """Draw the bytes that the kernels of each engine move, by role; kernels where the bytes of an engine are unknown."""
    by_bytes = all(cost.figures["bytes_moved"] is not None for _, cost in engines)
    bars = []
    for title, cost in engines:
        roles = {role: cost.figures["roles"][role] for role in ROLE_COLOURS}
        amounts = {
            role: (row["bytes_read"] + row["bytes_written"]) / 1e6 if by_bytes else row["kernels"] or 0
            for role, row in roles.items()
        }
        note = "kernels unknown" if cost.figures["kernels"] is None else f"{cost.figures['kernels']} kernels"
        if cost.figures["bytes_moved"] is not None:
            note += f", {cost.figures['bytes_moved'] / 1e6:.0f} MB"
        if cost.roofline is not None:
            note += f"\nroofline {cost.roofline.seconds * 1e3:.2f} ms on {cost.roofline.gpu}"
        bars.append(Bar(title, [(amount, ROLE_COLOURS[role]) for role, amount in amounts.items()], note))
    title = f"{'Bytes moved' if by_bytes else 'Kernels'} by role"
    legend = {ROLE_COLOURS[role]: words for role, words in ROLE_WORDS.items()}
    return bar_chart(bars, title, "MB" if by_bytes else "Kernels", legend, file_format)


def _print_graphs(found: Sequence[Inspection]) -> None:
    rows = []
    for one in found:
        for file, cost in one.graphs.items():
            kinds = ", ".join(f"{kind} {count}" for kind, count in list(cost.nodes.items())[:6])
            rows.append(
                (
                    _shown(one, file),
                    sum(cost.nodes.values()),
                    round(cost.parameters / 1e6, 2),
                    round(cost.parameter_bytes / 1e6, 1),
                    "unknown" if cost.total_flops is None else round(cost.total_flops / 1e9 / cost.batch, 2),
                    kinds,
                )
            )
    print_table(("graph", "nodes", "M parameters", "MB", "GFLOP per image", "most frequent nodes"), rows)


FIGURES: dict[str, Callable[[EngineCost], float | None]] = {
    "kernels": lambda cost: cost.figures["kernels"],
    "fused attention": lambda cost: cost.figures["fused_attention"],
    "only move data": lambda cost: cost.figures["roles"]["move"]["kernels"],
    "MB read": lambda cost: _megabytes(cost.bytes_of("read")),
    "MB written": lambda cost: _megabytes(cost.bytes_of("written")),
    "memory ms": lambda cost: _milliseconds(cost, "memory"),
    "compute ms": lambda cost: _milliseconds(cost, "compute"),
    "launch ms": lambda cost: _milliseconds(cost, "launch"),
    "roofline ms": lambda cost: _milliseconds(cost, "seconds"),
}


def _print_engines(found: Sequence[Inspection]) -> None:
    rows = [
        (
            _shown(one, cost.name),
            ":".join(str(size) for size in dict.fromkeys(cost.batch)),
            *(_known(figure(cost)) for figure in FIGURES.values()),
            ", ".join(f"{kind} {count}" for kind, count in cost.figures["types"].items()),
        )
        for one in found
        for cost in one.engines
    ]
    print_table(("engine", "batch", *FIGURES, "kernels that write"), rows)


def _print_comparison(left: Inspection, right: Inspection) -> None:
    """For each engine of the one that has a counterpart in the other: every figure of both, and their ratio."""
    pairs = [(a, next((b for b in right.engines if b.matches(a)), None)) for a in left.engines]
    matched = [(a, b) for a, b in {a.key: (a, b) for a, b in reversed(pairs)}.values() if b is not None]
    for a, b in reversed(matched):
        click.echo()
        batch = ":".join(str(size) for size in dict.fromkeys(a.batch))
        rows: list[tuple[object, ...]] = []
        for name, figure in FIGURES.items():
            one, other = figure(a), figure(b)
            rows.append((name, _known(one), _known(other), f"{other / one:.2f}" if one and other is not None else "-"))
        print_table((f"{a.precision}, {a.gpu}, batch {batch}", left.path.name, right.path.name, "ratio"), rows)
    if not matched:
        click.echo("\nNo engine of the one has a counterpart in the other, of the same precision, GPU and batch.")


def _explain(found: Sequence[Inspection], say: Callable[[str], None]) -> None:
    from swin_deploy.exporters.inspection.roofline import LAUNCH, find_gpu

    for name in dict.fromkeys(cost.roofline.gpu for one in found for cost in one.engines if cost.roofline is not None):
        gpu = find_gpu(name)
        say(
            f"Roofline on {name}: the larger of memory ({gpu.bandwidth / 1e9:.0f} GB/s) and compute (TFLOPS: fp32 "
            f"{gpu.fp32 / 1e12:g}, fp16 {gpu.fp16 / 1e12:g}, int8 {gpu.int8 / 1e12:g}; {gpu.source}), and "
            f"{LAUNCH * 1e6:g} us for each launch. Not measured."
        )


def _shown(one: Inspection, file: str) -> str:
    return str(one.path) if one.path.is_file() else str(one.path / file)


def _megabytes(count: int | None) -> float | None:
    return None if count is None else round(count / 1e6, 1)


def _milliseconds(cost: EngineCost, part: str) -> float | None:
    return None if cost.roofline is None else round(getattr(cost.roofline, part) * 1e3, 3)


def _known(value: Any) -> Any:
    return "unknown" if value is None else value
