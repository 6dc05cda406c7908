"""Which blocks a fit of corrections passes, which of them carry one, and what of the source it needs to know."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Self

from foldgpt.plan import SUBLAYERS, FoldPlan, Sublayer


@dataclass(frozen=True)
class Walk:
    """The way through the kept blocks on which corrections are fitted, from front to back.

    Attributes:
        entry: the boundary where it begins; up to there the stream is the source's own.
        blocks: source indices of the kept blocks on the way, the last one that carries a correction included.
        carriers: source index of a block that carries one → the sublayer whose output matrix does.
        ends: likewise → the boundary whose stream it aims at: where the next kept block begins.
        absent: source index of a kept block that loses a sublayer → which.
        sharing: blocks that would carry a correction, but share the sublayer that would with others.
    """

    entry: int
    blocks: tuple[int, ...]
    carriers: dict[int, Sublayer]
    ends: dict[int, int]
    absent: dict[int, Sublayer]
    sharing: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, removal: FoldPlan | Iterable[int], num_blocks: int, *, where: Literal["cuts", "behind"] = "cuts"
    ) -> Self:
        """The walk for what a plan removes.

        Args:
            removal: the plan, or the source indices of the removed blocks.
            num_blocks: blocks of the source.
            where: "cuts" for corrections of the blocks before the cuts, "behind" also of all behind the first cut.
        """
        if not isinstance(removal, FoldPlan):
            return cls.around(num_blocks, set(removal), where=where)
        # Positions that start at zero contribute nothing yet: for a fit they are removed.
        plan = removal.at_start
        shared: dict[Sublayer, set[int]] = {sublayer: set() for sublayer in SUBLAYERS}
        for group in plan.groups:
            for sublayer in group.sublayers:
                shared[sublayer] |= set(group.blocks)
        return cls.around(num_blocks, set(plan.removed), plan.absent_sublayers, shared=shared, where=where)

    @classmethod
    def around(
        cls,
        num_blocks: int,
        removed: Collection[int],
        absent: Mapping[int, Sublayer] = MappingProxyType({}),
        *,
        shared: Mapping[Sublayer, Collection[int]] = MappingProxyType({}),
        where: Literal["cuts", "behind"] = "cuts",
    ) -> Self:
        """The walk around removed blocks and sublayers.

        Args:
            num_blocks: blocks of the source.
            removed: those that go whole.
            absent: source index of a block that stays without its attention or MLP → which.
            shared: sublayer → the blocks that share theirs with others.
            where: see `of`.
        """
        kept = [index for index in range(num_blocks) if index not in removed]
        begins = dict(zip(kept, [*kept[1:], num_blocks], strict=True))
        # Those before a cut, and those that lose a sublayer.
        wanted = {index for index in kept if index + 1 in removed or index in absent}
        if where == "behind":
            first = min([*wanted, *(kept[:1] if kept[0] else [])], default=num_blocks)
            wanted = {index for index in kept if index >= first}
        carrying: dict[int, Sublayer] = {i: "attention" if absent.get(i) == "mlp" else "mlp" for i in sorted(wanted)}
        sharing = tuple(index for index, sublayer in carrying.items() if index in shared.get(sublayer, ()))
        carriers = {index: sublayer for index, sublayer in carrying.items() if index not in sharing}
        own = 0  # kept blocks in front that put out the source's own stream
        while own < len(kept) and kept[own] == own and own not in carriers and own not in absent:
            own += 1
        last = max(carriers, default=-1)
        return cls(
            entry=own,
            blocks=tuple(index for index in kept[own:] if index <= last),
            carriers=carriers,
            ends={index: begins[index] for index in carriers},
            absent=dict(absent),
            sharing=sharing,
        )

    @property
    def boundaries(self) -> frozenset[int]:
        """Block boundaries at which the source's stream has to be known."""
        return frozenset((self.entry, *self.ends.values())) if self.carriers else frozenset()
