from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, json_option, print_json, stdout_kept_clean
from swin_deploy.options import ReportSpec


@click.command("report")
@click.argument("bundle", type=click.Path(path_type=Path))
@spec_options(ReportSpec)
@json_option
def command(bundle: Path, as_json: bool, **options: Any) -> None:
    """Write what is known about BUNDLE as one HTML page: agreement with PyTorch, accuracy, kernels, ranges, speed, origin.

    The page needs no network. With --data, it shows how the network sees these images, and what it sees in them. Figures that
    the bundle does not have are left out, and the page names the command that measures them.
    """
    import swin_deploy

    with console() as show, stdout_kept_clean():
        made = swin_deploy.report(bundle, **given(ReportSpec, options), progress=show)
    if as_json:
        print_json(made.data)
    else:
        click.echo(str(made.output))
