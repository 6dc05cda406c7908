"""How a benchmark was called, for its results."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def command_line() -> list[str]:
    """The command, with the names of files and folders in place of their paths.

    A hub id has a slash as well: what is neither there nor an absolute path stays as it is.
    """
    return ["python", *without_folders(sys.argv)]


def without_folders(value: Any) -> Any:
    """Plain values in which paths are names: the folders of one machine say nothing on another."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and _is_path(value) else value


def as_typed(command: Sequence[str]) -> str:
    """A command as a shell takes it, words with blanks in quotes."""
    return shlex.join(command)


def _is_path(word: str) -> bool:
    return os.sep in word and (Path(word).is_absolute() or Path(word).exists())
