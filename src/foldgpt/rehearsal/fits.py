"""Memory that the fits of a plan take when it is folded: recorded states, and what a cut is fitted from.

Counted by hand, unlike the rest of a rehearsal: the fits look at values, and there are none. A test holds the figures
against what a fit really takes.
"""

from __future__ import annotations

from typing import Any

from foldgpt.compensation import HELD_OUT, Walk
from foldgpt.compensation.carriers import inner_width, norm_behind
from foldgpt.compensation.least_squares import WIDEST_ON_DEVICE
from foldgpt.families import decoder_of
from foldgpt.plan import FoldPlan
from foldgpt.sharing import boundaries_of

_FP32, _FP64 = 4, 8


def bytes_of_fits(source: Any, plan: FoldPlan, num_tokens: int) -> float:
    """The most that recordings and fits hold at once, beside the weights.

    Args:
        source: the model, with or without values.
        plan: what it will be folded by.
        num_tokens: of the text that compensation and shared weights are fitted on.
    """
    itemsize = next(source.parameters()).element_size()
    hidden = int(source.config.get_text_config(decoder=True).hidden_size)
    stream = hidden * itemsize
    sharing = num_tokens * stream * len(boundaries_of(plan)) if plan.fitting is not None else 0.0
    if plan.compensation is None:
        return sharing
    walk = Walk.of(plan, plan.source.num_blocks)
    if not walk.carriers:
        return sharing
    held = round(num_tokens * HELD_OUT)
    rows = num_tokens - held
    recorded = rows * stream * len({0, *walk.boundaries}) + 2 * held * stream
    largest = max(_bytes_of_cut(source, index, rows, hidden, itemsize, walk, plan) for index in walk.carriers)
    return sharing + recorded + largest


def _bytes_of_cut(source: Any, index: int, rows: int, hidden: int, itemsize: int, walk: Walk, plan: FoldPlan) -> float:
    """What the fit of one carrier holds beside the recorded states."""
    decoder, sublayer = decoder_of(source), walk.carriers[index]
    assert plan.compensation is not None
    inner = inner_width(decoder, index, sublayer) if plan.compensation.features == "inner" else None
    width = inner or hidden
    features = rows * (inner or 0) * itemsize
    # What enters the block, leaves it and leaves the sublayer; what is missing, what is found of it, and a square.
    streams = rows * hidden * (3 * itemsize + 3 * _FP32)
    if norm_behind(decoder, index, sublayer) is not None:
        # The sublayer's share and the wanted one; the rows, features and targets that are used; they divided.
        streams += rows * hidden * 6 * _FP32
        features += 2 * rows * width * itemsize
    # Sums of two parts and of both, one with its ridge, and its factor.
    sums = 5 * width**2 * _FP64 if width <= WIDEST_ON_DEVICE else 0
    return float(streams + features + sums)
