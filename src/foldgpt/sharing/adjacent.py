"""Groups of fixed size among neighbours, as in FoldGPT (arXiv 2407.00928)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from foldgpt.errors import UsageError
from foldgpt.families import Decoder
from foldgpt.folding import kind_of
from foldgpt.plan import SUBLAYERS, Donor, Group, Sublayer


def adjacent_groups(
    decoder: Decoder,
    kept: Sequence[int],
    *,
    size: int,
    sublayers: Sequence[Sublayer] = SUBLAYERS,
    donor: Donor = "first",
    rank: int = 0,
    scales: bool = False,
) -> tuple[Group, ...]:
    """Put every `size` consecutive kept blocks of one kind into a group.

    A change of kind (full and sliding attention, dense and mixture of experts) ends a run; blocks left over
    at the end of a run stay alone.

    Args:
        decoder: the source model.
        kept: source indices of the kept blocks, increasing.
        size: members of a group, at least 2.
        sublayers: what is shared.
        donor: how the shared weights are made.
        rank: of the private low-rank terms of every linear layer that is shared; 0 for none.
        scales: whether there are private scales.

    Raises:
        UsageError: the size is below 2.
    """
    if size < 2:
        raise UsageError(f"a group needs at least 2 blocks, got --group-size {size}")
    private: tuple[Literal["norms", "scales"], ...] = ("norms", "scales") if scales else ("norms",)
    groups: list[Group] = []
    run: list[int] = []
    for index in kept:
        if run and kind_of(decoder, run[0], sublayers) != kind_of(decoder, index, sublayers):
            run = []
        run.append(index)
        if len(run) == size:
            groups.append(
                Group(blocks=tuple(run), sublayers=tuple(sublayers), donor=donor, private=private, ranks=rank)
            )
            run = []
    return tuple(groups)
