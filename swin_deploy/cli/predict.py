from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, json_option, print_json, print_table
from swin_deploy.errors import UsageError
from swin_deploy.options import LoadSpec


@click.command("predict", short_help="Classify images.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "-k", "--top-k", default=5, show_default=True, type=click.IntRange(1), help="Number of classes to print per image."
)
@spec_options(LoadSpec, only=("precision", "backend", "device"))
@json_option
def command(bundle: Path, images: tuple[str, ...], top_k: int, as_json: bool, **options: Any) -> None:
    """Print the most likely classes of every IMAGE with their probabilities."""
    import swin_deploy
    from swin_deploy.bundle import Bundle
    from swin_deploy.preprocess import read_image

    # Invalid arguments are refused before the model is loaded, which may take a measurement.
    manifest = Bundle.open(bundle).manifest
    if (task := manifest["task"]["name"]) != "image-classification":
        raise UsageError(
            f"{bundle} was exported for the task {task}, but predict needs image-classification. Run it in Python "
            f"(swin_deploy.load), or export it with --task image-classification."
        )
    for image in images:
        if not os.path.isfile(image):  # noqa: PTH113 - Path.is_file raises for a name that is too long
            read_image(image)  # raises an error that names the problem
    if assumed := manifest.get("preprocessing", {}).get("assumed"):
        click.echo(f"Warning: {assumed}", err=True)
    with console():
        model = swin_deploy.load(bundle, **given(LoadSpec, options))
    with model:
        found, about = model.classify(images, top_k=top_k), model.describe()
    click.echo(f"Run by {about.backend} {about.version}, {about.precision}, on {about.device}", err=True)
    if as_json:
        print_json(
            [{"image": image, "predictions": [asdict(p) for p in best]} for image, best in zip(images, found, strict=True)]
        )
        return
    rows = [
        (image if rank == 1 else "", rank, f"{p.score:7.2%}", p.label)
        for image, predictions in zip(images, found, strict=True)
        for rank, p in enumerate(predictions, start=1)
    ]
    print_table(("image", "rank", "  score", "label"), rows)
