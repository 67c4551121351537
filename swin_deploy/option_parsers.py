"""Options as values: frozen dataclasses whose fields are also the keywords of the Python API and the flags of the command line.

The parser of a field accepts what Python passes and the text of a shell, and returns the form that the package works with.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from swin_deploy.errors import SwinDeployError, UsageError, system_limit, unknown

P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")
BundlePath = str | os.PathLike[str]
Progress = Callable[[str, int, int], None]  # phase, steps done, steps in all
Parser = Callable[[str, Any], Any]  # name of the option, value as given -> value as stored
METAVARS = {
    **{"path": "PATH", "images": "PATH", "image_size": "HxW", "image_sizes": "HxW", "per_stage": "N|HxW[,...]"},
    **{"batches": "N|MIN:OPT:MAX", "memory": "SIZE", "text": "NAME", "whole_number": "N", "finite_number": "X"},
    "numbers": "X[,X...]",
}
_BYTES = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def no_progress(phase: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Option:
    """How one field of a spec is parsed, documented and spelled on the command line."""

    parse: Parser
    help: str  # one sentence, for `--help` and for the docstring of the Python function
    flags: tuple[str, ...] | None = None  # None: `--` and the name of the field; empty: not on the command line
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    many: bool = False  # the flag may be repeated, and the field is a tuple
    values_as_flags: bool = False  # each choice is a flag of its own, such as `--fp16`
    hidden_flags: tuple[str, ...] = ()  # former names that are still accepted


def option(default: Any, parse: Parser, help: str, *, shown: bool = True, **spelling: Any) -> Any:
    """Declare a field of a spec. `shown=False` keeps it out of comparison and `repr`; `spelling` goes to Option."""
    spelling = {"choices": getattr(parse, "choices", ()), "metavar": METAVARS.get(parse.__name__), **spelling}
    metadata = {"option": Option(_optional(parse) if default is None else parse, help, **spelling)}
    return field(default=default, metadata=metadata, compare=shown, repr=shown)


def progress_option() -> Any:
    """Declare the field for the progress callback."""
    return option(no_progress, function, "Called with a phase, the steps done and the steps in all.", shown=False, flags=())


class Spec:
    """Base class of the specs: parses every field when the value is made, then calls `check`."""

    def __post_init__(self) -> None:
        for name, one in options_of(type(self)).items():
            object.__setattr__(self, name, one.parse(name, getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Raise UsageError for options that are not valid together."""


def options_of(spec: type[Any]) -> dict[str, Option]:
    """Return the options of a spec class by field name, in the order of their declaration."""
    return {one.name: one.metadata["option"] for one in fields(spec)}


def keywords(spec: Callable[P, S]) -> Callable[[Callable[[S], R]], Callable[P, R]]:
    """Turn `function(spec)` into a function that takes the fields of the spec as keywords."""

    def decorate(function: Callable[[S], R]) -> Callable[P, R]:
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with _limits_explained():
                return function(_made(spec, function.__name__, args, kwargs))

        return _documented(call, function, spec, skip=1)  # type: ignore[no-any-return]

    return decorate


def bundle_keywords(
    spec: Callable[P, S], optional: bool = False
) -> Callable[[Callable[[Any, S], R]], Callable[Concatenate[BundlePath, P], R]]:
    """Turn `function(bundle, spec)` into a function of a bundle, which may be `optional`, and the fields of the spec."""

    def decorate(function: Callable[[Any, S], R]) -> Callable[Concatenate[BundlePath, P], R]:
        def call(bundle: BundlePath | None = None, /, *args: P.args, **kwargs: P.kwargs) -> R:
            given: Any = kwargs.pop("bundle", bundle)
            found = None if optional and given is None else path("bundle", given)
            with _limits_explained():
                return function(found, _made(spec, function.__name__, args, kwargs))

        changes = {"default": None} if optional else {}
        return _documented(call, function, spec, skip=2, **changes)  # type: ignore[no-any-return]

    return decorate


@contextlib.contextmanager
def _limits_explained() -> Iterator[None]:
    """Raise SwinDeployError with what to do for an error that a limit of the system caused, such as too little memory."""
    try:
        yield
    except SwinDeployError:
        raise
    except Exception as error:
        if (sentences := system_limit(error)) is None:
            raise
        raise SwinDeployError(sentences) from error


def _made(spec: Callable[..., S], verb: str, args: Sequence[Any], kwargs: dict[str, Any]) -> S:
    try:
        bound = inspect.signature(spec).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{verb}() {error}") from None
    return spec(*bound.args, **bound.kwargs)


