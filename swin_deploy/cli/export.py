from __future__ import annotations

from typing import Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, json_option, print_json
from swin_deploy.options import ExportSpec


@click.command("export")
@spec_options(ExportSpec)
@json_option
def command(as_json: bool, **options: Any) -> None:
    """Export a Swin checkpoint to an ONNX bundle, and compare it with PyTorch before it is kept.

    Prints the folder of the bundle. Nothing is written if a step fails.
    """
    import swin_deploy
    from swin_deploy.parity import verdict_text

    with console() as show:
        bundle = swin_deploy.export(**given(ExportSpec, options), progress=show)
        for file, entry in bundle.graphs.items():
            show.say(f"Wrote {bundle.path / file}: {verdict_text(entry.relative_l2)}")
            if entry.agreement is None:
                show.say('Not compared, because ONNX Runtime is not installed: pip install "swin-deploy[onnxruntime]"')
    if as_json:
        print_json({"bundle": str(bundle.path), **bundle.manifest.to_dict()})
    else:
        click.echo(str(bundle.path))
