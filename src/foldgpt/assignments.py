"""NAME=VALUE as people write it on a command line: rank=32, learning_rate=5e-4, tasks=[piqa, arc_easy]."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import yaml

from foldgpt.errors import UsageError
from foldgpt.strict_yaml import load_yaml


def assignments(given: Iterable[str], flag: str = "--set") -> dict[str, Any]:
    """Names and values; of a name that is given twice the last one counts.

    Args:
        given: what was written.
        flag: where, for the error message.

    Raises:
        UsageError: one is not of this form, or begins with a bracket or a quote and is no YAML.
    """
    found: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"{flag} takes NAME=VALUE, not {pair!r}")
        try:
            found[name] = _value(value)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or error
            raise UsageError(f"{flag} {pair}: lists, mappings and quotes are as in YAML, and {problem}") from None
    return found


def _value(text: str) -> Any:
    """A number, a truth value, nothing, a list, a mapping or a quoted text as in YAML, or the text itself.

    `none` is text, a choice of many settings; nothing is `null` or Python's `None`. A number in quotes is text too.
    """
    for read in (int, float):
        with contextlib.suppress(ValueError):
            return read(text)
    if text.startswith(("[", "{", '"', "'")):
        return load_yaml(text)
    if text == "None":
        return None
    return {"true": True, "false": False, "null": None, "~": None}.get(text.lower(), text)
