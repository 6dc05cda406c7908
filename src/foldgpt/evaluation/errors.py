"""What can go wrong while measuring."""

from __future__ import annotations

from foldgpt.errors import FoldGPTError


class MeasurementError(FoldGPTError):
    """A measurement that could not be made, or whose result would mean nothing."""


class NotEnoughMemoryError(MeasurementError):
    """A measurement that takes more memory than there is."""
