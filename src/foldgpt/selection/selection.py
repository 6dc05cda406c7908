"""What a selector is asked and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from foldgpt.analysis import Analysis
from foldgpt.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Request:
    """What a selector is asked.

    Attributes:
        num_blocks: blocks of the source model.
        num_remove: how many to remove.
        analysis: the redundancy analysis, for selectors that read it.
        seed: for selectors that draw.
    """

    num_blocks: int
    num_remove: int
    analysis: Analysis | None = None
    seed: int = 0

    def need_analysis(self, method: str) -> Analysis:
        """The analysis, or an error that says who needs it."""
        if self.analysis is None:
            raise UsageError(f"the selector {method!r} reads an analysis; run `foldgpt analyze` first")
        if self.analysis.num_blocks != self.num_blocks:
            raise UsageError(
                f"the analysis is of a model with {self.analysis.num_blocks} blocks, this one has {self.num_blocks}"
            )
        return self.analysis


@dataclass(frozen=True)
class Selection:
    """What a selector answers.

    Attributes:
        method: its name.
        scores: one number a block, higher = more worth keeping; None where the method does not score.
        order: all blocks it would remove, in that order; at least the removed ones.
        removed: the blocks to remove, increasing.
    """

    method: str
    scores: tuple[float, ...] | None
    order: tuple[int, ...]
    removed: tuple[int, ...]


Selector = Callable[[Request], Selection]


def select(selectors: Mapping[str, Selector], method: str, request: Request) -> Selection:
    """Call a selector by name after checking the request; see `foldgpt.selection.select`."""
    if method not in selectors:
        raise UsageError(f"unknown selector {method!r}.{did_you_mean(method, selectors)}")
    if not 0 <= request.num_remove < request.num_blocks:
        raise UsageError(
            f"cannot remove {request.num_remove} of {request.num_blocks} blocks; "
            f"a number from 0 to {request.num_blocks - 1} leaves at least one"
        )
    return selectors[method](request)


def number_to_remove(num_blocks: int, *, remove: int | None, ratio: float | None) -> int:
    """How many blocks a count or a ratio means; the ratio is of all blocks, rounded to the nearest count."""
    if remove is not None:
        return remove
    return round(num_blocks * ratio) if ratio is not None else 0
