from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, json_option, print_json, print_table
from swin_deploy.options import EvaluateSpec


@click.command("evaluate", short_help="Measure the accuracy of a bundle's graphs on images.")
@click.argument("bundle", type=click.Path(path_type=Path))
@spec_options(EvaluateSpec)
@json_option
def command(bundle: Path, as_json: bool, **options: Any) -> None:
    """Run images through every graph of BUNDLE in one pass, and print the accuracy of each.

    Class folders are matched to the classes of the network by name or by number, or in sorted order if there are as many
    folders as classes, as for the 1000 classes of ImageNet. Every graph is also compared with the fp32 graph, or with PyTorch
    if --weights is set.
    """
    import swin_deploy
    from swin_deploy.bundle import Bundle, is_verified
    from swin_deploy.parity import verdict_text

    keywords = given(EvaluateSpec, options)
    with console() as show:
        found = swin_deploy.evaluate(bundle, **keywords, progress=show)
    held = Bundle.open(bundle)
    run = {score.file for score in found.scores}
    engines = [file for file in held.files if file.endswith(".engine") and file not in run]
    exact = {file: entry for file, entry in held.graphs.items() if entry["precision"] == "fp32"}
    torch = {file: verdict_text(entry["agreement"] if is_verified(entry) else None) for file, entry in exact.items()}
    if as_json:
        print_json(
            {
                "bundle": str(bundle),
                "data": keywords["data"],
                "samples": found.samples,
                "labels": found.rule,
                "against": found.against,
                "fp32_against_pytorch": torch,
                "graphs": [score.to_dict() for score in found.scores],
                "not_evaluated": [*found.left_out, *engines],
            }
        )
        return
    labelled = f"labels matched by {found.rule}" if found.rule else "no labels"
    show.say(f"{found.samples} samples; {labelled}; compared with {found.against}")
    for file, verdict in torch.items():
        show.say(f"{file} compared with PyTorch: {verdict}")
    print_table(
        ("graph", "precision", "top-1", "top-5", "agreement", "relative L2", "SQNR dB", "not finite", "back end"),
        [
            (
                score.file or "(PyTorch)",
                score.precision,
                *("-" if share is None else f"{share:.2%}" for share in (score.top1, score.top5, score.top1_agreement)),
                "-" if score.relative_l2 is None else f"{score.relative_l2:.2e}",
                "-" if score.sqnr_db is None else f"{score.sqnr_db:.1f}",
                score.not_finite,
                score.backend,
            )
            for score in found.scores
        ]
        + [(file, *"-------", f"({why})") for file, why in found.left_out.items()]
        + [(engine, *"-------", "(needs its GPU)") for engine in engines],
    )
