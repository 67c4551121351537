"""Command-line flags made from the fields of a spec."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import click

from swin_deploy.cli.output import only_flag
from swin_deploy.errors import UsageError
from swin_deploy.option_parsers import Option, options_of


def spec_options(spec: type[Any], only: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a flag for each field of `spec`, or for the fields in `only`; the command receives `options` for `given`."""
    chosen = {name: one for name, one in options_of(spec).items() if one.flags != () and (not only or name in only)}
    defaults = {one.name: one.default for one in dataclasses.fields(spec)}

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, one in reversed(chosen.items()):
            for decorator in reversed(_decorators(name, one, defaults[name])):
                command = decorator(command)
        return command

    return decorate


def _decorators(name: str, one: Option, default: Any) -> list[Callable[..., Any]]:
    flags = one.flags or (f"--{name.replace('_', '-')}",)
    if one.values_as_flags:
        return [
            click.option(
                f"--{value}",
                f"{name}__{value}",
                is_flag=True,
                help=f"{one.help.partition('.')[0]}: {value}{' (default)' * (value == default)}.",
            )
            for value in one.choices
        ]
    if isinstance(default, bool):
        text = one.help if default is False else f"Do not {one.help[0].lower()}{one.help[1:]}"
        hidden = [click.option(old, f"{name}__former", is_flag=True, hidden=True) for old in one.hidden_flags]
        return [click.option(*flags, name, is_flag=True, help=text), *hidden]
    shown = f"  [default: {default}]" if isinstance(default, str | int | float) else ""
    metavar = one.metavar or ("|".join(one.choices) if one.choices else None)
    text = one.help + " Repeatable." * one.many + shown
    made = [click.option(*flags, name, multiple=True, required=default is dataclasses.MISSING, metavar=metavar, help=text)]
    return made + [click.option(old, f"{name}__former", multiple=True, hidden=True) for old in one.hidden_flags]


def given(spec: type[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords for `spec` from the flags that were given.

    Raises:
        UsageError: A flag that takes one value was repeated, or two flags exclude each other.
    """
    found: dict[str, Any] = {}
    for name, one in options_of(spec).items():
        flag = (one.flags or (f"--{name.replace('_', '-')}",))[-1]
        if one.values_as_flags:
            value = only_flag({choice: options.get(f"{name}__{choice}", False) for choice in one.choices})
            found |= {} if value is None else {name: value}
        elif isinstance(value := options.get(name), bool):
            if value or options.get(f"{name}__former"):
                found[name] = flag[:5] != "--no-"
        elif values := (*(value or ()), *options.get(f"{name}__former", ())):
            if len(values) > 1 and not one.many:
                raise UsageError(f"{flag} was given {len(values)} times. Give it once.")
            found[name] = values if one.many else values[0]
    return found
