"""The best member as donor: the one whose weights the others can best do with, by measured KL."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from foldgpt.plan import Group
from foldgpt.replay import Replay
from foldgpt.sharing.distance import SharingCost
from foldgpt.sharing.partition import best_donor


def with_best_donors(replay: Replay, groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups, each with its best member as owner.

    Args:
        replay: the source, with all states.
        groups: groups whose donors are to be replaced.

    Raises:
        UnsupportedModelError: the groups share more than linear layers of known sublayers.
    """
    cost = SharingCost(replay)
    found = []
    for group in groups:
        size = max(group.blocks) + 1
        costs_DM = torch.zeros(size, size, dtype=torch.float64)
        for donor in group.blocks:
            for member in group.blocks:
                costs_DM[donor, member] = cost.pair(donor, member, group.sublayers)
        owner, _ = best_donor(group.blocks, costs_DM)
        found.append(group.model_copy(update={"donor": "owner", "owner": owner}))
    return tuple(found)
