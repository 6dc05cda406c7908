"""Targets as people write them: parameters=95M, flops=80%, decode=25ms."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from foldgpt.counts import count
from foldgpt.errors import did_you_mean

What = Literal["parameters", "flops", "prefill", "decode"]

_SECONDS = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s)", re.IGNORECASE)
_FLOPS = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([MGT])(?:FLOPs?)?", re.IGNORECASE)
_MULTIPLES = {"m": 1e6, "g": 1e9, "t": 1e12}
_SUCH_AS = {
    "parameters": "95M or 80%",
    "flops": "40G or 80%",
    "prefill": "200ms or 80%",
    "decode": "25ms or 80%",
}


@dataclass(frozen=True)
class Target:
    """What a folded model may take.

    Attributes:
        what: "parameters" of the whole model; "flops" of a forward pass over one calibration window; or the measured
            seconds of that pass ("prefill") or of one token ("decode").
        value: how much of it, in parameters, floating-point operations or seconds; or which part of the source's.
        is_ratio: whether it is a part.
    """

    what: What
    value: float
    is_ratio: bool

    def limit(self, of_source: float) -> float:
        """What the folded model may take, where its source takes `of_source`."""
        return self.value * of_source if self.is_ratio else self.value

    @property
    def is_measured(self) -> bool:
        """Whether it is a time, which another machine, or another moment, answers differently."""
        return self.what in ("prefill", "decode")


def target(written: str) -> Target:
    """A target written as WHAT=HOW_MUCH.

    HOW_MUCH is a part of what the source takes (`0.8`, `80%`), or parameters (`95M`), operations (`40G`) or a time
    (`25ms`, `0.5s`).

    Raises:
        ValueError: it is none of these.
    """
    name, equals, amount = (part.strip() for part in written.partition("="))
    if not equals:
        raise ValueError(f"{written!r} is not a target: write WHAT=HOW_MUCH, such as parameters=95M or decode=80%")
    if name not in get_args(What):
        raise ValueError(f"{written!r}: unknown target {name!r}.{did_you_mean(name, get_args(What))}")
    what: What = name  # type: ignore[assignment]
    try:
        ratio = float(amount[:-1]) / 100 if amount.endswith("%") else float(amount)
    except ValueError:
        ratio = None
    if ratio is not None and 0 < ratio < 1:
        return Target(what, ratio, True)
    value = None if amount.endswith("%") else _amount(what, amount)
    if not value:
        raise ValueError(f"{written!r}: {amount!r} is no amount of {what}, such as {_SUCH_AS[what]}")
    return Target(what, value, False)


def _amount(what: What, written: str) -> float | None:
    """Parameters, operations or seconds; None where it is not written so."""
    if what == "parameters":
        try:
            return float(count(written))
        except ValueError:
            return None
    if what == "flops":
        match = _FLOPS.fullmatch(written)
        return None if match is None else float(match[1]) * _MULTIPLES[match[2].lower()]
    match = _SECONDS.fullmatch(written)
    return None if match is None else float(match[1]) * (1e-3 if match[2].lower() == "ms" else 1.0)
