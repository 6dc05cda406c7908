"""On which of the windows each stage of a search of gates measures."""

from __future__ import annotations

import itertools
import math
from functools import cached_property

from foldgpt.selection.cost import PARTS, RemovalCost, Sample

#: Refinement measures on a quarter of the windows, or on those that hold this many tokens if that is more.
_REFINEMENT_TOKENS = 8192


class StageSamples:
    """The samples of learning and refinement; sets that refinement likes are judged on all windows.

    Args:
        cost: the measure.
        learns_from_sets: whether gates are learned by measuring sets, and not by a gradient.
    """

    def __init__(self, cost: RemovalCost, *, learns_from_sets: bool) -> None:
        self._cost = cost
        self._learns_from_sets = learns_from_sets

    @cached_property
    def learning(self) -> list[Sample]:
        """What gates are learned on, in turn: a micro-batch, or as many as a compensation needs to tell sets apart.

        Fitted on a window or less, it is another one than all that comes after it sees, and favours other sets.
        """
        batches = number = self._cost.num_batches
        if self._cost.compensate and self._learns_from_sets:
            number = max(1, batches // math.ceil(PARTS / self._cost.replay.batch_size))
        edges = [k * batches // number for k in range(number + 1)]
        return [self._cost.sample(start, stop) for start, stop in itertools.pairwise(edges)]

    @property
    def refinement(self) -> Sample:
        """What promising sets and their neighbours are measured on."""
        batches = self._cost.num_batches
        share = max(0.25, _REFINEMENT_TOKENS / self._cost.replay.ids_WT.numel())
        if self._cost.compensate:
            share = max(share, PARTS / self._cost.replay.num_windows)
        return self._cost.sample(0, min(batches, math.ceil(batches * share)))

    @property
    def refines_on_everything(self) -> bool:
        """Whether there is nothing left to judge on."""
        return self.refinement is self._cost.everything

    def price_of_judging(self, number: int) -> float:
        """What measuring so many sets on all windows takes, where refinement sees a part of them."""
        return 0.0 if self.refines_on_everything else self._cost.predicted_equivalents(number, self._cost.everything)
