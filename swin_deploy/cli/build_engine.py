from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from swin_deploy.cli.output import compiler_log, json_option, only_flag, print_json, print_table, stdout_kept_clean, teller
from swin_deploy.errors import UsageError
from swin_deploy.specs import PRECISIONS

HELP = {"fp16": "Compute in fp16 (the default).", "bf16": "Compute in bf16.", "fp32": "Compute in fp32, with TF32 off.",
        "int8": "The graph of \"quantize --int8\".", "fp8": "The graph of \"quantize --fp8\"."}  # fmt: skip


def precision_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each precision there is: --fp32, --fp16, ..."""
    for precision in PRECISIONS:
        command = click.option(f"--{precision}", is_flag=True, help=HELP.get(precision, f"Compute in {precision}."))(command)
    return command


@click.command("build-engine", short_help="Compile a bundle into TensorRT engines.")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@precision_options
@click.option("--data", help="Images on which the ranges of values are measured; what fp16 may not hold stays fp32.")
@click.option("--samples", type=click.IntRange(1), help="Only so many of --data, evenly spread.")
@click.option("--gpu", "gpus", metavar="SM,...", help="Targets such as sm_86,sm_89,rtx-5090, or current.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
    default="auto",
    show_default=True,
    help="auto: tensorrt where it and a GPU are, else tensorrt-rtx, which needs no GPU to compile.",
)
@click.option(
    "--batch",
    "batches",
    multiple=True,
    default=("1",),
    show_default=True,
    metavar="N|MIN:OPT:MAX",
    help="Batch sizes. Repeatable: one optimisation profile each.",
)
@click.option("--workspace", metavar="SIZE", help="Memory that a kernel may use as scratch, such as 2GiB.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="0 compiles fastest, 5 tries most. tensorrt only.")
@click.option(
    "--timing-cache",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Read and keep the timings of kernels there. tensorrt only.",
)
@click.option("--version-compatible", is_flag=True, help="Runs with newer TensorRT, too. tensorrt only.")
@click.option("--hardware-compatible", is_flag=True, help="Runs on any GPU since Ampere. tensorrt only.")
@click.option("--strip-weights", is_flag=True, help='Leave the weights out, for "swin-deploy refit". Needs a GPU.')
@click.option("--force", is_flag=True, help="Compile again what is there already.")
@click.option("-v", "--verbose", is_flag=True, help="Show all of TensorRT's own messages, not only its warnings.")
@json_option
def command(
    bundle: Path | None,
    gpus: str | None,
    backend: str,
    batches: tuple[str, ...],
    workspace: str | None,
    verbose: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile BUNDLE into TensorRT engines (without BUNDLE: the newest one in this directory).

    Writes the ONNX graph in the types of the precision, compares it with PyTorch, and compiles it, strongly typed. Without
    --gpu: this machine's GPU, or sm_86, sm_89 and sm_120 where there is none. An engine that is there already, of the same
    graph, options, compiler and GPU, is not compiled again.
    """
    import swin_deploy
    from swin_deploy.bundle import newest_bundle
    from swin_deploy.specs import batch_from_text, bytes_from_text

    named = [gpu.strip() for gpu in (gpus or "").split(",") if gpu.strip()]
    if gpus is not None and not named:
        raise UsageError("--gpu names no GPU. Expected one or more, such as sm_86,sm_89, or leave it out.")
    precision = only_flag({name: options.pop(name) for name in PRECISIONS}) or "fp16"
    say = teller()
    if bundle is None:
        bundle = newest_bundle(Path()).path
        say(f"Taking the newest bundle here, {bundle.name or bundle.resolve().name}")
    try:
        with stdout_kept_clean():
            built = swin_deploy.build_engine(
                bundle,
                precision=precision,
                backend=backend,
                gpus=named,
                batches=[batch_from_text(batch) for batch in batches],
                workspace=None if workspace is None else bytes_from_text(workspace),
                say=say,
                log=compiler_log(say, verbose),
                progress=say.follow,
                **options,
            )
    finally:
        say.clear()
    if as_json:
        print_json([{"engine": str(bundle / one.file), "reused": one.reused, **one.entry} for one in built])
        return
    print_table(
        ("engine", "batch", "kernels", "fused attention", "MB moved", "MB", "seconds"),
        [
            (
                str(bundle / one.file),
                ":".join(str(size) for size in dict.fromkeys(profile["batch"])),
                "unknown" if profile["kernels"] is None else profile["kernels"],
                "unknown" if profile["fused_attention"] is None else profile["fused_attention"],
                "unknown" if profile["bytes_moved"] is None else f"{profile['bytes_moved'] / 1e6:.1f}",
                f"{one.entry['bytes'] / 1e6:.1f}",
                one.entry["seconds"],
            )
            for one in built
            for profile in one.entry["profiles"]
        ],
    )
