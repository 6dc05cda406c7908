"""Who shares with whom: partitions of the blocks into groups, by measured costs and a budget of parameters.

A group costs what its members lose when they take the weights of its best donor; the costs of groups add up. Blocks
in no group cost nothing, so each stays alone unless the budget needs it. Two searches: over runs of consecutive
blocks, where dynamic programming finds the best partition, and over any sets, by merging greedily.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from foldgpt.errors import UsageError


@dataclass(frozen=True)
class Partition:
    """Groups and what they come to.

    Attributes:
        groups: members of each group, increasing; blocks that stay alone are in none.
        donors: the best donor of each group.
        cost: sum of the groups' costs.
        saved: parameters that need not be stored.
    """

    groups: tuple[tuple[int, ...], ...]
    donors: tuple[int, ...]
    cost: float
    saved: int


def best_donor(members: Sequence[int], costs_DM: Tensor) -> tuple[int, float]:
    """The member whose weights the others can best do with, and the sum of what that costs them.

    Args:
        members: source indices.
        costs_DM: cost of member m having the weights of donor d, [d, m]; infinite where that is not possible.
    """
    totals = {donor: sum(float(costs_DM[donor, member]) for member in members) for donor in members}
    donor = min(members, key=lambda member: totals[member])
    return donor, totals[donor]


def contiguous(
    blocks: Sequence[int], costs_DM: Tensor, sizes: Sequence[int], target: int, *, largest: int = 4
) -> Partition:
    """The cheapest partition into runs of consecutive blocks that saves enough.

    Args:
        blocks: source indices of the blocks that may share, increasing; consecutive is meant among these.
        costs_DM: as in `best_donor`.
        sizes: parameters that each block would share, by source index.
        target: parameters to save, at least.
        largest: members of a group, at most.

    Raises:
        UsageError: no such partition saves that much.
    """
    # The cheapest way to have treated the first blocks, for every amount saved (capped at the target).
    best: list[dict[int, tuple[float, int, list[tuple[tuple[int, ...], int]]]]] = [{0: (0.0, 0, [])}]
    for end in range(1, len(blocks) + 1):
        here: dict[int, tuple[float, int, list[tuple[tuple[int, ...], int]]]] = {}
        for length in range(1, min(largest, end) + 1):
            members = tuple(blocks[end - length : end])
            donor, cost = best_donor(members, costs_DM)
            if cost == float("inf"):
                continue
            gain = sum(sizes[member] for member in members if member != donor)
            group = [(members, donor)] if length > 1 else []
            for before, saved, groups in best[end - length].values():
                key = min(target, saved + gain)
                if key not in here or before + cost < here[key][0]:
                    here[key] = (before + cost, saved + gain, groups + group)
        best.append(here)
    if target not in best[-1]:
        raise _too_little(max(best[-1]), target)
    cost, saved, groups = best[-1][target]
    return Partition(tuple(members for members, _ in groups), tuple(donor for _, donor in groups), cost, saved)


def merged(
    blocks: Sequence[int], costs_DM: Tensor, sizes: Sequence[int], target: int, *, largest: int = 4
) -> Partition:
    """Merge groups, each time the two whose merger costs least for what it saves, until enough is saved.

    Arguments and errors as in `contiguous`, but members need not be neighbours.
    """
    groups: list[tuple[int, ...]] = [(block,) for block in blocks]
    costs = dict.fromkeys(groups, 0.0)
    donors = {group: group[0] for group in groups}

    def saved(group: tuple[int, ...]) -> int:
        return sum(sizes[member] for member in group if member != donors[group])

    while sum(map(saved, groups)) < target:
        found: tuple[float, tuple[int, ...], tuple[int, ...], int, float] | None = None
        for place, one in enumerate(groups):
            for other in groups[place + 1 :]:
                if len(one) + len(other) > largest:
                    continue
                union = tuple(sorted(one + other))
                donor, cost = best_donor(union, costs_DM)
                gain = sum(sizes[member] for member in union if member != donor) - saved(one) - saved(other)
                price = (cost - costs[one] - costs[other]) / max(gain, 1)
                if cost != float("inf") and (found is None or price < found[0]):
                    found = price, one, other, donor, cost
        if found is None:
            raise _too_little(sum(map(saved, groups)), target)
        _, one, other, donor, cost = found
        union = tuple(sorted(one + other))
        groups = sorted([group for group in groups if group not in (one, other)] + [union])
        costs[union], donors[union] = cost, donor
    real = [group for group in groups if len(group) > 1]
    return Partition(
        tuple(real), tuple(donors[group] for group in real), sum(costs[group] for group in real), sum(map(saved, real))
    )


def _too_little(saved: int, target: int) -> UsageError:
    return UsageError(f"no grouping of these blocks saves {target:,} parameters; the most is {saved:,}")
