from __future__ import annotations

from pathlib import Path

import click

from swin_deploy.cli.output import json_option, print_json, print_table, teller


@click.command("evaluate", short_help="Measure the accuracy of a bundle's graphs on images.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="A folder of images (class folders, or flat), or an .npz or .npy file.")
@click.option("--labels", help='A file with lines "image,class", where folders are not classes; "none" for no classes at all.')
@click.option("--samples", type=click.IntRange(1), help="Only so many, evenly spread, equally many of each class.")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(1), help="Images at a time.")
@click.option("--precision", "precisions", multiple=True, help="Repeatable; without it every graph of the bundle.")
@click.option("--backend", default="onnxruntime", show_default=True, help="Or openvino, torch, tensorrt, tensorrt-rtx.")
@click.option("--weights", help="The checkpoint that was exported; graphs are then compared with PyTorch itself.")
@json_option
def command(
    bundle: Path,
    data: str,
    labels: str | None,
    samples: int | None,
    batch: int,
    precisions: tuple[str, ...],
    backend: str,
    weights: str | None,
    as_json: bool,
) -> None:
    """Run the images of --data through every graph of BUNDLE, in one pass, and print how often each is right.

    Class folders are matched to the network's classes by name or by number, or in sorted order where there are as many (so
    ImageNet's 1000). Every graph is also compared with the fp32 graph, which was compared with PyTorch when it was made; or,
    given --weights, with PyTorch.
    """
    import swin_deploy
    from swin_deploy.bundle import Bundle
    from swin_deploy.parity import verdict_text
    from swin_deploy.specs import is_verified

    say = teller()
    try:
        found = swin_deploy.evaluate(
            bundle,
            data,
            labels=labels,
            samples=samples,
            batch=batch,
            precisions=precisions,
            backend=backend,
            weights=weights,
            progress=say.follow,
        )
    finally:
        say.clear()
    held = Bundle.open(bundle)
    run = {score.file for score in found.scores}
    engines = [file for file in held.files if file.endswith(".engine") and file not in run]
    exact = {file: entry for file, entry in held.graphs.items() if entry["precision"] == "fp32"}
    torch = {file: verdict_text(entry["agreement"] if is_verified(entry) else None) for file, entry in exact.items()}
    if as_json:
        print_json(
            {
                "bundle": str(bundle),
                "data": data,
                "samples": found.samples,
                "labels": found.rule,
                "against": found.against,
                "fp32_against_pytorch": torch,
                "graphs": [score.to_dict() for score in found.scores],
                "not_evaluated": [*found.left_out, *engines],
            }
        )
        return
    labelled = f"classes by {found.rule}" if found.rule else "no classes given"
    say(f"{found.samples} samples; {labelled}; compared with {found.against}")
    for file, words in torch.items():
        say(f"{file} against PyTorch: {words}")
    print_table(
        ("graph", "precision", "top-1", "top-5", "agrees", "relative L2", "SQNR dB", "not finite", "run by"),
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
