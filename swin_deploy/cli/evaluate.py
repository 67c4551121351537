from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, exit_with_failures, json_option, print_json, print_table
from swin_deploy.options import EvaluateSpec

# Columns by what the network predicts: heading, field of Score, format. The last ones are for classes.
ACCURACY = (
    (("mAP", "mean_average_precision", ".2%"), ("F1", "f1", ".2%")),
    (("MAE", "mae", ".4g"),),
    (("top-1", "top1", ".2%"), ("top-5", "top5", ".2%")),
)
COLUMNS = ("relative L2", "SQNR dB", "not finite", "back end")


@click.command("evaluate")
@click.argument("bundle", type=click.Path(path_type=Path))
@spec_options(EvaluateSpec)
@json_option
def command(bundle: Path, as_json: bool, **options: Any) -> None:
    """Run images through every graph of BUNDLE in one pass, and print the accuracy of each.

    Class folders are matched to the classes of the network by name or by number, or in sorted order if there are as many
    folders as classes, as for the 1000 classes of ImageNet. Every graph is also compared with the fp32 graph, or with PyTorch
    if --weights is set.

    Images that cannot be read are left out and listed, and the exit code is then 1.
    """
    import swin_deploy
    from swin_deploy.api.evaluate import json_of_evaluate
    from swin_deploy.bundle import Bundle

    keywords = given(EvaluateSpec, options)
    with console() as show:
        found = swin_deploy.evaluate(bundle, **keywords, progress=show)
    held = Bundle.open(bundle)
    result = json_of_evaluate(held, keywords["data"], found)
    if as_json:
        print_json(result)
        exit_with_failures(found.failed, as_json)
        return
    labelled = f"labels matched by {found.rule}" if found.rule else "no labels"
    show.say(f"{found.samples} samples; {labelled}; compared with {found.against}")
    for file, verdict in result["fp32_against_pytorch"].items():
        show.say(f"{file} compared with PyTorch: {verdict}")
    first = found.scores[0]
    accuracy = next((shown for shown in ACCURACY if getattr(first, shown[0][1]) is not None), ACCURACY[-1])
    unknown = "-" * (len(accuracy) + 5)
    print_table(
        ("graph", "precision", *(name for name, _, _ in accuracy), "agreement", *COLUMNS),
        [
            (
                score.file or "(PyTorch)",
                score.precision,
                *(_figure(getattr(score, field), style) for _, field, style in accuracy),
                _figure(score.top1_agreement, ".2%"),
                _figure(score.relative_l2, ".2e"),
                _figure(score.sqnr_db, ".1f"),
                score.not_finite,
                score.backend,
            )
            for score in found.scores
        ]
        + [(file, *unknown, f"({why})") for file, why in found.left_out.items()]
        + [(engine, *unknown, "(needs its GPU)") for engine in result["not_evaluated"][len(found.left_out) :]],
    )
    parts = [
        (score.file or "(PyTorch)", name, _figure(one["relative_l2"], ".2e"), _figure(one["sqnr_db"], ".1f"))
        for score in found.scores
        for name, one in score.outputs.items()
        if len(score.outputs) > 1
    ]
    if parts:
        print_table(("graph", "output", *COLUMNS[:2]), parts)
    exit_with_failures(found.failed, as_json)


def _figure(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)
