from __future__ import annotations

from pathlib import Path

import click

from swin_deploy.cli.output import json_option, print_json, print_table, stdout_kept_clean, teller


def _batch(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int, int]:
    try:
        sizes = [int(size) for size in value.split(":")]
    except ValueError:
        sizes = []
    if len(sizes) == 1:
        sizes *= 3
    if len(sizes) != 3:
        raise click.BadParameter(f"{value!r} is no batch; expected one size, or MIN:OPT:MAX such as 1:8:32")
    return sizes[0], sizes[1], sizes[2]


@click.command("build-engine", short_help="Compile a bundle into TensorRT engines.")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--fp16", "precision", flag_value="fp16", default="fp16", help="Compute in fp16 (the default).")
@click.option("--fp32", "precision", flag_value="fp32", help="Compute in fp32, with TF32 off.")
@click.option("--gpu", "gpus", metavar="SM,...", default="", help="Targets such as sm_86,sm_89,sm_120, or current.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
    default="auto",
    show_default=True,
    help="auto: tensorrt where it and a GPU are, else tensorrt-rtx, which needs no GPU to compile.",
)
@click.option("--batch", default="1", show_default=True, callback=_batch, help="Batch size, or MIN:OPT:MAX.")
@click.option("--force", is_flag=True, help="Compile again what is there already.")
@click.option("-v", "--verbose", is_flag=True, help="Show all of TensorRT's own messages, not only its warnings.")
@json_option
def command(
    bundle: Path | None,
    precision: str,
    gpus: str,
    backend: str,
    batch: tuple[int, int, int],
    force: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Compile BUNDLE into TensorRT engines (without BUNDLE: the newest one in this directory).

    Writes the ONNX graph in the types of the precision, compares it with PyTorch, and compiles it, strongly typed. Without
    --gpu: this machine's GPU, or sm_86, sm_89 and sm_120 where there is none.
    """
    import swin_deploy

    say = teller()

    def log(severity: str, message: str) -> None:
        if severity not in ("verbose", "info") or verbose:
            click.echo(f"TensorRT {severity}: {message}", err=True)

    from swin_deploy.bundle import newest_bundle

    if bundle is None:
        bundle = newest_bundle(Path()).path
        say(f"Taking the newest bundle here, {bundle.name or bundle.resolve().name}")
    with stdout_kept_clean():
        built = swin_deploy.build_engine(
            bundle,
            precision=precision,
            backend=backend,
            gpus=[gpu.strip() for gpu in gpus.split(",") if gpu.strip()],
            batch=batch,
            force=force,
            say=say,
            log=log,
        )
    if as_json:
        print_json([{"engine": str(bundle / one.file), "reused": one.reused, **one.entry} for one in built])
        return
    rows = []
    for one in built:
        report = one.entry["report"]
        moved = report["bytes_moved"]
        rows.append(
            (
                str(bundle / one.file),
                "unknown" if report["kernels"] is None else report["kernels"],
                "unknown" if report["fused_attention"] is None else report["fused_attention"],
                "unknown" if moved is None else f"{moved / 1e6:.1f}",
                f"{one.entry['bytes'] / 1e6:.1f}",
                one.entry["seconds"],
            )
        )
    print_table(("engine", "kernels", "fused attention", "MB moved", "MB", "seconds"), rows)
