from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, json_option, print_json, print_table, stdout_kept_clean, verbose_option
from swin_deploy.options import EngineSpec


@click.command("build-engine")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@spec_options(EngineSpec)
@verbose_option
@json_option
def command(bundle: Path | None, verbose: bool, as_json: bool, **options: Any) -> None:
    """Compile BUNDLE into TensorRT engines. Default: the newest bundle in the current directory.

    Writes the ONNX graph of the precision, compares it with PyTorch, and compiles it as a strongly typed network. An engine
    that the bundle already has, of the same graph, options, compiler and GPU, is reused.
    """
    import swin_deploy
    from swin_deploy.bundle import newest_bundle

    keywords = given(EngineSpec, options)
    with console(verbose) as show, stdout_kept_clean():
        if bundle is None:
            bundle = newest_bundle(Path()).path
            show.say(f"Using the newest bundle in this directory, {bundle.name or bundle.resolve().name}")
        built = swin_deploy.build_engine(bundle, **keywords, progress=show)
    if as_json:
        print_json([{"engine": str(bundle / one.file), "reused": one.reused, **one.entry.to_dict()} for one in built])
        return
    print_table(
        ("engine", "batch", "kernels", "fused attention", "MB moved", "MB", "seconds"),
        [
            (
                str(bundle / one.file),
                ":".join(str(size) for size in dict.fromkeys(profile.batch)),
                "unknown" if profile.kernels is None else profile.kernels,
                "unknown" if profile.fused_attention is None else profile.fused_attention,
                "unknown" if profile.bytes_moved is None else f"{profile.bytes_moved / 1e6:.1f}",
                f"{one.entry.bytes / 1e6:.1f}",
                "unknown" if one.entry.seconds is None else one.entry.seconds,
            )
            for one in built
            for profile in one.entry.profiles
        ],
    )
