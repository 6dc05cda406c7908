"""A plan as a strip of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase, ascii_uppercase
from typing import Literal

from rich.text import Text

from foldgpt.plan import FoldPlan, Group, Sublayer

_LETTERS = ascii_uppercase + ascii_lowercase

_GROUP_STYLES = ("cyan", "magenta", "yellow", "green", "blue", "red")

_KEPT, _REMOVED = "█", "·"

Fate = int | Literal["kept", "removed"]


def fates_of(plan: FoldPlan) -> dict[str, list[Fate]]:
    """What becomes of each source block: "kept", "removed", or the number of the group it shares weights in.

    Returns:
        {"block": fates}, or {"attention": fates, "MLP": fates} where the two fare differently.
    """
    attention, mlp = _fates(plan, "attention"), _fates(plan, "mlp")
    return {"block": attention} if attention == mlp else {"attention": attention, "MLP": mlp}


def _fates(plan: FoldPlan, sublayer: Sublayer) -> list[Fate]:
    fates: list[Fate] = ["kept"] * plan.source.num_blocks
    for block in (*plan.removed, *(plan.removed_attention if sublayer == "attention" else plan.removed_mlp)):
        fates[block] = "removed"
    for number, group in enumerate(plan.groups):
        if sublayer in group.sublayers:
            for block in group.blocks:
                fates[block] = number
    return fates


def group_letter(number: int) -> str:
    """The letter of a group: A to Z, a to z, and again from A."""
    return _LETTERS[number % len(_LETTERS)]


def plan_strip(plan: FoldPlan, width: int | None = None) -> Text:
    """A plan as one character per source block, with a ruler above and a legend below.

    Kept blocks are `█`, removed ones `·`, and blocks that share weights bear the letter of their group. When
    attention and MLP fare differently, each has a strip of its own. Groups that start at zero, whose positions have
    more for themselves than norms, or whose weights are not those of the first member, follow one by one.

    Args:
        plan: the plan.
        width: columns that the strip and its ruler may have; with more blocks they go on below. Ten blocks stay
            together in any case.
    """
    rows = fates_of(plan)
    margin = max(map(len, rows)) + 1
    num_blocks = plan.source.num_blocks
    # Whole tens, so that the ruler's numbers stand where the blocks are.
    length = num_blocks if width is None else max(10, (width - margin) // 10 * 10)
    text = Text(no_wrap=True)
    for start in range(0, num_blocks, length):
        stop = min(start + length, num_blocks)
        text.append(" " * margin + _ruler(start, stop) + "\n", style="dim")
        for label, fates in rows.items():
            text.append(f"{label:<{margin}}")
            for fate in fates[start:stop]:
                text.append(*_cell(fate))
            text.append("\n")
    text.append(" " * margin + _legend(plan, rows), style="dim")
    for number, group in enumerate(plan.groups):
        if group.start == "zero" or len(group.private) > 1 or group.ranks or group.donor != "first":
            text.append("\n" + " " * margin + group_letter(number), style=_cell(number)[1])
            text.append(f"  {_group_line(group)}")
    return text


def what_is_shared(group: Group) -> str:
    """Attention, MLP or both, in words."""
    return " and ".join({"attention": "attention", "mlp": "MLP"}[sublayer] for sublayer in group.sublayers)


def _group_line(group: Group) -> str:
    """Who shares what in a group, and what each position has for itself."""
    what = what_is_shared(group)
    if group.start == "zero":
        line = f"{what} of block {group.giver}, borrowed at {_listed(group.started_at_zero)}, starting at zero"
    else:
        line = f"{what} of blocks {_listed(group.blocks)}, donor {group.donor}"
        line += "" if group.owner is None else f" ({group.owner})"
    private: list[str] = [*group.private]
    if isinstance(group.ranks, int):
        private += [f"rank {group.ranks}"] if group.ranks else []
    else:
        private += [
            f"rank {rank if isinstance(rank, int) else '/'.join(map(str, rank))} on {leaf}"
            for leaf, rank in group.ranks.items()
        ]
    return f"{line}; private: {', '.join(private)}"


def _listed(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, blocks))


def _cell(fate: Fate) -> tuple[str, str]:
    """Character and style of one block."""
    if fate == "kept":
        return _KEPT, ""
    if fate == "removed":
        return _REMOVED, "dim"
    return group_letter(fate), f"bold {_GROUP_STYLES[fate % len(_GROUP_STYLES)]}"


def _ruler(start: int, stop: int) -> str:
    """Source indices, one every ten blocks."""
    return "".join(f"{index:<10}" for index in range(start, stop, 10)).rstrip()


def _legend(plan: FoldPlan, rows: dict[str, list[Fate]]) -> str:
    fates = {fate for row in rows.values() for fate in row}
    parts = [f"{plan.source.num_blocks} → {len(plan.kept)} blocks"]
    if "kept" in fates:
        parts.append(f"{_KEPT} kept")
    if "removed" in fates:
        parts.append(f"{_REMOVED} removed")
    if plan.groups:
        parts.append("same letter: shared weights")
    return "   ".join(parts)
