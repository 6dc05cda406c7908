"""Ranks under a budget: where a parameter spent on a low-rank term does most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from foldgpt.plan import Group
from foldgpt.replay import Replay
from foldgpt.sharing.linears import linears_of, weight_of
from foldgpt.sharing.low_rank import spread
from foldgpt.sharing.shared_weights import missing_spectra

Place = tuple[int, int, str]


@torch.no_grad()
def ranks_for(
    replay: Replay, groups: Sequence[Group], budget: int, batches: Sequence[slice], *, aligned: bool = True
) -> tuple[Group, ...]:
    """The groups with ranks that spend a budget of parameters on what their shared weights miss.

    A rank is worth the share of the mean squared output of its layer that it accounts for, so that layers of all
    sizes count alike; the ranks with the most worth for their parameters are bought.

    Args:
        replay: the source, with all states.
        groups: the groups; ranks that they have are replaced.
        budget: parameters to spend on all of them together.
        batches: the micro-batches that second moments are taken over.
        aligned: as in `shared_weights`.
    """
    energies: dict[Place, Tensor] = {}
    prices: dict[Place, float] = {}
    for number, group in enumerate(groups):
        for (block, leaf), share_K in missing_spectra(replay, group, batches, aligned=aligned).items():
            outputs, inputs = weight_of(replay.decoder.blocks[block].get_submodule(leaf)).shape
            energies[number, block, leaf], prices[number, block, leaf] = share_K, outputs + inputs
    return with_ranks(groups, spread(energies, prices, budget), replay)


def with_ranks(groups: Sequence[Group], ranks: Mapping[Place, int], replay: Replay) -> tuple[Group, ...]:
    """The groups with given ranks: number of the group, block and leaf → rank, 0 where there is none."""
    made = []
    for number, group in enumerate(groups):
        leaves = [linear.name for linear in linears_of(replay.decoder, group.holder, group.sublayers)]
        of_leaf = {leaf: tuple(ranks.get((number, block, leaf), 0) for block in group.blocks) for leaf in leaves}
        used = {leaf: values for leaf, values in of_leaf.items() if any(values)}
        made.append(group.model_copy(update={"ranks": used or 0}))
    return tuple(made)


@torch.no_grad()
def output_ranks(replay: Replay, groups: Sequence[Group], budget: int) -> tuple[Group, ...]:
    """The groups with one rank for all layers that make sublayers' outputs, the largest that a budget pays for.

    Positions that start at zero do not resemble a block of the source, so there are no weights whose spectrum could
    tell layers apart; what they can learn in closed form is the map of their output layers.

    Args:
        replay: the source.
        groups: the groups.
        budget: parameters to spend on all of them together.
    """
    writing: dict[Place, int] = {}
    for number, group in enumerate(groups):
        for linear in linears_of(replay.decoder, group.holder, group.sublayers):
            if linear.writes:
                shape = weight_of(replay.decoder.blocks[group.holder].get_submodule(linear.name)).shape
                writing.update({(number, block, linear.name): sum(shape) for block in group.fitted_members})
    price = sum(writing.values())
    # A term of more than half the full rank takes as much as the layer itself.
    sizes = [min(weight_of(replay.decoder.blocks[b].get_submodule(leaf)).shape) for _, b, leaf in writing]
    rank = min([budget // price, *(size // 2 for size in sizes)]) if price else 0
    return with_ranks(groups, dict.fromkeys(writing, max(0, int(rank))), replay)
