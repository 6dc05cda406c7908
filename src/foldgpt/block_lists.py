"""Blocks as people name them: "3,7-9"."""

from __future__ import annotations

from foldgpt.errors import UsageError


def blocks_of(written: object, what: str = "blocks") -> list[int]:
    """The numbers of blocks that are named, in the order of their naming.

    Args:
        written: numbers and ranges with commas between, such as "3,7-9", one number, or a list of these.
        what: what they are, for the error message.

    Raises:
        UsageError: it is none of these, or names a block twice.
    """
    parts = written if isinstance(written, list | tuple) else str(written).split(",")
    blocks: list[int] = []
    for part in parts:
        first, dash, last = str(part).replace("–", "-").partition("-")
        try:
            found = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            found = range(0)
        if not found or isinstance(part, bool | float):
            raise UsageError(f"{what} {written!r}: {part!r} is neither a block nor a range of them such as 7-9")
        blocks += found
    twice = next((block for block in blocks if blocks.count(block) > 1), None)
    if twice is not None:
        raise UsageError(f"{what} {written!r}: block {twice} stands there twice")
    return blocks
