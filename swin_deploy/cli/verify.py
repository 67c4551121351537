from __future__ import annotations

from pathlib import Path

import click

from swin_deploy.cli.output import json_option, print_json, print_table, teller


@click.command("verify", short_help="Check a bundle's files, and its graphs against PyTorch's answers.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", default="onnxruntime", show_default=True, help="Or openvino, torch, tensorrt, tensorrt-rtx.")
@click.option("--device", default="cpu", show_default=True, help="Where: cpu, cuda, cuda:1.")
@json_option
def command(bundle: Path, backend: str, device: str, as_json: bool) -> None:
    """Check the sha256 of every file of BUNDLE, and run its ONNX graphs against the answers that PyTorch gave at export.

    With --backend tensorrt or tensorrt-rtx, and --device cuda, the engines that fit this machine are run instead of the graphs;
    others are listed as not verified, and so is with OpenVINO a quantised graph for TensorRT, of which it makes other answers.
    Exits with 1 when one disagrees.
    """
    import swin_deploy
    from swin_deploy.bundle import Bundle

    verdicts = swin_deploy.verify(bundle, backend=backend, device=device, say=teller())
    run = {verdict.file for verdict in verdicts}
    kinds = (".engine", ".onnx") if any(file.endswith(".onnx") for file in run) else ".engine"
    others = [file for file in Bundle.open(bundle).files if file.endswith(kinds) and file not in run]
    if as_json:
        rows = [{"file": v.file, **v.to_dict()} for v in verdicts]
        print_json({"bundle": str(bundle), "files_intact": True, "graphs": rows, "not_verified": others})
    else:
        print_table(
            ("file", "verdict", "relative L2", "allowed", "max abs", "top-1 equal", "run by"),
            [
                (
                    v.file,
                    "verified" if v.verified else "DISAGREES",
                    f"{v.agreement.relative_l2:.2e}",
                    f"{v.tolerance:.0e}",
                    f"{v.agreement.max_abs:.2e}",
                    f"{v.agreement.top1:.0%}",
                    v.backend,
                )
                for v in verdicts
            ]
            + [
                (file, "not verified", "-", "-", "-", "-", "(for TensorRT)" if file.endswith(".onnx") else "(needs its GPU)")
                for file in others
            ],
        )
    if not all(v.verified for v in verdicts):
        click.get_current_context().exit(1)
