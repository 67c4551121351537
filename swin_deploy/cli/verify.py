from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, json_option, print_json, print_table
from swin_deploy.options import VerifySpec


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@spec_options(VerifySpec)
@json_option
def command(bundle: Path, as_json: bool, **options: Any) -> None:
    """Check the sha256 of every file of BUNDLE, and compare its ONNX graphs with the recorded outputs of PyTorch.

    With --backend tensorrt or tensorrt-rtx and --device cuda, the engines that fit this machine are compared instead. Graphs
    and engines that cannot be run, or would give wrong results in the back end, are listed as not verified. The exit code is 1
    if one disagrees with PyTorch.
    """
    import swin_deploy
    from swin_deploy.api.evaluate import json_of_verify
    from swin_deploy.bundle import Bundle

    with console():
        verdicts = swin_deploy.verify(bundle, **given(VerifySpec, options))
    opened = Bundle.open(bundle)
    result = json_of_verify(opened, verdicts)
    if as_json:
        print_json(result)
    else:
        one_class = opened.task.name == "image-classification" and opened.config.prediction == "classes"
        print_table(
            ("file", "verdict", "relative L2", "tolerance", "max abs", "top-1 agreement", "back end"),
            [
                (
                    v.file,
                    "verified" if v.verified else "DISAGREES",
                    f"{v.agreement.relative_l2:.2e}",
                    f"{v.tolerance:.0e}",
                    f"{v.agreement.max_abs:.2e}",
                    f"{v.agreement.top1:.0%}" if one_class else "-",
                    v.backend,
                )
                for v in verdicts
            ]
            + [
                (file, "not verified", *"----", "(built for TensorRT)" if file.endswith(".onnx") else "(needs its GPU)")
                for file in result["not_verified"]
            ],
        )
    if not all(v.verified for v in verdicts):
        click.get_current_context().exit(1)
