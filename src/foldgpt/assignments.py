"""NAME=VALUE as people write it on a command line: rank=32, learning_rate=5e-4."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from foldgpt.errors import UsageError


def assignments(given: Iterable[str], flag: str = "--set") -> dict[str, Any]:
    """Names and values; of a name that is given twice the last one counts.

    Args:
        given: what was written.
        flag: where, for the error message.

    Raises:
        UsageError: one is not of this form.
    """
    found: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"{flag} takes NAME=VALUE, not {pair!r}")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    """A number, a truth value, nothing, or the text itself."""
    for read in (int, float):
        with contextlib.suppress(ValueError):
            return read(text)
    return {"true": True, "false": False, "none": None, "null": None}.get(text.lower(), text)
