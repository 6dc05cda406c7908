"""Memory that the fits of a plan take when it is folded: recorded states, and what a cut is fitted from.

Counted by hand, unlike the rest of a rehearsal: the fits look at values, and there are none. A test holds the figures
against what a fit really takes.
"""

from __future__ import annotations

from typing import Any

from foldgpt.compensation import HELD_OUT, Walk
from foldgpt.compensation.carriers import inner_width, norm_behind
from foldgpt.compensation.least_squares import WIDEST_ON_DEVICE
from foldgpt.compensation.priors import CORRECTION_BYTES, OUTPUT_BYTES, prior_width
from foldgpt.errors import UnsupportedModelError
from foldgpt.families import decoder_of
from foldgpt.folding.private import sizes_of_leaf
from foldgpt.plan import FoldPlan, Group
from foldgpt.sharing import boundaries_of
from foldgpt.sharing.fit import SHARING_HELD_OUT
from foldgpt.sharing.linears import linears_of
from foldgpt.sharing.shared_weights import needs_moments

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
    sharing = 0.0
    if plan.fitting is not None:
        recorded = num_tokens * stream * len(boundaries_of(plan))
        sharing = recorded + max(
            (_bytes_of_group(source, group, num_tokens, hidden, itemsize) for group in plan.groups), default=0.0
        )
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


def bytes_of_priors(source: Any, num_tokens: int) -> float:
    """What the priors of a search keep at most, beside the source's states.

    Args:
        source: the model, with or without values.
        num_tokens: that they are fitted on.
    """
    decoder = decoder_of(source)
    num_blocks, itemsize = len(decoder.blocks), next(source.parameters()).element_size()
    hidden = int(source.config.get_text_config(decoder=True).hidden_size)
    try:
        inner = prior_width(decoder, 0, "mlp")
    except UnsupportedModelError:
        return 0.0  # such a model is not compensated
    corrections = num_blocks * (num_blocks + 1) // 2 * (inner or hidden) * hidden * itemsize
    outputs = num_blocks * num_tokens * (hidden + (inner or 0)) * itemsize
    return min(CORRECTION_BYTES, corrections) + min(OUTPUT_BYTES, outputs)


def _bytes_of_group(source: Any, group: Group, num_tokens: int, hidden: int, itemsize: int) -> float:
    """What the fit of a group holds beside the recorded states, of whichever of its steps holds most."""
    decoder = decoder_of(source)
    rows = num_tokens * (1 - SHARING_HELD_OUT)
    stream = num_tokens * hidden * itemsize
    try:
        linears = linears_of(decoder, group.holder, group.sublayers)
    except UnsupportedModelError:
        return 0.0  # taken as it is folded without a fit
    block = decoder.blocks[group.holder]
    largest = moments = 0.0
    widest = 0
    for linear in linears:
        if not linear.writes:
            continue
        width, _ = sizes_of_leaf(block.get_submodule(linear.name), linear.name)
        widest = max(widest, width)
        rank = max(group.rank_of(linear.name, member) for member in group.fitted_members)
        # The layers that read the stream have one input.
        moments += (hidden**2 + width**2) * _FP32
        # Its inputs, its outputs and the wanted ones; and either the parts that the inputs are joined of, or what is
        # reckoned of outputs, and of inputs that are divided by a norm.
        kept = rows * (width * itemsize + 2 * hidden * _FP32)
        divided = width * itemsize if rank and norm_behind(decoder, group.holder, linear.sublayer) is not None else 0
        passing = rows * max(width * itemsize, divided + 4 * hidden * _FP32)
        # The stream in front of the member, and behind it without a fit.
        largest = max(largest, 2 * stream + kept + passing + (_bytes_of_sums(width) if rank else 0))
    if not needs_moments(group, linears):
        return largest
    made = stream + len(group.blocks) * moments + (_bytes_of_sums(widest) if group.donor == "least_squares" else 0)
    return max(largest, made)


def _bytes_of_sums(width: int) -> float:
    """Sums of two parts and of both, one with its ridge, and its factor; wide ones are kept off the device."""
    return 5.0 * width**2 * _FP64 if width <= WIDEST_ON_DEVICE else 0.0


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
    return streams + features + _bytes_of_sums(width)
