"""Where a plan cuts, as a recovery looks at it."""

from __future__ import annotations

import itertools

from foldgpt.errors import UsageError
from foldgpt.plan import FoldPlan
from foldgpt.recovery.settings import RecoverySettings
from foldgpt.recovery.states import aligned_blocks


def check_plan_suits(plan: FoldPlan, settings: RecoverySettings) -> list[tuple[int, int]]:
    """Where states are compared; refuses settings that speak of cuts where a plan has none.

    Args:
        plan: the plan.
        settings: of the recovery.

    Returns:
        Positions and source indices whose states are compared; none where the settings ask for none.

    Raises:
        UsageError: the plan removes nothing in front of a kept block, or no block between two, as the settings need.
    """
    pairs = aligned_blocks(plan, settings.states_at) if settings.states else []
    if settings.states and not pairs:
        raise UsageError("states are to be compared at the cuts, but nothing follows on a removed part of the plan")
    if settings.train_fully == "cuts" and not blocks_beside_cuts(plan):
        raise UsageError(
            "train_fully is 'cuts', and the plan removes no whole block beside a kept one: leave train_fully out, or "
            "train all in full"
        )
    return pairs


def blocks_beside_cuts(plan: FoldPlan) -> list[int]:
    """Positions of the kept blocks on both sides of each cut; one at the start or the end has only one side."""
    ends = (-1, *plan.kept, plan.source.num_blocks)
    beside: set[int] = set()
    for position, (before, after) in enumerate(itertools.pairwise(ends)):
        if after > before + 1:
            beside |= {position - 1, position}
    return sorted(beside & set(range(len(plan.kept))))
