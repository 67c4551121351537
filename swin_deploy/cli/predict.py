from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import click

from swin_deploy.cli.output import json_option, log_told, print_json, print_table, teller
from swin_deploy.errors import UsageError


@click.command("predict", short_help="Name what is in images.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("-k", "--top-k", default=5, show_default=True, type=click.IntRange(1), help="How many classes an image.")
@click.option("--precision", default="auto", show_default=True, help="fp32, fp16, bf16, int8 or fp8, or the fastest here.")
@click.option(
    "--backend", default="auto", show_default=True, help="onnxruntime, openvino, torch, tensorrt, tensorrt-rtx, or the fastest."
)
@click.option("--device", default="auto", show_default=True, help="Where: cpu, cuda, cuda:1.")
@json_option
def command(
    bundle: Path, images: tuple[str, ...], top_k: int, precision: str, backend: str, device: str, as_json: bool
) -> None:
    """Print the best classes of every IMAGE, with their probabilities."""
    import swin_deploy
    from swin_deploy.bundle import Bundle
    from swin_deploy.preprocess import read_image

    # Before the model is loaded, which may be measured first.
    if (task := Bundle.open(bundle).manifest["task"]["name"]) != "image-classification":
        raise UsageError(
            f"{bundle} was exported for the task {task}, and predict needs image-classification. Run it in Python "
            f"(swin_deploy.load), or export it with --task image-classification."
        )
    for image in images:
        if not os.path.isfile(image):  # noqa: PTH113 - Path.is_file raises for a name that is too long
            read_image(image)  # says what is wrong
    with log_told(teller()):
        model = swin_deploy.load(bundle, precision=precision, backend=backend, device=device)
    with model:
        found, told = model.classify(images, top_k=top_k), model.describe()
    click.echo(f"Run by {told.backend} {told.version}, {told.precision}, on {told.device}", err=True)
    if as_json:
        print_json(
            [
                {"image": image, "predictions": [asdict(p) for p in predictions]}
                for image, predictions in zip(images, found, strict=True)
            ]
        )
        return
    rows = [
        (image if rank == 1 else "", rank, f"{p.score:7.2%}", p.label)
        for image, predictions in zip(images, found, strict=True)
        for rank, p in enumerate(predictions, start=1)
    ]
    print_table(("image", "rank", "  score", "label"), rows)
