from __future__ import annotations

from pathlib import Path

import click

from swin_deploy.cli.output import json_option, print_json, teller
from swin_deploy.config import SEMANTICS
from swin_deploy.errors import UsageError
from swin_deploy.specs import TARGETS, numbers_from_text, size_from_text
from swin_deploy.tasks import TASKS, TaskSpec


@click.command("export", short_help="Export a checkpoint to a verified ONNX bundle.")
@click.option("--variant", metavar="NAME", help='A published checkpoint, such as swinv2-tiny; see "swin-deploy variants".')
@click.option("--weights", metavar="FOLDER", help="A checkpoint: folder, file, or hub id. Default: the variant's own.")
@click.option("--random-weights", is_flag=True, help="Take reproducible random weights instead of a checkpoint.")
@click.option("--seed", default=0, show_default=True, help="The seed of --random-weights.")
@click.option("--task", type=click.Choice(TASKS), default=TASKS[0], show_default=True, help="What the ONNX model is to give.")
@click.option(
    "--image-size", "image_sizes", multiple=True, metavar="HxW", help="In pixels, repeatable. Default: the checkpoint's own."
)
@click.option("--output-hidden-states", is_flag=True, help="Give the hidden states of every stage as well.")
@click.option("--output-attentions", is_flag=True, help="Give the attention of every stage's last block as well.")
@click.option(
    "--out-features",
    "--out-indices",
    default="",
    metavar="NAME,...",
    help="Of a backbone: stem, stage1, ..., or 0, 1, ..., -1.",
)
@click.option("--use-mask-token", is_flag=True, help="Feature extraction that takes bool_masked_pos.")
@click.option("--no-pooling-layer", is_flag=True, help="Feature extraction without pooler_output.")
@click.option("--semantics", type=click.Choice(SEMANTICS), help="Whose window rules hold. Default: the checkpoint's own.")
@click.option(
    "--window-size", "windows", metavar="N[,N...]", help="Build the network with other windows, and resize the weights to them."
)
@click.option("--pretrained-window-sizes", metavar="N[,N...]", help="Of Swin V2: the windows that it was pretrained with.")
@click.option(
    "--target", type=click.Choice(TARGETS), default=TARGETS[0], show_default=True, help="What the graph is to be fast with."
)
@click.option("--embed-preprocess", is_flag=True, help="Let the graph take uint8 frames [batch, height, width, 3].")
@click.option(
    "--embed-resize", multiple=True, metavar="HxW", help="The same for frames of this size, which the graph resizes, too."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The bundle to write. Default: ./NAME.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there already.")
@json_option
def command(
    variant: str | None,
    weights: str | None,
    random_weights: bool,
    seed: int,
    task: str,
    image_sizes: tuple[str, ...],
    output_hidden_states: bool,
    output_attentions: bool,
    out_features: str,
    use_mask_token: bool,
    no_pooling_layer: bool,
    semantics: str | None,
    windows: str | None,
    pretrained_window_sizes: str | None,
    target: str,
    embed_preprocess: bool,
    embed_resize: tuple[str, ...],
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Export a Swin checkpoint to an ONNX bundle, and compare it with PyTorch before it is kept.

    Prints the bundle's folder. Nothing is written when anything goes wrong.
    """
    import swin_deploy
    from swin_deploy.parity import described

    if len(embed_resize) > 1:
        raise UsageError(
            f"--embed-resize was given {len(embed_resize)} times, and a bundle resizes frames of one size. Export one bundle "
            "for each, with -o."
        )
    say = teller()
    spec = TaskSpec(
        task,
        output_hidden_states=output_hidden_states,
        output_attentions=output_attentions,
        add_pooling_layer=not no_pooling_layer,
        use_mask_token=use_mask_token,
        out_features=tuple(name.strip() for name in out_features.split(",") if name.strip()),
    )
    bundle = swin_deploy.export(
        variant,
        weights=weights,
        random_weights=random_weights,
        seed=seed,
        task=spec,
        image_sizes=[size_from_text(size) for size in image_sizes],
        semantics=semantics,
        window_size=numbers_from_text(windows, "window size"),
        pretrained_window_sizes=numbers_from_text(pretrained_window_sizes, "pretrained window size"),
        target=target,
        embed_preprocess=embed_preprocess,
        embed_resize=size_from_text(embed_resize[0]) if embed_resize else None,
        output=output,
        force=force,
        say=say,
    )
    for file, entry in bundle.graphs.items():
        agreement = entry["agreement"] if isinstance(entry["agreement"], dict) else None
        say(f"Wrote {bundle.path / file}: {described(agreement)}")
        if agreement is None:
            say('ONNX Runtime is not installed, so nothing was compared: pip install "swin-deploy[onnxruntime]"')
    if as_json:
        print_json({"bundle": str(bundle.path), **bundle.manifest})
    else:
        click.echo(str(bundle.path))
