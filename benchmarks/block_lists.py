"""Blocks as the command lines of benchmarks name them."""

from __future__ import annotations


def blocks_of(text: str) -> list[int]:
    """The blocks that "3,7-9" names."""
    blocks: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        blocks += range(int(first), int(last or first) + 1)
    return blocks
