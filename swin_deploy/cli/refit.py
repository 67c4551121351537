from __future__ import annotations

from pathlib import Path

import click

from swin_deploy.cli.output import compiler_log, json_option, print_json, print_table, stdout_kept_clean, teller


@click.command("refit", short_help="Put the weights back into engines compiled without them.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-v", "--verbose", is_flag=True, help="Show all of TensorRT's own messages, not only its warnings.")
@json_option
def command(bundle: Path, verbose: bool, as_json: bool) -> None:
    """Put the weights back into the engines of BUNDLE that "build-engine --strip-weights" compiled.

    They come from the bundle's own graph. Needs the GPU that the engines were compiled for. The engines are written beside
    the ones without weights, which stay.
    """
    import swin_deploy

    say = teller()
    with stdout_kept_clean():
        built = swin_deploy.refit(bundle, say=say, log=compiler_log(say, verbose))
    if as_json:
        print_json([{"engine": str(bundle / one.file), "reused": one.reused, **one.entry} for one in built])
        return
    print_table(("engine", "MB"), [(str(bundle / one.file), round(one.entry["bytes"] / 1e6, 1)) for one in built])
