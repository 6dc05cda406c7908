"""Counts as people write them: 2M, 500k, 1e6."""

from __future__ import annotations

import re
from decimal import Decimal

_MULTIPLES = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
_WRITTEN = re.compile(
    r"\s*((?:[0-9]{1,3}(?:[,_][0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?)\s*([kmb]?)\s*", re.IGNORECASE
)


def count(written: str | int) -> int:
    """A whole number written as `2M`, `500k`, `1.5M`, `1e6`, `32_768`, `32,768` or plainly; k, M and B are decimal.

    Raises:
        ValueError: it is none of these, or not a whole number.
    """
    if isinstance(written, int):
        return written
    match = _WRITTEN.fullmatch(written)
    if match is None:
        raise ValueError(f"{written!r} is not a count, such as 500000, 500k or 2M")
    digits, multiple = match.groups()
    value = Decimal(digits.replace("_", "").replace(",", "")) * _MULTIPLES[multiple.lower()]
    if value != int(value):
        raise ValueError(f"{written!r} is not a whole number")
    return int(value)