def _documented(call: Any, function: Callable[..., Any], spec: Callable[..., Any], skip: int, **changes: Any) -> Any:
    """Give `call` the name, signature and docstring of `function`, with the options of `spec` as its `Args:`."""
    functools.update_wrapper(call, function)
    del call.__wrapped__
    own = inspect.signature(function)
    first = [one.replace(kind=one.POSITIONAL_ONLY, **changes) for one in list(own.parameters.values())[: skip - 1]]
    call.__signature__ = own.replace(parameters=[*first, *inspect.signature(spec).parameters.values()])
    lines = [f"    {name}: {one.help}" for name, one in options_of(spec).items()]  # type: ignore[arg-type]
    call.__doc__ = (inspect.getdoc(function) or "").replace("{options}", "\n".join(lines).lstrip())
    return call


# Parsers. Each names the option, says what was expected, and accepts the text of a flag.


def _refuse(name: str, value: Any, expected: str) -> UsageError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 and "\n" not in shown else "..."
    return UsageError(f"Invalid {name}: {shown} ({type(value).__name__}). Expected {expected}.")


def plain(value: Any) -> Any:
    """Return numbers of numpy as numbers of Python; sequences of them as tuples."""
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value


def _optional(parse: Parser) -> Parser:
    return lambda name, value: None if value is None else parse(name, value)


def anything(name: str, value: Any) -> Any:
    """Accept any value: it is checked where it is read."""
    return value


def images(name: str, value: Any) -> Any:
    """Accept a path, or anything that gives images one after the other or by number, as a data set of PyTorch does."""
    if isinstance(value, str | os.PathLike):
        return path(name, value)
    if isinstance(value, bytes) or not (isinstance(value, Iterable) or hasattr(value, "__getitem__")):
        raise _refuse(name, value, "a path, or a list of images")
    return value


def text(name: str, value: Any) -> str:
    """Accept text."""
    if not isinstance(value, str):
        raise _refuse(name, value, "text")
    return value


def path(name: str, value: Any) -> Path:
    """Accept a path that is not empty."""
    given = os.fspath(value) if isinstance(value, str | os.PathLike) else value
    if not isinstance(given, str) or not given or "\0" in given:
        raise _refuse(name, value, "a path")
    return Path(given)


def location(name: str, value: Any) -> str:
    """Accept a path, or text that may be one or the name of something else, and keep its spelling."""
    path(name, value)
    return str(os.fspath(value))


def flag(name: str, value: Any) -> bool:
    """Accept True and False, of Python or numpy."""
    if not isinstance(value := plain(value), bool):
        raise _refuse(name, value, "True or False")
    return value


def function(name: str, value: Any) -> Any:
    """Accept anything that can be called."""
    if not callable(value):
        raise _refuse(name, value, "a function")
    return value


def whole(low: int, high: int | None = None) -> Parser:
    """Return a parser of whole numbers from `low` to `high`."""
    limits = f"from {low} to {high}" if high is not None else f"of at least {low}"

    def whole_number(name: str, value: Any) -> int:
        found = int(value) if isinstance(value, str) and re.fullmatch(r"-?\d{1,10}", value.strip()) else plain(value)
        if type(found) is not int or found < low or (high is not None and found > high):
            raise _refuse(name, value, f"a whole number {limits}")
        return found

    return whole_number


def number(low: float, high: float = float("inf")) -> Parser:
    """Return a parser of finite numbers from `low` to `high`."""
    limits = f"from {low:g} to {high:g}" if high < float("inf") else f"of at least {low:g}"

    def finite_number(name: str, value: Any) -> float:
        found: Any = plain(value)
        with contextlib.suppress(ValueError):
            found = float(value) if isinstance(value, str) else found
        if type(found) not in (int, float) or not low <= found <= high or found == float("inf"):
            raise _refuse(name, value, f"a number {limits}")
        return float(found)

    return finite_number


def numbers(name: str, value: Any) -> tuple[float, ...]:
    """Accept one number of at least 0, several, or text such as "0.485,0.456,0.406"."""
    given = value.split(",") if isinstance(value, str) else _several(plain(value))
    if not given:
        raise _refuse(name, value, "numbers such as 0.485,0.456,0.406")
    return tuple(number(0)(name, one) for one in given)


