from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, json_option, print_json, stdout_kept_clean
from swin_deploy.options import PublishSpec


@click.command("publish")
@click.argument("bundle", type=click.Path(path_type=Path))
@spec_options(PublishSpec)
@json_option
def command(bundle: Path, as_json: bool, **options: Any) -> None:
    """Write BUNDLE as the files that another program reads, into a new folder.

    \b
      triton                 model repository of Triton Inference Server
      openvino-model-server  model repository of OpenVINO Model Server
      deepstream             configuration of DeepStream's nvinfer
      gstreamer              model with .modelinfo for GStreamer's onnxinference
      huggingface            repository folder for the Hugging Face hub
      epcontext              ONNX file around an engine, for ONNX Runtime
      web                    page that classifies images in the browser

    Prints the files that were written. The bundle does not change.
    """
    import swin_deploy

    keywords = given(PublishSpec, options)
    with console(), stdout_kept_clean():
        written = swin_deploy.publish(bundle, **keywords)
    if as_json:
        print_json({"bundle": str(bundle), "target": keywords["target"], "files": [str(file) for file in written]})
        return
    for file in written:
        click.echo(str(file))
