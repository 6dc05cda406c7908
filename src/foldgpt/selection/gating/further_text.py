"""The further text of a search: how finals divide it, what they take, and by which measure they are held."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from foldgpt.selection.cost import RemovalCost, Sample
from foldgpt.selection.further_windows import last_stage_windows
from foldgpt.selection.gating.finals import Final, Measure, Round, finals, highest_level_cost, level_with_best
from foldgpt.selection.selection import Request
from foldgpt.selection.units import Removed

#: Sets are level whose damage is at most this much more than the best one's; so many of them are measured, the best
#: ones. On 2,048 positions the mean KL is known to about 3 %; differences between sets, which are measured at the same
#: ones, to less.
_LEVEL, MOST = 0.03, 4
#: The share of the allowance that a search leaves for finals.
_SHARE = 0.1
#: What a round may keep of the states of its few sets, in bytes.
_CACHE = 256 * 2**20


class FurtherText:
    """What a search may know of the text that it does not see.

    Sets are measured on one part of it after the other. Of compensated ones something else decides
    (`folded_refinement`).

    Args:
        request: of the search.
        cost: its measure.

    Attributes:
        rounds: the windows of each round, int64 [W, T]; empty if there are too few for finals.
    """

    def __init__(self, request: Request, cost: RemovalCost) -> None:
        self._request = request
        self._cost = cost
        self.rounds: list[Tensor] = []
        further_WT, ids_WT = request.further_ids_WT, request.ids_WT
        if request.compensate or further_WT is None or ids_WT is None:
            return
        if last_stage_windows(len(ids_WT), len(further_WT), compensated=False):
            self.rounds = [part for part in further_WT.split(len(ids_WT)) if 2 * len(part) >= len(ids_WT)]

    def reserve(self, allowance: float) -> float:
        """What a search should leave for its finals, in forward equivalents.

        Args:
            allowance: of the whole search.
        """
        return _SHARE * allowance if self.rounds else 0.0

    def price(self, removed: Removed) -> float:
        """What the first round of finals takes for one more set, its recording included, in forward equivalents.

        Args:
            removed: a set like it; it may begin at the first block, though, and then shares no states.
        """
        equivalents = self._cost.further_equivalents
        return max(equivalents([found], self.rounds[0]) for found in (removed, removed | {0}))

    def level_cost(self, known: Mapping[Removed, float], sample: Sample) -> float:
        """The cost up to which sets are level with the best one.

        Args:
            known: set → cost, as the search measured them.
            sample: where it did.
        """
        return highest_level_cost(min(known.values()), self._cost.source_cost(sample), _LEVEL)

    def finals(
        self,
        known: Mapping[Removed, float],
        left: Callable[[], float],
        past: list[Round],
        keep: Callable[[], None],
        *,
        earlier: Sequence[Sequence[Round]] = (),
        incumbents: Sequence[Removed] = (),
    ) -> list[Final]:
        """What is level by the search, judged on this text; what it takes is added to the search's measure.

        Args:
            known: set → cost, as the search measured them.
            left: of the allowance, in forward equivalents.
            past: see `finals.finals`.
            keep: called whenever something was measured and counted.
            earlier: see `finals.finals`.
            incumbents: what came out of the finals before; only sets that those did not measure are put beside them.

        Returns:
            See `finals.finals`; none as well where one set was ahead in the search.

        Raises:
            FoldGPTError: the predictions of a set are not finite.
        """
        if not known or not self.rounds:
            return []
        before = {removed for stage in earlier for found in stage for removed in found.sets}
        level = level_with_best(known, self._cost.source_cost(), _LEVEL)
        sets = [*incumbents, *[removed for removed in level if removed not in before][:MOST]]
        if len(sets) < 2 or len(sets) == len(incumbents):
            return []
        self._cost.forget()
        counted = (0.0, 0.0)  # of the present round
        resumes = any(0 < len(found.costs) < len(found.sets) for found in past)

        def measure(ids_WT: Tensor) -> Measure:
            nonlocal counted, resumes
            found = self._measure(ids_WT)
            # What an interrupted round records a second time is no part of the allowance.
            counted = (0.0, found.forward_tokens if resumes else 0.0)
            resumes = False
            return found

        def count_in(measured: Measure) -> None:
            nonlocal counted
            now = (measured.seconds, measured.forward_tokens)
            seconds, tokens = (after - before for after, before in zip(now, counted, strict=True))
            counted = now
            self._cost.add_spent(seconds, tokens / self._num_tokens)
            keep()

        def affordable(sets: Sequence[Removed], ids_WT: Tensor) -> int:
            numbers = range(len(sets), 0, -1)
            return next(
                (number for number in numbers if self._cost.further_equivalents(sets[:number], ids_WT) <= left()), 0
            )

        return finals(
            sets,
            self.rounds,
            measure,
            level=_LEVEL,
            past=past,
            earlier=earlier,
            affordable=affordable,
            after_each=count_in,
        )

    def _measure(self, ids_WT: Tensor) -> Measure:
        return replace(self._request, ids_WT=ids_WT).need_cost("gates", cache_bytes=_CACHE)

    @property
    def _num_tokens(self) -> int:
        return self._cost.replay.ids_WT.numel()
