"""FoldedCost: how far a model is from its source once it is folded without some units.

Searches compensate in the way that is fast enough for hundreds of sets. Folding fits the whole output matrix on more
text, and what is ahead by a little behind the one fit may be behind by more after the other. So where few sets are left
to choose from, each is compensated as folding will do it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from foldgpt.compensation import Walk, compensate, merged
from foldgpt.errors import NotFiniteError
from foldgpt.folding import source_model_of
from foldgpt.plan import FoldPlan
from foldgpt.replay import Replay
from foldgpt.selection.selection import Request
from foldgpt.selection.units import Removed, Units


class FoldedCost:
    """Costs of sets, behind the fit that folding makes.

    The model's weights are changed while a set is measured, and are what they were after it. Folding leaves out a
    compensation that makes predictions worse; here it is left out only where they are not finite.

    Args:
        request: names the model, the objective, the seed, and what may be removed; its windows are not used.
        fitted_WT: windows that the fit is made on, int64 [W, T].
        held_WT: windows on which sets are measured, int64 [W, T]; nothing may be fitted on them.

    Attributes:
        seconds: time spent in measuring.

    Raises:
        UsageError: the request has no model, or the windows do not fit it.
        UnsupportedModelError: the model cannot be replayed.
    """

    def __init__(self, request: Request, fitted_WT: Tensor, held_WT: Tensor) -> None:
        # Nothing is kept between sets: each changes the weights in its own way.
        self._held = replace(request, ids_WT=held_WT, compensate=False).need_cost("finals", cache_bytes=0)
        self._fitted = Replay(self._held.replay.model, fitted_WT)
        self._source = source_model_of(self._held.replay.model)
        self.seconds = 0.0

    def cost(self, removed: Removed) -> float:
        """Mean KL(source ‖ folded) in nats per token on the windows that are held out, or the language-modelling loss.

        Args:
            removed: the removed units.

        Returns:
            The cost; infinite where the predictions are not finite, without compensation either (float16).

        Raises:
            UnsupportedModelError: the model cannot be compensated.
        """
        began = time.perf_counter()
        model = self._fitted.model
        blocks, attentions, mlps = self._held.units.parts(removed)
        plan = FoldPlan.create(self._source, removed=blocks, removed_attention=attentions, removed_mlp=mlps)
        try:
            corrections = compensate(model, plan, self._fitted.ids_WT, replay=self._fitted)
        except NotFiniteError:
            corrections = {}
        with merged(model, corrections):
            value = float(self._held.costs(removed, keep=False, changed_from=min(corrections, default=None)).mean())
        if corrections and not math.isfinite(value):
            value = float(self._held.costs(removed, keep=False).mean())
        self.seconds += time.perf_counter() - began
        return value if math.isfinite(value) else math.inf

    def source_cost(self) -> float:
        """What removing nothing costs: 0 by the KL, the source's own loss by the language-modelling loss."""
        return self._held.source_cost()

    @property
    def forward_tokens(self) -> float:
        """Work so far, as a number of tokens that pass all blocks; solving the fits is not counted."""
        passes = 1 + self._fitted.num_block_calls / self._fitted.num_blocks
        return self._held.forward_tokens + passes * self._fitted.ids_WT.numel()


def fit_tokens(sets: Sequence[Removed], units: Units, num_tokens: int) -> float:
    """Tokens that will pass all blocks, at most, where corrections are fitted for some sets; see `forward_tokens`.

    Args:
        sets: the sets.
        units: what they are made of.
        num_tokens: that they are fitted on.
    """
    walks = (Walk.around(units.num_blocks, units.whole_blocks(removed), units.lacking(removed)) for removed in sets)
    return (1 + sum(len(walk.blocks) for walk in walks) / units.num_blocks) * num_tokens