def choice(kind: str, choices: Iterable[str]) -> Parser:
    """Return a parser that accepts one of `choices`; `kind` names them in the error, for example "precision"."""
    known = tuple(choices)

    def parse(name: str, value: Any) -> str:
        if text(name, value) not in known:
            raise unknown(kind, value, known)
        return str(value)

    parse.choices = known  # type: ignore[attr-defined]
    return parse


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Accept several texts, or one text with commas between them."""
    given = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(one, str) and one.strip(" ,") for one in given):
        raise _refuse(name, value, "a list of texts")
    return tuple(part.strip() for one in given for part in one.split(",") if part.strip())


def _whole_numbers(value: Any, separator: str) -> tuple[int, ...]:
    """Return the whole numbers in `value`: a number, a sequence, or text with separators; empty if it is anything else."""
    value = plain(value)
    if isinstance(value, str):
        parts = [part.strip() for part in re.split(separator, value)]
        value = tuple(int(part) if re.fullmatch(r"\d{1,10}", part) else None for part in parts)
    found = value if isinstance(value, tuple) else (value,)
    return found if all(type(one) is int for one in found) else ()


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def image_size(name: str, value: Any) -> tuple[int, int]:
    """Accept (height, width) in pixels, one number for a square, or text such as "256x320"."""
    found = _whole_numbers(value, "[xX]")
    height, width = found * 2 if len(found) == 1 else found if len(found) == 2 else (0, 0)
    if not (1 <= height < 10**6 and 1 <= width < 10**6):
        raise UsageError(
            f"Invalid image size {_shown(value)}. Expected HEIGHTxWIDTH in pixels, for example 256x320, or 256 for a square."
        )
    return height, width


def image_sizes(name: str, value: Any) -> tuple[tuple[int, int], ...]:
    """Accept several image sizes. A bare tuple of two numbers is refused: it could be one size or two squares."""
    if isinstance(value, tuple) and len(value) == 2 and _whole_numbers(value, "x"):
        raise UsageError(f"Invalid {name}: {value!r}. Expected a list of sizes, for example [{value!r}] or [256, 320].")
    return tuple(image_size(name, one) for one in _several(value))


def per_stage(name: str, value: Any) -> tuple[int | tuple[int, int], ...]:
    """Accept one window, one for each stage, or text such as "8,8,8,4" and "4x8". A window is a number, or height and width."""
    parts = value.split(",") if isinstance(value, str) else plain(value)
    windows = [_whole_numbers(part, "[xX]") for part in (parts if isinstance(parts, list | tuple) else [parts])]
    if not windows or not all(len(one) in (1, 2) and 0 <= min(one) <= max(one) <= 9999 for one in windows):
        raise _refuse(name, value, "a whole number such as 8, HxW such as 4x8, or one for each stage such as 8,8,8,4")
    return tuple(one[0] if one[0] == one[-1] else (one[0], one[1]) for one in windows)


def batch(name: str, value: Any) -> tuple[int, int, int]:
    """Accept (smallest, optimal, largest) batch size, one number for all three, or text such as "1:8:32"."""
    found = _whole_numbers(value, ":")
    low, best, high = found * 3 if len(found) == 1 else found if len(found) == 3 else (0, 0, 0)
    if not 1 <= low <= best <= high < 1 << 31:
        raise UsageError(
            f"Invalid batch range {_shown(value)}. Expected MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX < 2^31, for example 1:8:32 "
            f"or 8."
        )
    return low, best, high


def batches(name: str, value: Any) -> tuple[tuple[int, int, int], ...]:
    """Accept several batch ranges. A bare tuple of three numbers is refused: it could be one range or three sizes."""
    if isinstance(value, tuple) and len(value) == 3 and _whole_numbers(value, ":"):
        raise UsageError(f"Invalid {name}: {value!r}. Expected a list of ranges, for example [{value!r}] or [1, 8, 32].")
    found = tuple(batch(name, one) for one in _several(value))
    if not found or len(set(found)) != len(found):
        raise UsageError(f"Invalid {name}: {value!r}. Expected one or more batch ranges, each of them once.")
    return found


def many(parse: Parser) -> Parser:
    """Return a parser of several values, or of a single one."""
    return lambda name, value: tuple(parse(name, one) for one in _several(value))


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def memory(name: str, value: Any) -> int:
    """Accept bytes as a whole number, or text such as "2GiB"."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([KMG]B|[KMGT]iB|)", value.strip(), re.IGNORECASE)
        size: Any = int(float(match[1]) * _BYTES[match[2].lower()]) if match else 0
    else:
        size = plain(value)
    if type(size) is not int or not 1 <= size < 1 << 63:
        raise UsageError(f"Invalid {name} {value!r}. Expected bytes, or a number and a unit such as 2GiB or 512MiB.")
    return size
