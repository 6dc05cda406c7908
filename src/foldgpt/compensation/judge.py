"""Compensation as part of folding: fit, merge, and keep it only if the predictions come nearer to the source's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foldgpt.artifacts import without_infinity
from foldgpt.compensation.compensate import compensate
from foldgpt.compensation.correction import Correction
from foldgpt.compensation.merge import merge_, set_parameters_, values_of_carriers
from foldgpt.compensation.walk import Walk
from foldgpt.errors import UsageError
from foldgpt.families import decoder_of
from foldgpt.folding import check_foldable
from foldgpt.objectives import Head, forward_kl
from foldgpt.plan import FoldPlan
from foldgpt.progress import note
from foldgpt.replay import Replay

#: The file beside a folded model that says what compensation did.
COMPENSATION = "compensation.json"
#: The share of the windows, from the end, on which compensation is judged and nothing is fitted.
HELD_OUT = 0.125
#: Set on a model that was compensated and is not folded yet, to the number of its blocks.
_COMPENSATED = "_foldgpt_compensated_blocks"


@dataclass(frozen=True)
class Compensated:
    """What compensation did.

    Attributes:
        kept: whether the corrections were merged; False when the predictions on held-out windows got worse.
        kl_before: mean KL(source ‖ folded) without it, in nats per token, on the held-out windows.
        kl_after: with it; not finite where the merged weights are beyond what the model's dtype holds (float16).
        num_tokens: tokens fitted on.
        num_held_out: tokens judged on.
        corrections: by source index of the carrying block.
    """

    kept: bool
    kl_before: float
    kl_after: float
    num_tokens: int
    num_held_out: int
    corrections: Mapping[int, Correction]

    def to_json_dict(self) -> dict[str, Any]:
        """Figures alone, without the maps; None for those that are not finite, which JSON cannot hold."""
        figures: dict[str, Any] = without_infinity(
            {
                "kept": self.kept,
                "kl_before": self.kl_before,
                "kl_after": self.kl_after,
                "num_tokens": self.num_tokens,
                "num_held_out": self.num_held_out,
                "cuts": [
                    {"block": index, "sublayer": correction.sublayer, **asdict(correction.report)}
                    for index, correction in self.corrections.items()
                ],
            }
        )
        return figures


@torch.no_grad()
def compensate_(
    model: nn.Module,
    plan: FoldPlan,
    ids_WT: Tensor,
    *,
    features: Literal["inner", "output"] = "inner",
    ridge: float | Literal["auto"] = "auto",
    rounds: int = 3,
) -> Compensated:
    """Compensate a model in place for what a plan is going to remove; call it before `fold_`.

    A smaller error of the stream is no promise of better predictions, so the KL to the source decides, on windows
    that nothing was fitted on. Where it does not fall, the model is left as it was, and that is said.

    Args:
        model: the source, not folded.
        plan: what will be removed.
        ids_WT: calibration windows, int64 [W, T]; the last eighth is held out.
        features: see `compensate`.
        ridge: see `Compensator`.
        rounds: see `Compensator`.

    Raises:
        UsageError: fewer than two windows, windows of another model, or a model that was compensated before.
        PlanError: the plan is not this model's, which may have been folded by it already.
        UnsupportedModelError: the model's family cannot be compensated.
    """
    check_foldable(model, plan)
    num_blocks = len(decoder_of(model).blocks)
    # It would be fitted on what is no source any more.
    if getattr(model, _COMPENSATED, None) == num_blocks:
        raise UsageError("this model was compensated already: fold it, or load the source again")
    if len(ids_WT) < 2:
        raise UsageError(f"compensation needs at least 2 calibration windows, got {len(ids_WT)}; give more tokens")
    num_held = max(1, round(len(ids_WT) * HELD_OUT))
    # Of everything else the recordings would take more memory than the model.
    fitted = Replay(model, ids_WT[:-num_held], boundaries=Walk.of(plan, num_blocks).boundaries)
    held = Replay(model, ids_WT[-num_held:], boundaries=[0, num_blocks])
    done = compensate_and_judge_(model, plan, fitted, held, features=features, ridge=ridge, rounds=rounds)[0]
    if done.kept and done.corrections:
        setattr(model, _COMPENSATED, num_blocks)
    return done


@torch.no_grad()
def compensate_and_judge_(
    model: nn.Module,
    plan: FoldPlan,
    fitted: Replay,
    held: Replay,
    *,
    features: Literal["inner", "output"] = "inner",
    ridge: float | Literal["auto"] = "auto",
    rounds: int = 3,
) -> tuple[Compensated, dict[str, Tensor]]:
    """`compensate_` on recordings of the model that are there already.

    Args:
        model: the source, not folded, as it was recorded.
        plan: what will be removed.
        fitted: the model on the windows that are fitted on, at least at the `Walk`'s boundaries.
        held: likewise on those by which it is judged, at the first and the last.
        features: see `compensate`.
        ridge: see `Compensator`.
        rounds: see `Compensator`.

    Returns:
        What came of it, and the former values of all parameters of the blocks that carry it; none if it is left out.
    """
    plan = plan.at_start
    corrections = compensate(model, plan, fitted.ids_WT, features=features, ridge=ridge, rounds=rounds, replay=fitted)
    head = Head(model)
    before = _kl(held, head, plan)
    own = values_of_carriers(model, corrections)
    merge_(model, corrections)
    after = _kl(held, head, plan)
    # What overflows without it (in float16) has no KL, and nothing is below that.
    kept = after < before or (math.isfinite(after) and not math.isfinite(before))
    if not kept:
        set_parameters_(model, own)
        own = {}
        if corrections:
            note(f"compensation would raise the KL from {before:.3f} to {after:.3f} nats per token; left out")
    return Compensated(kept, before, after, fitted.ids_WT.numel(), held.ids_WT.numel(), corrections), own


def _kl(replay: Replay, head: Head, plan: FoldPlan) -> float:
    """Mean KL(source ‖ what is left of the model) over the recorded windows, in nats per token.

    The source's states are those that were recorded; the blocks run with the weights they have now.
    """
    absent = plan.absent_sublayers
    total = 0.0
    for rows in replay.batches():
        stream_BTH = replay.states[0][rows]
        for index in plan.kept:
            stream_BTH = replay.block(index, stream_BTH, without=absent.get(index))
        source_RH = replay.finish(replay.end_WTH[rows]).flatten(0, 1)
        total += float(forward_kl(head, source_RH, replay.finish(stream_BTH).flatten(0, 1)).sum())
    return total / replay.ids_WT.numel()
