from __future__ import annotations

from typing import Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, json_option, print_json, print_table, stdout_kept_clean
from swin_deploy.options import DiffSpec


@click.command("diff")
@click.argument("a")
@click.argument("b")
@spec_options(DiffSpec)
@json_option
def command(a: str, b: str, as_json: bool, **options: Any) -> None:
    """Compare B with A, two graphs of one network, and name the first part that differs and the likely cause.

    A and B are each BUNDLE[:PRECISION][@BACKEND], FILE.onnx[@BACKEND] or a checkpoint. Graphs may come from different
    exporters and have different layouts and types. The exit code is 1 if they differ by more than their types explain.
    """
    import swin_deploy

    with console() as show, stdout_kept_clean():
        found = swin_deploy.diff(a, b, **given(DiffSpec, options), progress=show)
    if as_json:
        print_json(found.to_dict())
    else:
        print_table(
            ("point", "relative L2", "SQNR dB", "cosine", "max abs"),
            [
                (
                    one.point.title(),
                    f"{one.relative_l2:.2e}",
                    f"{one.sqnr_db:.1f}",
                    f"{one.cosine:.6f}",
                    f"{one.max_abs:.2e}",
                )
                for one in found.points
            ],
        )
        click.echo()
        if found.first is None:
            click.echo("Equal: the types of the graphs explain all differences.")
        else:
            click.echo(f"First difference: {found.first.point.title()} ({found.first.tensor})")
            click.echo(found.first.cause)
    if not found.equal:
        click.get_current_context().exit(1)
