from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from swin_deploy.cli.output import json_option, print_json, print_table, teller
from swin_deploy.plots import BLUE, GREY, YELLOW, Bar, bar_chart, check_plot, write_plot

if TYPE_CHECKING:
    from swin_deploy.bench.race import LeftOut, Measurement


@click.command("bench", short_help="Measure latency, throughput, memory and cold start on this machine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", "backends", multiple=True, help="Repeatable. Default: all that are installed, but torch.")
@click.option(
    "--precision", "precisions", multiple=True, help="Repeatable. Default: all that the bundle and the back end have."
)
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), help="Repeatable. Default: 1 and 8.")
@click.option("--device", default="auto", show_default=True, help="Where: cpu, cuda, cuda:1; auto is all that is here.")
@click.option("--weights", help="The checkpoint that was exported: adds rows of PyTorch, which the others are compared with.")
@click.option("--peers", is_flag=True, help="Add the exports of transformers and timm, where they are installed.")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="0 lets the back end choose.")
@click.option("--seconds", default=6.0, show_default=True, type=float, help="For each candidate, in all.")
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(1), help="Candidates take turns so often.")
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="Draw the result into a .svg, .png or .pdf file.")
@json_option
def command(bundle: Path, plot: Path | None, as_json: bool, **options: Any) -> None:
    """Measure BUNDLE here: every back end, device, precision and batch size, each in a process of its own, taking turns.

    The ratio is the time relative to the reference, the first row of the same batch and device: PyTorch where --weights names
    the checkpoint, or where the bundle has random weights. Its interval spans the quartiles of the rounds.
    """
    from swin_deploy.bench.run import bench

    if plot is not None:
        check_plot(plot)
    say = teller()
    try:
        found = bench(bundle, say=say, progress=say.follow, **options)
    finally:
        say.clear()
    machine = "; ".join([str(found.machine), *(f"{device}: {name}" for device, name in found.gpus.items())])
    if plot is not None:
        write_plot(plot, _chart(found.rows, machine, found.reference, plot.suffix[1:]))
        say(f"Wrote {plot}")
    for line in _lines(found.left_out):
        say(f"Left out: {line}")
    say(f"On {machine}; ratios are to {found.reference}")
    if as_json:
        print_json({"bundle": str(bundle), **found.to_dict()})
    else:
        _print_rows(found.rows)


def _chart(rows: Sequence[Measurement], machine: str, reference: str, file_format: str) -> bytes:
    """Draw the median time of one image for each row; the line across the end of a bar spans the quartiles of the rounds."""
    colours = {"swin-deploy": BLUE, "pytorch": GREY}
    bars = []
    for row in rows:
        low, median, high = (float(ms) / row.candidate.batch for ms in np.quantile(row.round_ms, (0.25, 0.5, 0.75)))
        kind = "pytorch" if row.candidate.backend in ("pytorch", "torch.compile") else row.candidate.model
        note = f"{median:.2f} ms, x {row.ratio.median:.2f}, {row.images_per_second:.1f} images/s, {row.peak_memory_mb:.0f} MB"
        bars.append(Bar(str(row.candidate), [(median, colours.get(kind, YELLOW))], note, (low, high)))
    title = f"Time per image (less is better)\n{machine}\nRatios to {reference}"
    return bar_chart(bars, title, "Milliseconds per image", file_format=file_format)


def _print_rows(rows: Sequence[Measurement]) -> None:
    print_table(
        ("model", "back end", "device", "precision", "batch", "runs", "p50 ms", "p90 ms", "p99 ms", "images/s", "peak MB",
         "cold s", "ratio", "quartiles", "distance"),
        [
            (
                row.candidate.model,
                row.candidate.backend,
                row.candidate.device,
                row.candidate.precision,
                row.candidate.batch,
                row.runs,
                *(f"{row.percentiles_ms[p]:.2f}".rjust(7) for p in (50, 90, 99)),
                f"{row.images_per_second:.1f}".rjust(8),
                round(row.peak_memory_mb),
                f"{row.cold_start_seconds:.2f}".rjust(6),
                f"{row.ratio.median:.3f}",
                f"{row.ratio.low:.3f} to {row.ratio.high:.3f}",
                "-" if row.relative_l2 is None else f"{row.relative_l2:.1e}",
            )
            for row in rows
        ],
    )  # fmt: skip


def _lines(left_out: Sequence[LeftOut]) -> list[str]:
    """A line for each reason, with all that it holds for."""
    reasons: dict[str, list[str]] = {}
    for one in left_out:
        reasons.setdefault(one.reason, []).append(str(one.candidate))
    return [f"{'; '.join(names)}: {reason}" for reason, names in reasons.items()]
