"""What a search may remove: whole blocks, or the attention and the MLP of each block apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from foldgpt.errors import UnsupportedModelError, UsageError
from foldgpt.families import (
    SPECIAL_FIRST_BLOCK,
    Decoder,
    attending_blocks,
    attention_kinds,
    first_of_each_kind,
    read_blocks,
)
from foldgpt.folding.kinds import sublayer_modules
from foldgpt.plan import SUBLAYERS, FoldPlan, Sublayer

Removed = frozenset[int]


@dataclass(frozen=True)
class Units:
    """The units of a search, and how much of them is to go.

    A unit is numbered by depth: block i is unit i; where sublayers are units, the attention of block i is unit
    2 i and its MLP is unit 2 i + 1.

    Attributes:
        num_blocks: blocks of the model.
        per_block: units in a block: 1 (blocks) or 2 (sublayers).
        sizes: what each unit counts towards the target: 1 for a block, its parameters for a sublayer.
        target: how much is to be removed, in the same measure.
        attention_kinds: kind of attention of each block ("full_attention", …).
        first_stays: the first block is built unlike all others, and none can stand in for it.
        read_blocks: pairs of a block and the one that it reads from, without which it cannot be kept.
    """

    num_blocks: int
    per_block: int
    sizes: tuple[int, ...]
    target: int
    attention_kinds: tuple[str, ...]
    first_stays: bool = False
    read_blocks: tuple[tuple[int, int], ...] = ()

    @classmethod
    def blocks(cls, num_blocks: int, num_remove: int, decoder: Decoder | None = None) -> Units:
        """Whole blocks, `num_remove` of which are to go; of a model in which all attend alike, if none is given."""
        sizes = (1,) * num_blocks
        if decoder is None:
            return cls(num_blocks, 1, sizes, num_remove, ("attention",) * num_blocks)
        return cls(num_blocks, 1, sizes, num_remove, **_bound_by(decoder))

    @classmethod
    def sublayers(cls, decoder: Decoder, num_remove: int) -> Units:
        """Attention and MLP of each block apart; as many parameters are to go as `num_remove` blocks have.

        Raises:
            UnsupportedModelError: the family's sublayers are not known, or not all blocks attend.
        """
        num_blocks = len(decoder.blocks)
        if decoder.sublayers is not None and not all(map(decoder.attends, range(num_blocks))):
            raise UnsupportedModelError(
                f"some blocks of model type {decoder.model_type!r} do not attend, and what they have in the "
                "attention's place cannot be removed apart; remove whole blocks"
            )
        sizes = tuple(
            sum(_count(block.get_submodule(name)) for name in sublayer_modules(decoder, index, sublayer))
            for index, block in enumerate(decoder.blocks)
            for sublayer in SUBLAYERS
        )
        target = round(num_remove * sum(sizes) / num_blocks)
        return cls(num_blocks, 2, sizes, target, **_bound_by(decoder))

    def __len__(self) -> int:
        return len(self.sizes)

    def missing(self, removed: Iterable[int]) -> int:
        """How much the set still falls short of the target; 0 or less when it is met."""
        return self.target - sum(self.sizes[unit] for unit in removed)

    def below(self, removed: Removed, block: int) -> Removed:
        """The removed units of the blocks before a block."""
        return frozenset(unit for unit in removed if unit < block * self.per_block)

    def whole_blocks(self, removed: Iterable[int]) -> frozenset[int]:
        """Blocks of which nothing is left."""
        if self.per_block == 1:
            return frozenset(removed)
        gone = set(removed)
        return frozenset(block for block in range(self.num_blocks) if {2 * block, 2 * block + 1} <= gone)

    def lacking(self, removed: Iterable[int]) -> dict[int, Sublayer]:
        """Blocks that are left, but without their attention or MLP."""
        if self.per_block == 1:
            return {}
        whole = self.whole_blocks(removed)
        return {unit // 2: SUBLAYERS[unit % 2] for unit in sorted(removed) if unit // 2 not in whole}

    def parts(self, removed: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Blocks that go whole, lose their attention, and lose their MLP, as a plan has them; undone by `units_of`."""
        removed = frozenset(removed)
        attention, mlp = (
            tuple(block for block, lost in self.lacking(removed).items() if lost == sublayer) for sublayer in SUBLAYERS
        )
        return tuple(sorted(self.whole_blocks(removed))), attention, mlp

    def words(self, removed: Iterable[int]) -> str:
        """A set for messages: "blocks [1, 4], the attention of blocks [6], the MLP of blocks [2]"."""
        parts = zip(("blocks", "the attention of blocks", "the MLP of blocks"), self.parts(removed), strict=True)
        return ", ".join(f"{what} {list(blocks)}" for what, blocks in parts if blocks)

    def is_allowed(self, removed: Iterable[int]) -> bool:
        """Whether a model folded so can exist: a block that attends is left, and so does the first of each kind.

        transformers reads the length of the KV cache from these. And where the first block has to stay, it does, as
        does each block that a kept one reads from.
        """
        whole, lacking = self.whole_blocks(removed), self.lacking(removed)
        kept = [block for block in range(self.num_blocks) if block not in whole]
        if not kept or (self.first_stays and kept[0] != 0) or (self._attending and self._attending.isdisjoint(kept)):
            return False
        if any(reader not in whole and read in whole for reader, read in self.read_blocks):
            return False
        first_of = first_of_each_kind(self.attention_kinds, kept)
        return all(lacking.get(block) != "attention" for block in first_of.values())

    @cached_property
    def _attending(self) -> frozenset[int]:
        # Searches ask for every set that they draw.
        return frozenset(attending_blocks(self.attention_kinds))

    def unreachable(self) -> UsageError:
        """The error where nothing more can go and the target is not met."""
        return UsageError(
            f"the budget cannot be met: {self.target:,} of {sum(self.sizes):,} are to be removed, but one block must "
            "stay, and the first one with each kind of attention must keep that"
            + (", and in this family the first block must stay" if self.first_stays else "")
            + (", and so must blocks that a kept one reads from" if self.read_blocks else "")
        )

    def fill(self, order: Sequence[int], start: Removed = frozenset()) -> Removed:
        """Remove units in the given order until the target is met, then put back what it does not need.

        Raises:
            UsageError: no set along this order meets the target.
        """
        return self.filled(order, start)[0]

    def filled(self, order: Sequence[int], start: Removed = frozenset()) -> tuple[Removed, int]:
        """As `fill`, and how many units at the beginning of the order it took to know the set."""
        taken: list[int] = []
        left = [(place, unit) for place, unit in enumerate(order, 1) if unit not in start]
        seen = 0
        while self.missing([*start, *taken]) > 0:
            before = len(taken)
            for place, unit in left:
                if self.missing([*start, *taken]) <= 0:
                    break
                seen = max(seen, place)
                if self.is_allowed([*start, *taken, unit]):
                    taken.append(unit)
            if len(taken) == before:
                raise self.unreachable()
            # An attention that had to stay may go once the rest of its block is gone.
            left = [(place, unit) for place, unit in left if unit not in taken]
        # The last in the order first: they are the ones worth keeping most.
        for unit in taken[::-1]:
            rest = [other for other in taken if other != unit]
            if self.missing([*start, *rest]) <= 0 and self.is_allowed([*start, *rest]):
                taken = rest
        return start | frozenset(taken), seen


