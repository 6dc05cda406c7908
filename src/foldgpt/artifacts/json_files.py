"""JSON files, written atomically and read with errors that name the place."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foldgpt.artifacts.staging import write_text
from foldgpt.errors import ArtifactError, first_line


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinities are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path, what: str = "file") -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: what the file is, for the error message ("plan", "analysis").

    Raises:
        ArtifactError: missing, unreadable, or not JSON, or a key stands twice in one object, of which Python would
            take the last without a word; the message names the line or the key.
    """
    path = Path(path)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = next((key for key in keys if keys.count(key) > 1), None) if len(set(keys)) < len(keys) else None
        if twice is not None:
            raise ArtifactError(f"{twice!r} stands twice in one object of the {what} {path}: leave one of them")
        return dict(pairs)

    try:
        # Some editors put a mark in front of UTF-8.
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except FileNotFoundError:
        raise ArtifactError(f"{what} not found: {path}") from None
    except OSError as error:
        raise ArtifactError(f"cannot read the {what} {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"the {what} {path} is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ArtifactError(
            f"the {what} {path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except (RecursionError, ValueError) as error:  # brackets in brackets without end; a number of thousands of digits
        raise ArtifactError(f"the {what} {path} is no JSON that can be read: {first_line(error)}") from error


def without_infinity(value: Any) -> Any:
    """A JSON value with None in place of what JSON has no number for: NaN and the infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_infinity(item) for key, item in value.items()}
    return [without_infinity(item) for item in value] if isinstance(value, (list, tuple)) else value


def with_infinity(values: Sequence[float | None]) -> list[float]:
    """Costs as they were before `without_infinity`, which leaves None where something cannot be had at any cost."""
    return [math.inf if value is None else value for value in values]
