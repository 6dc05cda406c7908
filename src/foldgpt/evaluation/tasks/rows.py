"""Local rows of a task: JSON lines, each checked before anything is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from foldgpt.corpus.texts import check_is_unicode, json_row
from foldgpt.errors import SourceError, UsageError, did_you_mean

Kind = Literal["text", "gap", "choice", "choices", "index", "zero_or_one", "one_or_two"]


def _is_choice(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


_KINDS: dict[Kind, tuple[str, Callable[[Any], bool]]] = {
    "text": ("text", lambda value: isinstance(value, str)),
    "gap": ("text with a gap, written _", lambda value: isinstance(value, str) and "_" in value),
    # Of an empty choice the harness would score the space before it.
    "choice": ("text that is not empty", _is_choice),
    "choices": (
        "a list of at least two texts that are not empty",
        lambda value: isinstance(value, list) and len(value) > 1 and all(map(_is_choice, value)),
    ),
    # True and False are integers to Python, but not to whoever wrote the file.
    "index": ("an index, from 0", lambda value: type(value) is int and value >= 0),
    "zero_or_one": ("0 or 1", lambda value: type(value) is int and value in (0, 1)),
    "one_or_two": ('"1" or "2"', lambda value: value in ("1", "2")),
}


def find_file(folder: Path, pattern: str, task: str) -> Path:
    """The one file of a folder that matches a task's pattern.

    Raises:
        UsageError: there is no such folder, or several files match.
        SourceError: no file matches.
    """
    if not folder.is_dir():
        raise UsageError(f"the folder of task data does not exist: {folder}")
    files = sorted(folder.glob(pattern))
    if not files:
        near = did_you_mean(pattern.replace("*", ""), [file.name for file in folder.glob("*.jsonl")])
        raise SourceError(f"no file {pattern} for the task {task} in {folder}.{near}")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UsageError(f"several files for the task {task} in {folder}: {names}. Leave one of them there.")
    return files[0]


def read_rows(file: Path, fields: Mapping[str, Kind]) -> list[dict[str, Any]]:
    """Read and check the rows of a JSON-lines file; empty lines are passed over.

    Args:
        file: the file.
        fields: what each row must have. Other fields are dropped.

    Raises:
        SourceError: it cannot be read, holds no row, or a row is malformed or has an answer that is not among its
            choices; the message names file and line.
    """
    rows = []
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror or error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_checked(line, fields, f"{file} line {number}"))
    if not rows:
        raise SourceError(f"{file} holds no rows")
    return rows


def _checked(line: bytes, fields: Mapping[str, Kind], place: str) -> dict[str, Any]:
    row = json_row(line, place)
    for name, kind in fields.items():
        if name not in row:
            raise SourceError(f"{place}: the field {name!r} is missing.{did_you_mean(name, row)}")
        wanted, is_right = _KINDS[kind]
        if not is_right(row[name]):
            raise SourceError(f"{place}: {name} must be {wanted}, not {row[name]!r}")
        for text in row[name] if isinstance(row[name], list) else [row[name]]:
            if isinstance(text, str):
                check_is_unicode(text, place)
    num_choices = sum(len(row[name]) if kind == "choices" else kind == "choice" for name, kind in fields.items())
    for name, kind in fields.items():
        # The harness would count an item whose answer is not among its choices as wrong.
        if kind == "index" and row[name] >= num_choices:
            raise SourceError(f"{place}: the answer is choice {row[name]}, but there are {num_choices} (from 0)")
    return {name: row[name] for name in fields}
