from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, json_option, print_json, print_table, stdout_kept_clean
from swin_deploy.options import DebugSpec


@click.command("debug")
@click.argument("bundle", type=click.Path(path_type=Path))
@spec_options(DebugSpec)
@json_option
def command(bundle: Path, as_json: bool, **options: Any) -> None:
    """Find the fewest layers of BUNDLE that must stay in higher precision, so that INT8 or FP8 is within a bound of fp32.

    The layers are quantized as `quantize` does it, with the images of --data. The exit code is 1 if the bound cannot be met.
    """
    import swin_deploy

    with console() as show, stdout_kept_clean():
        found = swin_deploy.debug(bundle, **given(DebugSpec, options), progress=show)
    if as_json:
        print_json(found.to_dict())
    else:
        print_table(
            ("layer", "SQNR dB if only it is quantized", "stays in"),
            [(one.name, f"{one.sqnr_db:.1f}", "fp32" if one.name in found.kept else "8 bits") for one in found.ranking],
        )
        click.echo()
        change = f"relative L2 {found.before:.3g} before, {found.after:.3g} now"
        click.echo(f"{len(found.kept)} of {found.layers} layers put back: {change}.")
        if found.written is not None:
            click.echo(f"Wrote {found.written}")
    if not found.reached:
        click.get_current_context().exit(1)