def units_of(removed: Iterable[int], attentions: Iterable[int], mlps: Iterable[int], per_block: int) -> list[int]:
    """The units that went, as a search numbers them; see `Units`.

    Args:
        removed: blocks of which nothing is left.
        attentions: blocks that are left without their attention.
        mlps: blocks that are left without their MLP.
        per_block: units in a block.
    """
    if per_block == 1:
        return sorted(removed)
    whole = list(removed)
    return sorted([2 * block for block in [*whole, *attentions]] + [2 * block + 1 for block in [*whole, *mlps]])


def closed_units(plan: FoldPlan, num_units: int) -> list[int]:
    """The units that a search closed for a plan, what came back as a borrowing position among them.

    Args:
        plan: the plan.
        num_units: how many the search had.
    """
    start = plan.at_start
    per_block = num_units // plan.source.num_blocks
    return units_of(start.removed, start.removed_attention, start.removed_mlp, per_block)


def unit_names(num_units: int, num_blocks: int) -> list[str]:
    """What people call the units of a search, in its order: blocks by their number, or attention and MLP of each."""
    if num_units == num_blocks:
        return [str(block) for block in range(num_blocks)]
    return [f"{('attention', 'MLP')[unit % 2]} {unit // 2}" for unit in range(num_units)]


def _bound_by(decoder: Decoder) -> dict[str, Any]:
    """What of a model says which of its blocks may not go, as fields of `Units`."""
    return {
        "attention_kinds": attention_kinds(decoder.config),
        "first_stays": decoder.model_type in SPECIAL_FIRST_BLOCK,
        "read_blocks": tuple(read_blocks(decoder.config).items()),
    }


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
