"""Sizes as people write them: 0.7, 70%, 95M, 200MB."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from foldgpt.counts import count

_BYTES = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kMG])B\s*", re.IGNORECASE)
_MULTIPLES = {"k": 1e3, "m": 1e6, "g": 1e9}


@dataclass(frozen=True)
class Size:
    """What a model may take.

    Attributes:
        unit: "ratio" of the parameters in blocks; "parameters" of the whole model; or "bytes" of all its weights.
        value: how much.
    """

    unit: Literal["ratio", "parameters", "bytes"]
    value: float


def size(written: str | float) -> Size:
    """A size written as a fraction (`0.7`, `70%`), as parameters (`95M`, `95_000_000`) or as bytes (`200MB`).

    Raises:
        ValueError: it is none of these, or a fraction that is not between 0 and 1.
    """
    text = str(written).strip()
    if match := _BYTES.fullmatch(text):
        return Size("bytes", float(match[1]) * _MULTIPLES[match[2].lower()])
    try:
        ratio = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        ratio = None
    if ratio is not None and (ratio <= 1 or text.endswith("%") or not ratio.is_integer()):
        if not 0 < ratio < 1:
            raise ValueError(f"{written!r} is not a fraction between 0 and 1")
        return Size("ratio", ratio)
    try:
        return Size("parameters", count(text))
    except ValueError:
        raise ValueError(f"{written!r} is not a size, such as 0.7, 95M (parameters) or 200MB (of weights)") from None
