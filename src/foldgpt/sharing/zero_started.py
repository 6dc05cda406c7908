"""Positions that start at zero, in place of removed blocks: each borrows the weights of the nearest kept block."""

from __future__ import annotations

from collections.abc import Sequence

from foldgpt.families import Decoder
from foldgpt.folding import same_kind
from foldgpt.plan import SUBLAYERS, Group, Sublayer


def zero_started_groups(
    decoder: Decoder,
    kept: Sequence[int],
    removed: Sequence[int],
    *,
    sublayers: Sequence[Sublayer] = SUBLAYERS,
    rank: int = 0,
) -> tuple[Group, ...]:
    """Give removed blocks their positions back, with weights borrowed from kept ones.

    A block goes to the nearest kept block of its kind, to the earlier one of two; one of another kind than all kept
    ones is in no group and stays removed.

    Args:
        decoder: the source model.
        kept: source indices of the blocks that may lend their weights.
        removed: source indices of the removed blocks.
        sublayers: what a position borrows.
        rank: of the low-rank terms of every linear layer that is borrowed; 0 for none.
    """
    borrowers: dict[int, list[int]] = {}
    for index in sorted(removed):
        alike = [other for other in sorted(kept) if same_kind(decoder, index, other, sublayers)]
        if alike:
            borrowers.setdefault(min(alike, key=lambda other: abs(other - index)), []).append(index)
    return tuple(
        Group(
            blocks=tuple(sorted([owner, *members])),
            sublayers=tuple(sublayers),
            donor="owner",
            owner=owner,
            start="zero",
            private=("norms", "scales"),
            ranks=rank,
        )
        for owner, members in sorted(borrowers.items())
    )
