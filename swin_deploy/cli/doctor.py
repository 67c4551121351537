from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from swin_deploy.cli.output import json_option, print_json, print_table

if TYPE_CHECKING:
    from swin_deploy.doctor.checks import Diagnosis


@click.command("doctor")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@json_option
def command(bundle: Path | None, as_json: bool) -> None:
    """Try every library on this machine, and print what works and the commands that install the rest.

    With BUNDLE, also run its graphs and engines, and check its files. The exit code is 1 if this machine cannot run
    BUNDLE (without BUNDLE: any bundle).
    """
    from swin_deploy.doctor.checks import doctor

    found = doctor(bundle)
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found)
    if not found.can_run:
        click.get_current_context().exit(1)


def _print(found: Diagnosis) -> None:
    import swin_deploy

    machine = found.machine
    memory = 'unknown (pip install "swin-deploy[bench]")'
    if machine.memory is not None and machine.free_memory is not None:
        memory = f"{_gigabytes(machine.memory)}, {_gigabytes(machine.free_memory)} available"
    gpus = [f"{gpu.name} ({gpu.capability}{(gpu.memory and f', {_gigabytes(gpu.memory)}') or ''})" for gpu in found.gpus]
    for name, value in (
        ("software", f"swin-deploy {swin_deploy.__version__}, {machine.python}, {machine.system}"),
        ("processor", str(machine)),
        ("memory", memory),
        ("GPU", "; ".join(gpus) or "no usable NVIDIA GPU"),
        ("driver", found.driver or "no NVIDIA driver"),
    ):
        click.echo(f"{name:<11}{value}")
    click.echo()
    rows = [(c.name, c.state, ", ".join(f"{n} {v}" for n, v in c.versions.items()) or "-", c.message) for c in found.checks]
    print_table(("check", "state", "installed", "what it can do on this machine, or why not"), rows)
    commands = {check.name: check.command for check in found.checks if check.command}
    if commands:
        click.echo("\nTo fix the rest:")
        width = max(map(len, commands))
        for name, line in commands.items():
            click.echo(f"  {name:<{width}}  {line}")
    for problem in (*(f"{one.problem}.\n  {one.command}" for one in found.conflicts), *found.damaged):
        click.echo(f"\nProblem: {problem}")
    if found.runs is not None:
        click.echo()
        runs = [(one.file, one.backend, one.precision, "yes" if one.works else "no", one.message) for one in found.runs]
        print_table(("file", "back end", "precision", "runs", "message"), runs)
    if not found.can_run:
        click.echo(f"\nNothing on this machine can run {'a bundle' if found.runs is None else 'this bundle'}.")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
