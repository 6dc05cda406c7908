"""How a benchmark was called, for its results."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path


def command_line() -> list[str]:
    """The command, with the names of files and folders in place of their paths.

    A hub id has a slash as well: what is neither there nor an absolute path stays as it is.
    """
    return ["python", *(Path(word).name if _is_path(word) else word for word in sys.argv)]


def as_typed(command: Sequence[str]) -> str:
    """A command as a shell takes it, words with blanks in quotes."""
    return shlex.join(command)


def _is_path(word: str) -> bool:
    return os.sep in word and (Path(word).is_absolute() or Path(word).exists())
