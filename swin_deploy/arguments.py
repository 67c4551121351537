"""checked: the arguments of a public function are of the types that it is annotated with, or one sentence says which is not.

Texts, numbers, paths, lists and functions are checked, by the words of the annotations, before the function does anything;
what is annotated otherwise (images, arrays) is checked where it is read.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar, cast

from swin_deploy.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])
Kind = tuple[str, Callable[[Any], bool]]  # what is expected, for the end of a sentence, and whether a value is that


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _are_whole(values: Any, count: int) -> bool:
    return _is_list(values) and len(values) == count and all(map(_is_whole, values))


def _is_list(value: object) -> bool:
    """Whether it is a list or the like, and not a text, whose items are its letters."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_path(value: object) -> bool:
    """Whether it is a path of text. None holds the character 0, and an empty one would be the current folder."""
    return isinstance(value, str | os.PathLike) and isinstance(text := os.fspath(value), str) and text > "" and "\0" not in text


def _are_several(value: object) -> bool:
    """Whether it gives one item after the other; a data set may know them by number alone, as PyTorch's do."""
    return (isinstance(value, Iterable) or hasattr(value, "__getitem__")) and not isinstance(value, str | bytes)


KINDS: dict[str, Kind] = {
    "None": ("None", lambda value: value is None),
    "str": ("a text", lambda value: isinstance(value, str)),
    "path": ("a path", _is_path),
    "int": ("a whole number", _is_whole),
    "float": ("a number", lambda value: isinstance(value, Real) and not isinstance(value, bool)),
    "bool": ("True or False", lambda value: type(value).__name__ in ("bool", "bool_")),  # Python's, or numpy's
    "Say": ("a function", callable),
    "Progress": ("a function", callable),
    "Iterable[Any]": ("a list of images", _are_several),
    "Iterable[str]": ("a list of texts", _are_several),
    "Samples": ("Samples", lambda value: type(value).__name__ == "Samples"),
    "TaskSpec": ("a TaskSpec", lambda value: type(value).__name__ == "TaskSpec"),
}


def checked(function: F) -> F:
    """`function`, which raises UsageError for an argument of another type than it is annotated with.

    Numbers of numpy become Python's, and lists of numbers tuples.
    """
    annotations = {name: str(one.annotation) for name, one in inspect.signature(function).parameters.items()}
    kinds = {name: kinds_of(annotation) for name, annotation in annotations.items()}
    numbers = {name for name, annotation in annotations.items() if re.search(r"\b(int|float|bool)\b", annotation)}

    def plain(name: str, value: Any) -> Any:
        if not kinds.get(name):
            return value
        _check(name, value, kinds[name])
        return _plain(value) if name in numbers else value

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        known = [plain(name, value) for name, value in zip(kinds, args, strict=False)]
        named = {name: plain(name, value) for name, value in kwargs.items()}
        return function(*known, *args[len(known) :], **named)  # which says itself what is missing or too many

    return cast(F, call)


def _plain(value: Any) -> Any:
    """A number of numpy as one that JSON knows; those in a list, too."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value.item() if type(value).__module__ == "numpy" else value


def kinds_of(annotation: str) -> list[Kind]:
    """What an annotation such as "int | Sequence[int] | None" stands for; nothing where a part of it is not checked."""
    parts = annotation.replace("str | os.PathLike[str]", "path").split(" | ")
    kinds = [_kind(part) for part in parts]
    return [kind for kind in kinds if kind is not None] if None not in kinds else []


def _kind(part: str) -> Kind | None:
    if part.startswith("Callable["):
        return "a function", callable
    if (match := re.fullmatch(r"Sequence\[(.+)\]", part)) and (item := _kind(match[1])) is not None:
        several = re.sub("^a (.*?)( of .*)?$", r"\1s\2", item[0])
        return f"a list of {several}", lambda value: _is_list(value) and all(map(item[1], value))
    if match := re.fullmatch(r"tuple\[(int(?:, int)*)\]", part):
        count = match[1].count("int")
        return f"a tuple of {count} whole numbers", functools.partial(_are_whole, count=count)
    return KINDS.get(part)


def _check(name: str, value: object, kinds: Sequence[Kind]) -> None:
    if not any(fits(value) for _, fits in kinds):
        shown = repr(value)
        said = f"{shown} ({type(value).__name__})" if len(shown) <= 60 and "\n" not in shown else f"a {type(value).__name__}"
        raise UsageError(f"{name} is {said}, and must be {' or '.join(words for words, _ in kinds)}.")
