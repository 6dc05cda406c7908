"""Which weights are plain numbers, to be averaged, merged and trained."""

from __future__ import annotations

from torch import Tensor


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is of a floating-point format of 16 bits or more; what is narrower is quantised, float8 too."""
    return weight.is_floating_point() and weight.dtype.itemsize >= 2
