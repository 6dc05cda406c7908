"""The differentiable pass of relaxed gates: x ← x + g (Block(x) − x), the backbone frozen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from foldgpt.errors import FoldGPTError, UsageError
from foldgpt.objectives import cross_entropy_loss, forward_kl_loss
from foldgpt.selection.cost import RemovalCost, Sample


def check_blocks(cost: RemovalCost, method: str) -> None:
    """Refuse sublayers as units: a norm behind a sublayer would undo its gate.

    Raises:
        UsageError: names the method that cannot do it.
    """
    if cost.units.per_block > 1:
        raise UsageError(f"{method} is for whole blocks; remove attention and MLP apart by gates, greedy or loo")


def gradient_of_gates(cost: RemovalCost, sample: Sample, gates_N: Tensor) -> tuple[float, Tensor]:
    """The cost of a gated model on a sample, and its gradient with respect to the gates.

    Counted as three block calls: one forward, and about two for the gradients of its activations.

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
            if sample.source is None:
                loss = cross_entropy_loss(cost.head, student_RH, sample.targets_R[here])
            else:
                loss = forward_kl_loss(cost.head, sample.source.hidden_RH[here], student_RH)
            loss = loss * float(here.double().mean())
            loss.backward()
            total += float(loss.detach())
            replay.num_block_calls += 2 * replay.num_blocks * (batch.stop - batch.start) / replay.num_windows
    cost.seconds += time.perf_counter() - began
    assert gates_N.grad is not None
    if not bool(gates_N.grad.isfinite().all()) or total != total:
        raise FoldGPTError("the gates' gradient is not finite; load the model in float32 or bfloat16 (--dtype)")
    return total, gates_N.grad.double()


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
