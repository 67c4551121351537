"""How the functions tell what they are doing."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Tells nobody."""
