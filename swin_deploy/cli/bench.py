from __future__ import annotations

from pathlib import Path

import click

from swin_deploy.cli.output import json_option, print_json, print_table, teller


@click.command("bench", short_help="Measure latency, throughput and memory on this machine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", "backends", multiple=True, default=("onnxruntime",), show_default=True, help="Repeatable.")
@click.option("--precision", "precisions", multiple=True, default=("fp32",), show_default=True, help="Repeatable.")
@click.option("--batch", "batches", multiple=True, default=(1,), show_default=True, type=click.IntRange(1), help="Repeatable.")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="0 lets the back end choose.")
@click.option("--seconds", default=6.0, show_default=True, type=click.FloatRange(0.1), help="For each candidate, in all.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Candidates take turns so often.")
@json_option
def command(
    bundle: Path,
    backends: tuple[str, ...],
    precisions: tuple[str, ...],
    batches: tuple[int, ...],
    threads: int,
    seconds: float,
    rounds: int,
    as_json: bool,
) -> None:
    """Measure BUNDLE here: every back end, precision and batch size given, each in a process of its own, taking turns."""
    import swin_deploy
    from swin_deploy.bench import Candidate, bench

    candidates = [Candidate(b, p, n, threads) for b in backends for p in precisions for n in batches]
    for backend, precision in dict.fromkeys((c.backend, c.precision) for c in candidates):
        swin_deploy.load(bundle, precision=precision, backend=backend).close()  # what is wrong is said before measuring
    found = bench(bundle, candidates, seconds, rounds, teller())
    if as_json:
        print_json([m.to_dict() for m in found])
        return
    print_table(
        (
            "back end",
            "precision",
            "batch",
            "runs",
            "min ms",
            "p50 ms",
            "p90 ms",
            "p99 ms",
            "images/s",
            "peak MB",
            "load s",
        ),
        [
            (
                m.candidate.backend,
                m.candidate.precision,
                m.candidate.batch,
                m.runs,
                round(m.min_ms, 2),
                *(round(m.percentiles_ms[p], 2) for p in (50, 90, 99)),
                round(m.images_per_second, 1),
                round(m.peak_memory_mb),
                round(m.load_seconds, 2),
            )
            for m in found
        ],
    )
