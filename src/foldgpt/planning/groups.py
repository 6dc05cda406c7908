"""What shares weights: the groups that a recipe asks for, beside what was selected for removal."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedModel

from foldgpt.errors import UsageError
from foldgpt.families import Decoder, attention_kinds, decoder_of, first_of_each_kind
from foldgpt.folding import low_rank_leaves
from foldgpt.plan import Group
from foldgpt.progress import note
from foldgpt.recipe import Recipe
from foldgpt.selection import Selection
from foldgpt.sharing import adjacent_groups, zero_started_groups


def groups_for(recipe: Recipe, decoder: Decoder, selection: Selection) -> tuple[Group, ...]:
    """The groups that a recipe asks for, beside what was selected for removal; the first members are the donors."""
    section = recipe.share
    if section.method == "none":
        return ()
    sublayers = tuple(section.sublayers)
    lacking = {
        *(selection.removed_attention if "attention" in sublayers else ()),
        *(selection.removed_mlp if "mlp" in sublayers else ()),
    }
    kept = [index for index in range(len(decoder.blocks)) if index not in {*selection.removed, *lacking}]
    if section.start == "zero":
        whole = [index for index in kept if index not in {*selection.removed_attention, *selection.removed_mlp}]
        returning = selection.removed
        if "attention" not in sublayers:
            returning = _may_lose_attention(decoder, selection.removed)
        return zero_started_groups(decoder, whole, returning, sublayers=sublayers, rank=section.rank)
    return adjacent_groups(
        decoder,
        kept,
        size=section.group_size,
        sublayers=sublayers,
        donor="first" if section.donor == "best" else section.donor,
        rank=section.rank,
        scales=section.scales,
    )


def why_no_group(recipe: Recipe) -> str:
    """Why there is nothing that shares weights."""
    section = recipe.share
    if section.start == "zero":
        return "no removed block may come back beside a kept one of its kind (share.start zero)"
    return f"no {section.group_size} neighbours of one kind are kept beside each other (share.group_size)"


def _may_lose_attention(decoder: Decoder, removed: Collection[int]) -> tuple[int, ...]:
    """Of removed blocks those that may come back without their attention.

    A block that would then be the first one with its kind of attention may not: the KV cache's length is read there.
    """
    num_blocks = len(decoder.blocks)
    kinds = attention_kinds(decoder.config)
    first = first_of_each_kind(kinds, (index for index in range(num_blocks) if index not in removed))
    returning = tuple(index for index in removed if index > first.get(kinds[index], num_blocks))
    for index in sorted(set(removed) - set(returning)):
        note(f"block {index} stays removed: without attention it cannot be the first kept block with {kinds[index]}")
    return returning


def cut_of(recipe: Recipe, selection: Selection, groups: Sequence[Group]) -> dict[str, Any]:
    """What a plan says of removal and sharing.

    What starts at zero was selected for removal; it has a position all the same.
    """
    started = {block for group in groups for block in group.started_at_zero}
    absent = {
        sublayer: {*removed, *(started if sublayer not in recipe.share.sublayers else ())}
        for sublayer, removed in (("attention", selection.removed_attention), ("mlp", selection.removed_mlp))
    }
    return {
        "removed": set(selection.removed) - started,
        "removed_attention": absent["attention"],
        "removed_mlp": absent["mlp"],
        "groups": groups,
    }


def check_rank(recipe: Recipe, model: PreTrainedModel) -> None:
    """Refuse a rank that the matrices do not have, before anything is searched.

    Args:
        recipe: the recipe.
        model: the source; it may be on the meta device.

    Raises:
        UsageError: names the largest rank that there is.
    """
    share = recipe.share
    if not share.rank or share.method in ("none", "auto"):
        return
    decoder = decoder_of(model)
    largest = 0
    for index, block in enumerate(decoder.blocks):
        names = low_rank_leaves(decoder, index, share.sublayers)
        weights = [block.get_parameter(f"{name}.weight") for name in names]
        largest = max(largest, min((min(weight.shape) for weight in weights), default=0))
    # Where nothing that is shared is a linear layer there are no terms, whatever their rank.
    if 0 < largest < share.rank:
        raise UsageError(
            f"share.rank is {share.rank}, and the smallest matrix that is shared has {largest} rows or columns: give "
            "at most that"
        )
