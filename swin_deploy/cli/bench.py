from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, json_option, print_json, print_table
from swin_deploy.options import BenchSpec
from swin_deploy.plots import BLUE, GREY, YELLOW, Bar, bar_chart, check_plot, write_plot

if TYPE_CHECKING:
    from swin_deploy.bench.race import Measurement


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@spec_options(BenchSpec)
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="Draw the result: .svg, .png or .pdf.")
@json_option
def command(bundle: Path, plot: Path | None, as_json: bool, **options: Any) -> None:
    """Measure BUNDLE on this machine: every back end, device, precision and batch size, each in its own process.

    The ratio is the time relative to the reference: PyTorch, if --weights names the checkpoint or the bundle has random
    weights, otherwise the first row of the same batch and device. The quartiles are those of the ratios in each round.
    """
    from swin_deploy.bench.run import bench

    if plot is not None:
        check_plot(plot)
    with console() as show:
        found = bench(bundle, **given(BenchSpec, options), progress=show)
        machine = "; ".join([str(found.machine), *(f"{device}: {name}" for device, name in found.gpus.items())])
        if plot is not None:
            write_plot(plot, _chart(found.rows, machine, found.reference, plot.suffix[1:]))
            show.say(f"Wrote {plot}")
        reasons: dict[str, list[str]] = {}
        for case, reason in found.skipped.items():
            reasons.setdefault(reason, []).append(str(case))
        for reason, names in reasons.items():
            show.say(f"Skipped {'; '.join(names)}: {reason}")
        if found.latency_ms is not None:
            show.say(f"Each row has the largest batch with a median of at most {found.latency_ms:g} ms; ratios are per image")
        show.say(f"On {machine}; ratios to {found.reference}")
    if as_json:
        print_json({"bundle": str(bundle), **found.to_dict()})
    else:
        _print_rows(found.rows)


def _chart(rows: Sequence[Measurement], machine: str, reference: str, file_format: str) -> bytes:
    """Draw the median time of one image for each row, with the quartiles of the rounds."""
    import numpy as np

    colours = {"swin-deploy": BLUE, "pytorch": GREY}
    bars = []
    for row in rows:
        low, median, high = (float(ms) / row.case.batch for ms in np.quantile(row.round_ms, (0.25, 0.5, 0.75)))
        kind = "pytorch" if row.case.backend in ("pytorch", "torch.compile") else row.case.model
        note = (
            f"{median:.2f} ms, x {row.ratio['median']:.2f}, {row.images_per_second:.1f} images/s, {row.peak_memory_mb:.0f} MB"
        )
        bars.append(Bar(str(row.case), [(median, colours.get(kind, YELLOW))], note, (low, high)))
    title = f"Time per image (less is better)\n{machine}\nRatios to {reference}"
    return bar_chart(bars, title, "Milliseconds per image", file_format=file_format)


def _print_rows(rows: Sequence[Measurement]) -> None:
    table = [
        {
            "model": row.case.model,
            "back end": row.case.backend,
            "device": row.case.device,
            "precision": row.case.precision,
            "batch": row.case.batch,
            "runs": row.runs,
            **{f"p{p} ms": f"{row.percentiles_ms[p]:.2f}".rjust(7) for p in (50, 90, 99)},
            "images/s": f"{row.images_per_second:.1f}".rjust(8),
            "peak MB": round(row.peak_memory_mb),
            "cold s": f"{row.cold_start_seconds:.2f}".rjust(6),
            "ratio": f"{row.ratio['median']:.3f}",
            "quartiles": f"{row.ratio['low']:.3f} to {row.ratio['high']:.3f}",
            "distance": "-" if row.relative_l2 is None else f"{row.relative_l2:.1e}",
        }
        for row in rows
    ]
    print_table(list(table[0]), [list(row.values()) for row in table])
