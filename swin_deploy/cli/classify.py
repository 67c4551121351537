from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from swin_deploy.cli.flags import given, spec_options
from swin_deploy.cli.output import console, json_option, print_json, print_table
from swin_deploy.options import ClassifySpec


@click.command("classify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("source")
@spec_options(ClassifySpec)
@json_option
def command(bundle: Path, source: str, as_json: bool, **options: Any) -> None:
    """Classify all images of SOURCE in several processes, and write a row for each into a file.

    SOURCE is a folder with subfolders, a pattern in quotes ("photos/**/*.jpg"), a text file with one path per line (.txt), tar
    shards in the WebDataset layout ("train-{000..099}.tar"), or Parquet files with a column of image bytes or paths.

    If the command is interrupted or killed, run it again to resume. Each image is in the file exactly once. If an image cannot
    be read, its row has the reason in the column `error`, and the exit code is 1.
    """
    import swin_deploy

    with console() as show:
        found = swin_deploy.classify_dataset(bundle, source, **given(ClassifySpec, options), progress=show)
    rate = (found.images - found.resumed) / max(found.seconds, 1e-9)
    if as_json:
        print_json({**asdict(found), "output": str(found.output), "images_per_second": rate})
    else:
        print_table(
            ("output", "images", "failed", "processes", "seconds", "images/s"),
            [(str(found.output), found.images, found.failed, found.workers or "-", round(found.seconds, 1), round(rate, 1))],
        )
    if found.failed:
        click.echo(f"{found.failed} of {found.images} images cannot be read; the column error has the reasons", err=True)
        click.get_current_context().exit(1)
