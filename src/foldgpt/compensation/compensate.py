"""Corrections for everything that is removed from a model, from front to back."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from foldgpt.compensation.compensator import Compensator
from foldgpt.compensation.correction import Correction
from foldgpt.errors import UnsupportedModelError
from foldgpt.plan import FoldPlan, Sublayer
from foldgpt.progress import note
from foldgpt.replay import Replay


@torch.no_grad()
def why_not(model: nn.Module) -> str | None:
    """Why removed blocks of this model cannot be compensated; None if they can, or if it is not all in memory.

    Folding, which needs the whole model, tries it out again.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    try:
        replay = Replay(model, torch.ones((1, 4), dtype=torch.int64))
        compensator = Compensator(replay)
        output_WTH, carried_WTH = compensator.run(0, replay.split(replay.states[0]))
        compensator.correct(0, output_WTH, carried_WTH, replay.states[1])
    except UnsupportedModelError as error:
        return str(error)
    return None


@torch.no_grad()
def compensate(
    model: nn.Module,
    removal: FoldPlan | Iterable[int],
    ids_WT: Tensor,
    *,
    ridge: float | Literal["auto"] = "auto",
    outliers: float = math.inf,
    rounds: int = 3,
    features: Literal["inner", "output"] = "inner",
    where: Literal["cuts", "behind"] = "cuts",
    replay: Replay | None = None,
) -> dict[int, Correction]:
    """Fit the corrections that make up for removed blocks and sublayers; the model itself is not changed.

    The kept blocks run one by one on the calibration windows. Where something was removed, the block before the cut
    is corrected so that the stream behind it comes near the source's, and the later blocks see the corrected stream.
    A kept block that loses its attention carries the correction in its MLP, one that loses its MLP in its attention.
    Nothing stands before a cut at block 0, so that one is left as it is; so is one behind a block that shares the
    carrying sublayer with others, which would all be changed, and one that would put out more than the model's dtype
    holds (float16, with the large map that a nearly silent sublayer needs). Sharing itself is not part of the student
    here.

    Args:
        model: the source, not folded.
        removal: the plan, or the source indices of the removed blocks.
        ids_WT: calibration windows, int64 [W, T].
        ridge: see `Compensator`.
        outliers: see `Compensator`.
        rounds: see `Compensator`.
        features: "inner" refits the whole output matrix on what it is given; "output" maps what it puts out, as is done
            in any case where there are several (mixtures of experts).
        where: "cuts" corrects the blocks before the cuts, "behind" also every kept block behind the first cut.
        replay: the model recorded on these windows, if that was done already.

    Returns:
        Source index of the carrying block → its correction; for `merge_`.

    Raises:
        UsageError: the windows do not fit the model.
        UnsupportedModelError: the model's family cannot be compensated.
    """
    # Positions that start at zero contribute nothing yet: for a fit they are removed.
    removed, absent, shared = _parts(removal.at_start if isinstance(removal, FoldPlan) else removal)
    replay = replay or Replay(model, ids_WT)
    compensator = Compensator(replay, ridge=ridge, outliers=outliers, rounds=rounds)
    kept = [index for index in range(replay.num_blocks) if index not in removed]
    begins = dict(zip(kept, [*kept[1:], replay.num_blocks], strict=True))
    carriers = carrying_blocks(replay.num_blocks, removed, absent)
    if where == "behind":
        first = min([*carriers, *(kept[:1] if kept[0] else [])], default=replay.num_blocks)
        carriers = {index for index in kept if index >= first}
    carrying: dict[int, Sublayer] = {index: "attention" if absent.get(index) == "mlp" else "mlp" for index in carriers}
    for index in sorted(carriers):
        if index in shared[carrying[index]]:
            note(f"block {index} shares its {carrying[index]} with others, so it makes up for nothing that is removed")
            carriers.discard(index)
    corrections: dict[int, Correction] = {}
    stream_WTH = replay.states[0]
    is_own = kept[0] == 0  # whether the stream is still the source's
    for index in kept:
        if index > max(carriers, default=-1):
            break  # nothing more to fit
        is_own = is_own and index not in carriers and index not in absent
        if is_own:
            stream_WTH = replay.states[index + 1]
        elif index not in carriers:
            without = absent.get(index)
            stream_WTH = torch.cat([replay.block(index, part, without=without) for part in replay.split(stream_WTH)])
        else:
            carrier = carrying[index]
            inner: list[Tensor] | None = [] if features == "inner" else None
            output_WTH, carried_WTH = compensator.run(
                index, replay.split(stream_WTH), sublayer=carrier, absent=absent.get(index), inner=inner
            )
            stream_WTH, correction = compensator.correct(
                index,
                output_WTH,
                carried_WTH,
                replay.states[begins[index]],
                sublayer=carrier,
                inner_RI=torch.cat(inner) if inner else None,
            )
            if bool(stream_WTH.isfinite().all()):
                corrections[index] = correction
            else:
                # Merged, it would spoil every prediction; behind it no stream would be left to fit on.
                dtype = str(output_WTH.dtype).removeprefix("torch.")
                note(
                    f"block {index} makes up for nothing that is removed: with the map for its {carrier} it would put "
                    f"out more than {dtype} holds"
                )
                stream_WTH = output_WTH
        is_own = is_own and begins[index] == index + 1
    return corrections


def carrying_blocks(num_blocks: int, removed: Collection[int], lacking: Collection[int]) -> set[int]:
    """Kept blocks that make up for something: those before a cut, and those that lose a sublayer.

    Args:
        num_blocks: blocks of the source.
        removed: those that go whole.
        lacking: those that stay without their attention or MLP.
    """
    kept = (index for index in range(num_blocks) if index not in removed)
    return {index for index in kept if index + 1 in removed or index in lacking}


def _parts(removal: FoldPlan | Iterable[int]) -> tuple[set[int], dict[int, Sublayer], dict[Sublayer, set[int]]]:
    """Removed blocks, kept blocks that lose a sublayer, and the blocks that share each sublayer."""
    shared: dict[Sublayer, set[int]] = {"attention": set(), "mlp": set()}
    if not isinstance(removal, FoldPlan):
        return set(removal), {}, shared
    absent = removal.absent_sublayers
    for group in removal.groups:
        for sublayer in group.sublayers:
            shared[sublayer] |= set(group.blocks)
    return set(removal.removed), absent, shared
