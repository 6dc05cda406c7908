"""The forward passes that a search of gates may take, and what is left of them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from foldgpt.selection.cost import RemovalCost, Sample
from foldgpt.selection.greedy import removal_passes


class Allowance:
    """What a search may count in `forward_equivalents`; what a resumed one sets up anew is not held against it.

    Args:
        cost: the measure.
        effort: the allowance, as a share of what greedy removal of the same budget is expected to take.
        progress: "samples" and "set_up_again" of the search before it was stopped, as `progress` gives them.

    Attributes:
        passes: the allowance.
    """

    def __init__(self, cost: RemovalCost, effort: float, progress: dict[str, Any]) -> None:
        self.passes = effort * greedy_equivalents(cost) + cost.prior_equivalents
        self._cost = cost
        self._samples_before: Collection[tuple[int, int]] = [tuple(sample) for sample in progress["samples"]]
        self._set_up_again_before: float = progress["set_up_again"]

    @property
    def spent(self) -> float:
        """What of it is spent."""
        return self._cost.forward_equivalents - self._set_up_again

    @property
    def left(self) -> float:
        """What of it is not."""
        return self.passes - self.spent

    def spent_beyond(self, limit: float, sample: Sample) -> Callable[[], bool]:
        """Whether one more set measured on a sample would take more than `limit` passes in all."""
        one = self._cost.predicted_equivalents(1, sample)
        return lambda: self.spent + one > limit

    def progress(self) -> dict[str, Any]:
        """What has to be known of it when the search goes on, as JSON values."""
        return {
            "samples": sorted({*self._samples_before, *self._cost.samples}),
            "set_up_again": self._set_up_again,
        }

    @property
    def _set_up_again(self) -> float:
        """What was set up more than once, all interruptions together."""
        return self._set_up_again_before + self._cost.set_up_again(self._samples_before)


def greedy_equivalents(cost: RemovalCost) -> float:
    """What greedy removal of the same budget would count in forward passes."""
    units = cost.units
    removals = units.target * len(units) / sum(units.sizes)
    head = cost.predicted_equivalents(1, cost.everything, share_run=0)
    return removal_passes(len(units), removals, head=head)
