from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from swin_deploy.cli.output import json_option, print_json, print_table

if TYPE_CHECKING:
    from swin_deploy.doctor.checks import Diagnosis


@click.command("doctor", short_help="Tell what this machine can do, and what to install for the rest.")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@json_option
def command(bundle: Path | None, as_json: bool) -> None:
    """Try every library here, and tell what works and which command installs what is missing.

    With BUNDLE: also whether that bundle can run here, with which back ends, and why not. Exits with 1 when nothing here can
    run a bundle, or that one.
    """
    from swin_deploy.doctor.checks import doctor

    found = doctor(bundle)
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found)
    if not found.healthy:
        click.get_current_context().exit(1)


def _print(found: Diagnosis) -> None:
    import swin_deploy

    machine = found.machine
    size = "unknown" if machine.memory is None else f"{machine.memory / 1e9:.1f} GB"
    free = "" if machine.free_memory is None else f", {machine.free_memory / 1e9:.1f} GB free"
    gpus = [
        f"{gpu.name} ({gpu.capability}{'' if gpu.memory is None else f', {gpu.memory / 1e9:.0f} GB'})" for gpu in found.gpus
    ]
    for name, value in (
        ("software", f"swin-deploy {swin_deploy.__version__}, {machine.python}, {machine.system}"),
        ("processor", str(machine)),
        ("memory", size + free),
        ("GPU", "; ".join(gpus) or "no usable NVIDIA GPU"),
        ("driver", found.driver or "no NVIDIA driver"),
    ):
        click.echo(f"{name:<11}{value}")
    click.echo()
    rows = [(f.step, f.state, ", ".join(f"{n} {v}" for n, v in f.versions.items()) or "-", f.can) for f in found.findings]
    print_table(("step", "state", "installed", "what it can do here, or why not"), rows)
    commands = {f.step: f.command for f in found.findings if f.command}
    if commands:
        click.echo("\nTo have the rest:")
        width = max(map(len, commands))
        for step, line in commands.items():
            click.echo(f"  {step:<{width}}  {line}")
    for trap in found.traps:
        click.echo(f"\nNot right: {trap.what}.\n  {trap.command}")
    for sentence in found.damaged:
        click.echo(f"\nNot right: {sentence}")
    if found.runs is not None:
        click.echo()
        runs = [(run.file, run.backend, run.precision, "runs" if run.works else "does not run", run.said) for run in found.runs]
        print_table(("file", "back end", "precision", "here", "what was said"), runs)
    if not found.healthy:
        click.echo("\nNothing here can run " + ("a bundle." if found.runs is None else "this bundle."))
