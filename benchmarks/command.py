"""How a benchmark was called, for its results."""

from __future__ import annotations

import sys
from pathlib import Path


def command_line() -> list[str]:
    """The command, with the names of files in place of their paths."""
    return ["python", *(Path(word).name if "/" in word else word for word in sys.argv)]
