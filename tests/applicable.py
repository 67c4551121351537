"""Tests that cannot apply to a machine are listed, and never fail for it."""

from __future__ import annotations

from typing import NoReturn

import pytest

NOT_APPLICABLE = "not applicable: "


def not_applicable(reason: str) -> NoReturn:
    """Skip a test that no installation could make this machine run, such as a compiler without support for its GPU."""
    pytest.skip(NOT_APPLICABLE + reason)
