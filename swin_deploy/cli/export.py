from __future__ import annotations

from pathlib import Path

import click

from swin_deploy.cli.output import json_option, print_json, teller


@click.command("export", short_help="Export a checkpoint to a verified ONNX bundle.")
@click.option("--variant", metavar="NAME", help='A published checkpoint, such as swinv2-tiny; see "swin-deploy variants".')
@click.option(
    "--weights", metavar="FOLDER", help="A folder that save_pretrained wrote, or a hub id. Default: the variant's own."
)
@click.option("--random-weights", is_flag=True, help="Take reproducible random weights instead of a checkpoint.")
@click.option("--seed", default=0, show_default=True, help="The seed of --random-weights.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The bundle to write. Default: ./NAME.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there already.")
@json_option
def command(
    variant: str | None,
    weights: str | None,
    random_weights: bool,
    seed: int,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Export a Swin checkpoint to an ONNX bundle, and compare it with PyTorch before it is kept.

    Prints the bundle's folder. Nothing is written when anything goes wrong.
    """
    import swin_deploy
    from swin_deploy.reference import described
    from swin_deploy.specs import graph_file

    say = teller()
    bundle = swin_deploy.export(
        variant, weights=weights, random_weights=random_weights, seed=seed, output=output, force=force, say=say
    )
    entry = bundle.files[graph_file("fp32")]
    agreement = entry["agreement"] if isinstance(entry["agreement"], dict) else None
    say(f"Wrote {bundle.path} ({entry['bytes'] / 1e6:.1f} MB of ONNX): {described(agreement)}")
    if agreement is None:
        say('ONNX Runtime is not installed, so nothing was compared: pip install "swin-deploy[onnxruntime]"')
    if as_json:
        print_json({"bundle": str(bundle.path), **bundle.manifest})
    else:
        click.echo(str(bundle.path))
