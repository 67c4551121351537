from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, json_option, print_json, print_table
from swin_deploy.options import TuneSpec


@click.command("tune")
@click.argument("bundle", type=click.Path(path_type=Path))
@spec_options(TuneSpec)
@json_option
def command(bundle: Path, as_json: bool, **options: Any) -> None:
    """Measure the candidates of `auto` for BUNDLE on this machine, and store the result in its manifest.

    Other machines with the same processor, cores, GPUs, CUDA version and versions of the libraries then load BUNDLE without a
    measurement. Run `tune` once for each kind of machine.
    """
    import swin_deploy

    with console():
        found = swin_deploy.tune(bundle, **given(TuneSpec, options))
    if as_json:
        print_json([one.to_dict() for one in found])
        return
    rows = [
        (
            one.threads or "all",
            row.candidate.backend,
            row.candidate.precision,
            row.candidate.device,
            "-" if row.milliseconds is None else f"{row.milliseconds:.2f}",
            row.verdict,
        )
        for one in found
        for row in one.measured
    ]
    if rows:
        print_table(("threads", "back end", "precision", "device", "ms", "verdict"), rows)
        click.echo()
    selected = [(one.threads or "all", f"{one.backend} {one.precision} on {one.device}", one.reason) for one in found]
    print_table(("threads", "selected", "why"), selected)
