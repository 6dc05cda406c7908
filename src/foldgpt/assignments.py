"""NAME=VALUE as people write it on a command line: rank=32, learning_rate=5e-4, tasks=[piqa, arc_easy]."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import yaml

from foldgpt.errors import UsageError


def assignments(given: Iterable[str], flag: str = "--set") -> dict[str, Any]:
    """Names and values; of a name that is given twice the last one counts.

    Args:
        given: what was written.
        flag: where, for the error message.

    Raises:
        UsageError: one is not of this form, or begins with a bracket and is no list or mapping.
    """
    found: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"{flag} takes NAME=VALUE, not {pair!r}")
        try:
            found[name] = _value(value)
        except (yaml.YAMLError, ValueError) as error:  # yaml lets errors of what looks like a date through
            problem = getattr(error, "problem", None) or error
            raise UsageError(f"{flag} {pair}: a list or a mapping is to be written as in YAML, and {problem}") from None
    return found


def _value(text: str) -> Any:
    """A number, a truth value, nothing, a list or mapping as in YAML, or the text itself.

    `none` is text, a choice of many settings; nothing is `null` or Python's `None`.
    """
    for read in (int, float):
        with contextlib.suppress(ValueError):
            return read(text)
    if text.startswith(("[", "{")):
        return yaml.safe_load(text)
    if text in ("null", "None"):
        return None
    return {"true": True, "false": False}.get(text.lower(), text)
