from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, json_option, print_json, print_table
from swin_deploy.options import TuneSpec


@click.command("tune", short_help="Measure what runs a bundle fastest, and store the result in it.")
@click.argument("bundle", type=click.Path(path_type=Path))
@spec_options(TuneSpec)
@json_option
def command(bundle: Path, as_json: bool, **options: Any) -> None:
    """Measure the candidates of `auto` for BUNDLE on this machine, and store the result in its manifest.

    Other machines with the same processor, cores, GPUs, CUDA version and versions of the libraries then load BUNDLE without a
    measurement. Run `tune` once for each kind of machine, and for each number of threads that `load` is called with.
    """
    import swin_deploy

    with console():
        found = swin_deploy.tune(bundle, **given(TuneSpec, options))
    if as_json:
        print_json(found.to_dict())
        return
    rows = [
        (
            row.candidate.backend,
            row.candidate.precision,
            row.candidate.device,
            "-" if row.milliseconds is None else f"{row.milliseconds:.2f}",
            row.verdict,
        )
        for row in found.measured
    ]
    if rows:
        print_table(("back end", "precision", "device", "ms", "verdict"), rows)
        click.echo()
    print_table(("selected", "why"), [(f"{found.backend} {found.precision} on {found.device}", found.reason)])
