from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, exit_with_failures, json_option, print_json, print_table
from swin_deploy.options import QuantSpec


@click.command("quantize")
@click.argument("bundle", type=click.Path(path_type=Path))
@spec_options(QuantSpec)
@json_option
def command(bundle: Path, as_json: bool, **options: Any) -> None:
    """Measure activation ranges on the images of --data, and add INT8 or FP8 graphs to BUNDLE.

    A bundle for TensorRT gets a graph for "build-engine --int8" or "--fp8". One that was exported for ONNX Runtime or OpenVINO
    gets a graph for that runtime. The table shows how far each graph is from fp32 on the images.

    QAT ranges of the checkpoint are used instead of measured ranges. If none is missing, --data is only used to compare.

    With --max-drop, the most sensitive layers stay in higher precision, as few as possible. With --min-speedup, the graph must
    also be faster than the one it replaces. If it cannot meet both, the bundle stays as it was, and the exit code is 3.

    Images that cannot be read are left out and listed. The graph is then written, and the exit code is 1.
    """
    import swin_deploy
    from swin_deploy.bundle import Bundle

    keywords = given(QuantSpec, options)
    with console() as show:
        found = swin_deploy.quantize(bundle, **keywords, progress=show)
        if not keywords.get("data"):
            show.say("Written, and not compared with fp32: there is no --data")
    precision = keywords.get("precision", "int8")
    scores = [score for score in found.scores if score.precision == precision]
    if as_json:
        entries = [Bundle.open(bundle).graphs[one.file] for one in scores]
        gates = [{key: value for key, value in one.to_dict().items() if key in ("gate", "speed")} for one in entries]
        rows = [{**score.to_dict(), **more} for score, more in zip(scores, gates, strict=True)]
        failed = [{"image": name, "error": reason} for name, reason in found.failed.items()]
        print_json({"bundle": str(bundle), "samples": found.samples, "graphs": rows, "failed": failed})
    elif scores:
        print_table(
            ("graph", "samples", "agrees with fp32", "relative L2", "SQNR dB"),
            [
                (
                    score.file,
                    score.samples,
                    "-" if score.top1_agreement is None else f"{score.top1_agreement:.2%}",
                    "-" if score.relative_l2 is None else f"{score.relative_l2:.2e}",
                    "-" if score.sqnr_db is None else f"{score.sqnr_db:.1f}",
                )
                for score in scores
            ],
        )
    exit_with_failures(found.failed, as_json)
