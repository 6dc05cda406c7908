"""Corrections for everything that is removed from a model, from front to back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from foldgpt.compensation.compensator import Compensator
from foldgpt.compensation.correction import Correction
from foldgpt.compensation.walk import Walk
from foldgpt.errors import UnsupportedModelError, UsageError, did_you_mean
from foldgpt.families import decoder_of
from foldgpt.formats import dtype_name
from foldgpt.plan import FoldPlan
from foldgpt.progress import note
from foldgpt.replay import Replay

_Features = Literal["inner", "output"]
_Where = Literal["cuts", "behind"]


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
        output_WTH, carried_WTH, _ = compensator.run(0, replay.split(replay.states[0]))
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
    features: _Features = "inner",
    where: _Where = "cuts",
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
        replay: the model recorded on these windows, if that was done already; at least at the `Walk`'s boundaries.

    Returns:
        Source index of the carrying block → its correction; for `merge_`.

    Raises:
        UsageError: the windows do not fit the model, or a name or a number that makes no sense.
        NotFiniteError: its states are not finite.
        UnsupportedModelError: the model's family cannot be compensated.
    """
    for name, value, choices in (("features", features, get_args(_Features)), ("where", where, get_args(_Where))):
        if value not in choices:
            raise UsageError(f"unknown {name} {value!r} for a compensation.{did_you_mean(str(value), choices)}")
    walk = Walk.of(removal, len(decoder_of(model).blocks) if replay is None else replay.num_blocks, where=where)
    for index in walk.sharing:
        carrier = "attention" if walk.absent.get(index) == "mlp" else "mlp"
        note(f"block {index} shares its {carrier} with others, so it makes up for nothing that is removed")
    replay = replay or Replay(model, ids_WT, boundaries=walk.boundaries)
    compensator = Compensator(replay, ridge=ridge, outliers=outliers, rounds=rounds)
    corrections: dict[int, Correction] = {}
    if not walk.carriers:
        return corrections
    stream_WTH = replay.states[walk.entry]
    for index in walk.blocks:
        if index not in walk.carriers:
            without = walk.absent.get(index)
            stream_WTH = torch.cat([replay.block(index, part, without=without) for part in replay.split(stream_WTH)])
            continue
        stream_WTH, correction = _corrected(compensator, walk, index, stream_WTH, inner=features == "inner")
        if correction is not None:
            corrections[index] = correction
    return corrections


def _corrected(
    compensator: Compensator, walk: Walk, index: int, stream_WTH: Tensor, *, inner: bool
) -> tuple[Tensor, Correction | None]:
    """The stream behind a block that carries a correction, and the correction; None where none is possible."""
    carrier, replay = walk.carriers[index], compensator.replay
    output_WTH, carried_WTH, inner_RI = compensator.run(
        index, replay.split(stream_WTH), sublayer=carrier, absent=walk.absent.get(index), inner=inner
    )
    target_WTH = replay.states[walk.ends[index]]
    corrected_WTH, correction = compensator.correct(
        index, output_WTH, carried_WTH, target_WTH, sublayer=carrier, inner_RI=inner_RI
    )
    if bool(corrected_WTH.isfinite().all()):
        return corrected_WTH, correction
    # Merged, it would spoil every prediction; behind it no stream would be left to fit on.
    dtype = dtype_name(output_WTH.dtype)
    note(
        f"block {index} makes up for nothing that is removed: with the map for its {carrier} it would put out "
        f"more than {dtype} holds"
    )
    return output_WTH, None
