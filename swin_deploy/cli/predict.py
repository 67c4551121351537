from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, json_option, print_json, print_table
from swin_deploy.errors import InputError, UsageError, shown
from swin_deploy.options import EvaluateSpec, LoadSpec


@click.command("predict")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "-k",
    "--top-k",
    type=click.IntRange(1),
    help="Number of classes to print per image.  [default: 5; multi-label networks: all above --threshold]",
)
@spec_options(EvaluateSpec, only=("threshold", "on_error"))
@spec_options(LoadSpec, only=("precision", "backend", "device", "trust"))
@json_option
def command(bundle: Path, images: tuple[str, ...], top_k: int | None, as_json: bool, **options: Any) -> None:
    """Print the most likely classes of every IMAGE with their scores.

    Scores are probabilities, or the values of a regression. The row of an IMAGE that cannot be read has the reason, and the
    exit code is then 1. If it is the only IMAGE, that is an error. For whole data sets, use `swin-deploy classify`.
    """
    import swin_deploy
    from swin_deploy.bundle import Bundle
    from swin_deploy.preprocess import read_image

    # Invalid arguments are refused before the model is loaded, which may take a measurement.
    manifest = Bundle.open(bundle).manifest
    if (task := manifest.task.name) != "image-classification":
        raise UsageError(
            f"{bundle} was exported for the task {task}, but predict needs image-classification. Run it in Python "
            f"(swin_deploy.load), or export it with --task image-classification."
        )
    limits = given(EvaluateSpec, {name: options.pop(name) for name in ("threshold", "on_error")})
    EvaluateSpec(".", **limits)
    limits = {"on_error": "continue" if len(images) > 1 else "stop", **limits, "top_k": top_k}
    for image in images if limits["on_error"] == "stop" else ():
        if not os.path.isfile(image):  # noqa: PTH113 - Path.is_file raises for a name that is too long
            read_image(image)  # raises an error that names the problem
    if (stated := manifest.preprocessing) is not None and stated.assumed:
        click.echo(f"Warning: {shown(stated.assumed)}", err=True)
    with console():
        model = swin_deploy.load(bundle, **given(LoadSpec, options))
    with model:
        found, about = model.classify(images, **limits), model.describe()
        score = "{:9.4g}" if model.config.score_activation == "none" else "{:7.2%}"
    click.echo(f"Run by {about.backend} {about.version}, {about.precision}, on {about.device}", err=True)
    rows: list[tuple[Any, ...]] = []
    answers: list[dict[str, Any]] = []
    for image, best in zip(images, found, strict=True):
        if isinstance(best, InputError):
            answers.append({"image": image, "predictions": [], "error": str(best)})
            rows.append((image, "-", "-", str(best)))
            continue
        answers.append({"image": image, "predictions": [asdict(p) for p in best]})
        lines: list[tuple[Any, ...]] = [(rank, score.format(p.score), p.label) for rank, p in enumerate(best, start=1)]
        rows += [("" if i else image, *line) for i, line in enumerate(lines or [("-", "-", "(no label above the threshold)")])]
    print_json(answers) if as_json else print_table(("image", "rank", "  score", "label"), rows)
    if failures := sum("error" in answer for answer in answers):
        click.echo(f"{failures} of {len(images)} images cannot be read", err=True)
        click.get_current_context().exit(1)
