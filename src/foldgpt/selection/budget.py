"""How many blocks a wish means: a count, a ratio."""

from __future__ import annotations


def number_to_remove(num_blocks: int, *, remove: int | None, ratio: float | None) -> int:
    """How many blocks a count or a ratio means; the ratio is of all blocks, rounded to the nearest count."""
    if remove is not None:
        return remove
    return round(num_blocks * ratio) if ratio is not None else 0
