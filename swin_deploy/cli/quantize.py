from __future__ import annotations

from pathlib import Path

import click

from swin_deploy.cli.output import json_option, only_flag, print_json, print_table, teller
from swin_deploy.specs import TARGETS


@click.command("quantize", short_help="Write a bundle's graphs in INT8 or FP8.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--int8", is_flag=True, help="Quantise to INT8 (the default).")
@click.option("--fp8", is_flag=True, help="Quantise to FP8 (E4M3). Bundles for TensorRT only.")
@click.option("--target", type=click.Choice(TARGETS), help="What the graph is for. Without it: what BUNDLE was exported for.")
@click.option("--data", help="A folder of images like those of the application, or an .npz or .npy file.")
@click.option("--method", help="How ranges are chosen: minmax, percentile, entropy, mse. Without it: the least error.")
@click.option("--samples", type=click.IntRange(1), help="Only so many of --data, evenly spread.")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(1), help="Images at a time.")
@click.option("--keep", multiple=True, metavar="LAYER", help="A layer that is not quantised. Repeatable.")
@click.option("--max-drop", type=click.FloatRange(0), metavar="POINTS", help="The most that may be lost, in percentage points.")
@click.option(
    "--min-speedup", type=click.FloatRange(0), metavar="TIMES", help="How many times as fast it must be. Exit 3 if not."
)
@click.option("--labels", help='The images\' classes: a file of lines "image,class", or "none". Without it: their folders.')
@click.option("--gpu", help="The GPU whose roofline --min-speedup takes, of a bundle for TensorRT, such as rtx-4090 or sm_86.")
@click.option("--ranges", metavar="FILE", help="An ONNX graph with Q/DQ of the same network: its scales. none: measured only.")
@json_option
def command(
    bundle: Path,
    int8: bool,
    fp8: bool,
    target: str | None,
    data: str | None,
    method: str | None,
    samples: int | None,
    batch: int,
    keep: tuple[str, ...],
    max_drop: float | None,
    min_speedup: float | None,
    labels: str | None,
    gpu: str | None,
    ranges: str | None,
    as_json: bool,
) -> None:
    """Measure ranges on the images of --data, and write the graphs of BUNDLE in INT8 or FP8 with them.

    A bundle for TensorRT gets a graph for "build-engine --int8" or "--fp8"; one that was exported for ONNX Runtime or
    OpenVINO a graph that these run (predict, bench: --precision int8). How far it is from fp32 on the images is printed.

    Ranges that the checkpoint brought along are kept; where it has all of them, --data only serves to compare.

    With --max-drop, layers are ranked by the damage that they do, and as few as possible are left as they were so that no more
    is lost: of top-1 where the images' classes are known, else of agreement with fp32. With --min-speedup, the graph must
    also be faster: than fp32 on this machine, or, for TensorRT, than fp16 by the compiler's report. If it cannot be both, the
    bundle stays as it was and the exit code is 3.
    """
    import swin_deploy
    from swin_deploy.bundle import Bundle

    quantization = only_flag({"int8": int8, "fp8": fp8}) or "int8"
    say = teller()
    try:
        found = swin_deploy.quantize(
            bundle, data, quantization=quantization, target=target, method=method, samples=samples, batch=batch,
            keep=keep, max_drop=max_drop, min_speedup=min_speedup, labels=labels, gpu=gpu, ranges=ranges, say=say,
            progress=say.follow,
        )  # fmt: skip
    finally:
        say.clear()
    scores = [score for score in found.scores if score.precision == quantization]
    if as_json:
        entries = Bundle.open(bundle).files
        judged = [{key: value for key, value in entries[one.file].items() if key in ("gate", "speed")} for one in scores]
        rows = [{**score.to_dict(), **more} for score, more in zip(scores, judged, strict=True)]
        print_json({"bundle": str(bundle), "samples": found.samples, "graphs": rows})
        return
    if data is None:
        say("Written, and not compared with fp32: there is no --data")
        return
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
