"""Where methods agree on which blocks can go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from foldgpt.comparison.result import Comparison
from foldgpt.formats import percent


@dataclass(frozen=True)
class Agreement:
    """Which blocks each of some methods removes.

    Attributes:
        num_blocks: of the source.
        removed: method → source indices of the blocks that it removes.
    """

    num_blocks: int
    removed: Mapping[str, Sequence[int]]

    def overlap(self, name: str, other: str) -> float:
        """Blocks that two methods both remove, over those that either removes (Jaccard); 1 if neither removes any."""
        own, others = set(self.removed[name]), set(self.removed[other])
        return len(own & others) / len(own | others) if own | others else 1.0

    @property
    def votes(self) -> list[int]:
        """How many methods remove each block."""
        return [sum(block in blocks for blocks in self.removed.values()) for block in range(self.num_blocks)]


def agreement_of(comparison: Comparison) -> Agreement | None:
    """The agreement of a comparison's methods, each once; None where fewer than two remove whole blocks."""
    removed: dict[str, list[int]] = {}
    for method in comparison.methods:
        if method.removed:
            removed.setdefault(method.name, method.removed)
    num_blocks = comparison.methods[0].figures.get("num_blocks")
    return Agreement(int(num_blocks), removed) if num_blocks and len(removed) > 1 else None


def agreement_table(agreement: Agreement) -> Table:
    """What each two methods have in common, as `Agreement.overlap` says it; columns bear the numbers of the rows."""
    table = Table()
    table.add_column("method")
    names = list(agreement.removed)
    for number in range(1, len(names) + 1):
        table.add_column(str(number), justify="right", no_wrap=True)
    for number, name in enumerate(names, 1):
        table.add_row(f"{number} {name}", *(percent(agreement.overlap(name, other)) for other in names))
    return table
