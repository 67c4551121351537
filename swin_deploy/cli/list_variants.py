from __future__ import annotations

import click

from swin_deploy.cli.output import json_option, print_json, print_table


@click.command("variants")
@json_option
def command(as_json: bool) -> None:
    """List every published Swin V1 and V2 checkpoint that --variant accepts.

    A short name selects the best-known checkpoint; full Hugging Face and timm names work as well. top-1 is the accuracy on
    ImageNet-1k that Microsoft published, in percent.
    """
    import dataclasses

    from swin_deploy.variants import VARIANTS

    if as_json:
        print_json([dataclasses.asdict(variant) for variant in VARIANTS])
        return
    rows = [
        (
            ", ".join(variant.aliases) or "-",
            variant.name,
            variant.image_size,
            "/".join(map(str, variant.window_size)) if isinstance(variant.window_size, tuple) else variant.window_size,
            variant.num_labels or "-",
            variant.params_millions or "-",
            variant.top1 or "-",
            variant.timm_name or "-",
        )
        for variant in VARIANTS
    ]
    print_table(("short name", "name", "image", "window", "classes", "params M", "top-1", "timm name"), rows)
