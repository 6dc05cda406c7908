"""The differentiable pass of relaxed gates: x ← x + g (Block(x) − x), the backbone frozen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from foldgpt.errors import FoldGPTError, UsageError
from foldgpt.objectives import DivergenceLoss, fused_logit_losses
from foldgpt.selection.cost import Objective, RemovalCost, Sample

#: Passes over the blocks that one with gradients counts as: one forward, about two for those of its activations.
_BLOCK_PASSES = 3
#: The same for the head: there and, with one product, back; and with the KL the source's logits as well.
_HEAD_PASSES: dict[Objective, int] = {"lm": 2, "kl": 3}


def check_blocks(cost: RemovalCost, method: str) -> None:
    """Refuse sublayers as units: a norm behind a sublayer would undo its gate.

    Raises:
        UsageError: names the method that cannot do it.
    """
    if cost.units.per_block > 1:
        raise UsageError(f"{method} is for whole blocks; remove attention and MLP apart by gates, greedy or loo")


def gradient_of_gates(cost: RemovalCost, sample: Sample, gates_N: Tensor) -> tuple[float, Tensor]:
    """The cost of a gated model on a sample, and its gradient with respect to the gates.

    Counted as `gradient_equivalents` says.

    Args:
        cost: the measure.
        sample: where.
        gates_N: a gate for each block.

    Returns:
        The cost in nats per token, and its gradient, fp64 [N].

    Raises:
        FoldGPTError: the result is not finite.
    """
    began = time.perf_counter()
    gates_N = gates_N.detach().clone().requires_grad_()
    replay = cost.replay
    total = 0.0
    tokens = replay.ids_WT.shape[1]
    with _frozen(replay.model):
        for batch in sample.batches:
            first = (batch.start - sample.windows.start) * tokens
            here = (sample.rows_R >= first) & (sample.rows_R < first + (batch.stop - batch.start) * tokens)
            if not bool(here.any()):
                continue
            hidden_BTH = replay.states[0][batch]
            for block in range(replay.num_blocks):
                update_BTH = replay.block(block, hidden_BTH) - hidden_BTH
                hidden_BTH = hidden_BTH + gates_N[block].to(hidden_BTH.dtype) * update_BTH
            rows_RH = hidden_BTH.flatten(0, 1)[sample.rows_R[here] - first]
            student_RH = replay.finish(rows_RH[None])[0]
            by_kl = sample.source is not None
            loss, _, _ = fused_logit_losses(
                cost.head,
                student_RH,
                sample.targets_R[here],
                teacher=None if sample.source is None else (cost.head, sample.source.hidden_RH[here]),
                divergence=DivergenceLoss() if by_kl else None,
                lm_weight=0.0 if by_kl else 1.0,
            )
            loss = loss / len(sample.rows_R)
            loss.backward()
            total += float(loss.detach())
            share = (batch.stop - batch.start) / replay.num_windows
            replay.num_block_calls += (_BLOCK_PASSES - 1) * replay.num_blocks * share
            cost.add_head_rows(_HEAD_PASSES[cost.objective] * len(student_RH))
    cost.seconds += time.perf_counter() - began
    assert gates_N.grad is not None
    if not bool(gates_N.grad.isfinite().all()) or total != total:
        raise FoldGPTError("the gates' gradient is not finite; load the model in float32 or bfloat16 (--dtype)")
    return total, gates_N.grad.double()


def gradient_equivalents(cost: RemovalCost, sample: Sample) -> float:
    """What `gradient_of_gates` will count in `RemovalCost.forward_equivalents`.

    Three passes of the blocks over the sample; and of the head, at the sample's positions, two passes with the
    language-modelling loss, three with the KL.

    Args:
        cost: the measure.
        sample: where.
    """
    head = cost.predicted_equivalents(1, sample, share_run=0)
    blocks = cost.predicted_equivalents(1, sample, share_run=1) - head
    return _BLOCK_PASSES * blocks + _HEAD_PASSES[cost.objective] * head


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of weights while the context is open."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
