from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, json_option, print_json, print_table, stdout_kept_clean, verbose_option
from swin_deploy.options import RefitSpec


@click.command("refit")
@click.argument("bundle", type=click.Path(path_type=Path))
@spec_options(RefitSpec)
@verbose_option
@json_option
def command(bundle: Path, verbose: bool, as_json: bool, **options: Any) -> None:
    """Put the weights back into the engines of BUNDLE that were built with --strip-weights.

    The weights come from the graphs of the bundle. Needs the GPU that the engines were built for. The engines are written as
    further files; those without weights stay.
    """
    import swin_deploy

    with console(verbose), stdout_kept_clean():
        built = swin_deploy.refit(bundle, **given(RefitSpec, options))
    if as_json:
        print_json([{"engine": str(bundle / one.file), "reused": one.reused, **one.entry.to_dict()} for one in built])
        return
    print_table(("engine", "MB"), [(str(bundle / one.file), round(one.entry.bytes / 1e6, 1)) for one in built])
