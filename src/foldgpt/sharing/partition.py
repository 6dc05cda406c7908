"""Who shares with whom: partitions of the blocks into groups, by measured costs and a budget of parameters.

A group costs what its members lose when they take the weights of its best donor; the costs of groups add up. Blocks
in no group cost nothing, so each stays alone unless the budget needs it. Two searches: over runs of consecutive
blocks, where dynamic programming finds the best partition, and over any sets, by merging greedily. Runs can also be
found for attention and MLP apart, under one budget.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    (found,) = contiguous_apart(blocks, [costs_DM], [sizes], target, largest=largest)
    return found


def contiguous_apart(
    blocks: Sequence[int],
    costs: Sequence[Tensor],
    sizes: Sequence[Sequence[int]],
    target: int,
    *,
    largest: int = 4,
) -> tuple[Partition, ...]:
    """The cheapest partitions of several parts of blocks, such as attention and MLP, that save enough together.

    Each part has runs of its own, and the budget goes where it costs least: one part may share nothing.

    Args:
        blocks: as in `contiguous`.
        costs: of each part, as in `best_donor`.
        sizes: of each part, as in `contiguous`.
        target: parameters to save in all parts together, at least.
        largest: members of a group, at most.

    Raises:
        UsageError: no such partitions save that much.
    """
    fronts = [_fronts(blocks, of_part, size, target, largest)[-1] for of_part, size in zip(costs, sizes, strict=True)]
    chosen = min(
        (combined for combined in itertools.product(*fronts) if sum(way.saved for way in combined) >= target),
        key=lambda combined: sum(way.cost for way in combined),
        default=None,
    )
    if chosen is None:
        raise _too_little(sum(max(way.saved for way in front) for front in fronts), target)
    return tuple(
        Partition(
            tuple(members for members, _ in way.groups), tuple(donor for _, donor in way.groups), way.cost, way.saved
        )
        for way in chosen
    )


class _Way(NamedTuple):
    """One way to treat the first blocks: what it costs and saves, and its groups with their donors."""

    cost: float
    saved: int
    groups: tuple[tuple[tuple[int, ...], int], ...]


def _fronts(
    blocks: Sequence[int], costs_DM: Tensor, sizes: Sequence[int], target: int, largest: int
) -> list[list[_Way]]:
    """For the first 0, 1, … of the blocks, all ways that no other one beats in both cost and what is saved."""
    fronts = [[_Way(0.0, 0, ())]]
    for end in range(1, len(blocks) + 1):
        ways: list[_Way] = []
        for length in range(1, min(largest, end) + 1):
            members = tuple(blocks[end - length : end])
            donor, cost = best_donor(members, costs_DM)
            if cost == float("inf"):
                continue
            gain = sum(sizes[member] for member in members if member != donor)
            group = ((members, donor),) if length > 1 else ()
            ways += [_Way(way.cost + cost, way.saved + gain, way.groups + group) for way in fronts[end - length]]
        front: list[_Way] = []
        most = -1
        for way in sorted(ways, key=lambda way: (way.cost, -way.saved)):
            # What is saved beyond the target is worth nothing.
            if min(way.saved, target) > most:
                front.append(way)
                most = min(way.saved, target)
        fronts.append(front)
    return fronts


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
