"""The command line: one file per verb. Results go to stdout, talk to stderr; what the user can correct exits with 2."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import Any

import click

from swin_deploy.errors import SwinDeployError

# verb -> the module that holds it; a module is imported only when its verb is used or listed
VERBS = {
    "variants": "variants",
    "export": "export",
    "build-engine": "build_engine",
    "verify": "verify",
    "predict": "predict",
    "bench": "bench",
}


class Verbs(click.Group):
    """Finds the verbs in VERBS, in that order."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"swin_deploy.cli.{VERBS[cmd_name]}")
        command: click.Command = module.command
        return command


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="swin-deploy")
def cli() -> None:
    """Take a Swin Transformer (V1 or V2) from a checkpoint to a model that runs on a device.

    The usual way, in one directory:

    \b
      swin-deploy export --variant swinv2-tiny
      swin-deploy build-engine --fp16
      swin-deploy predict swinv2-tiny photo.jpg
    """


def main() -> None:
    """Runs the command line and exits: 0 done, 1 a result that is not good enough, 2 what the user can correct."""
    # Killed politely, an export must still take its half-written folder with it.
    signal.signal(signal.SIGTERM, _terminated)
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except SwinDeployError as error:
        click.echo(f"swin-deploy: {error}", err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("swin-deploy: interrupted; nothing was left half-written", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)


def _terminated(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)
