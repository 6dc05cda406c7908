"""What can go wrong in recovery alone."""

from __future__ import annotations

from foldgpt.errors import FoldGPTError


class DivergenceError(FoldGPTError):
    """Training left the numbers in which it makes sense; the best state before is kept."""
