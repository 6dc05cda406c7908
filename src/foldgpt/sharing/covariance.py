"""Second moments of what each linear layer is given: the metric in which weights are compared and fitted.

How much it matters that a layer has the weights V in place of W is not ‖W − V‖ but what that does to its outputs:
Σ ‖(W − V) x‖² over its inputs x, which is tr((W − V) C (W − V)ᵀ) with C = Σ x xᵀ. C is all that is needed of the
inputs, and the same C serves all layers that read one input (q, k and v; gate and up).

The C of all blocks take about twice the memory of the blocks in 16 bits, so they are never held together: the
calibration windows pass the model block by block, and each block's moments are handed out before the next block
runs. Besides them there is one residual stream. The cost is one forward pass, a beginning of another, and the
products x xᵀ, which are fewer than the blocks' own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foldgpt.plan import SUBLAYERS, Sublayer
from foldgpt.replay import Replay
from foldgpt.sharing.linears import Linear, linears_of

#: Rows multiplied at a time; in bf16 each chunk's product is rounded, their sum is not.
_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Moments:
    """Σ w x xᵀ / Σ w over the inputs x of one linear layer.

    Attributes:
        second_KK: the mean, fp32 (fp64 for a model in fp64) [K, K].
        num_tokens: tokens it was taken over.
    """

    second_KK: Tensor
    num_tokens: int

    def error(self, difference_OK: Tensor) -> float:
        """Mean squared output of a matrix [O, K] on these inputs: tr(D C Dᵀ)."""
        difference = difference_OK.to(self.second_KK)
        return max(0.0, float(((difference @ self.second_KK) * difference).sum(dtype=torch.float64)))


#: Name of a linear layer → the moments of its inputs; layers with one input have the same object.
BlockMoments = Mapping[str, Moments]


class _Collector:
    """Adds up the moments of one block while it runs micro-batch by micro-batch."""

    def __init__(self, block: nn.Module, linears: Sequence[Linear]) -> None:
        self.block = block
        self.linears = linears
        self.owner: dict[str, str] = {}
        self.sums: dict[str, Tensor] = {}
        self.weight: dict[str, float] = {}
        self.num_tokens = 0
        self._inputs: dict[str, Tensor] = {}

    def watch(self) -> list[Any]:
        """Remember the input of each linear layer until `add`."""

        def before(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                if name not in self.owner:
                    same = [other for other, seen in self._inputs.items() if seen is args[0]]
                    self.owner[name] = same[0] if same else name
                if self.owner[name] == name:
                    self._inputs[name] = args[0]

            return hook

        return [
            self.block.get_submodule(linear.name).register_forward_pre_hook(before(linear.name))
            for linear in self.linears
        ]

    def add(self, output_BTH: Tensor) -> None:
        """Add what was seen since the last call; `output_BTH` is the stream behind the block."""
        rows = output_BTH.shape[0] * output_BTH.shape[1]
        # What goes to the stream counts in relation to its size, since the next block normalises it.
        relative_R = 1 / output_BTH.float().flatten(0, 1).square().mean(-1).clamp_min(1e-12)
        for linear in self.linears:
            if self.owner[linear.name] != linear.name:
                continue
            inputs_RK = self._inputs[linear.name].reshape(rows, -1)
            product = weighted_gram(inputs_RK, relative_R if linear.writes else None)
            if linear.name in self.sums:
                self.sums[linear.name] += product
            else:
                self.sums[linear.name] = product
            self.weight[linear.name] = self.weight.get(linear.name, 0.0) + (
                float(relative_R.sum()) if linear.writes else rows
            )
        self.num_tokens += rows
        self._inputs.clear()

    def moments(self) -> BlockMoments:
        """All that was added."""
        means = {name: Moments(total / self.weight[name], self.num_tokens) for name, total in self.sums.items()}
        return {linear.name: means[self.owner[linear.name]] for linear in self.linears}


def weighted_gram(inputs_RK: Tensor, weight_R: Tensor | None = None) -> Tensor:
    """Σ w x xᵀ over rows, fp32 [K, K]; fp64 for inputs in fp64.

    Args:
        inputs_RK: x.
        weight_R: w ≥ 0, fp32; 1 by default.
    """
    wide = torch.float64 if inputs_RK.dtype == torch.float64 else torch.float32
    total = torch.zeros(inputs_RK.shape[1], inputs_RK.shape[1], dtype=wide, device=inputs_RK.device)
    # Inputs in bf16 are multiplied in bf16, several times as fast.
    dtype = torch.bfloat16 if inputs_RK.dtype == torch.bfloat16 else wide
    for rows in range(0, len(inputs_RK), _CHUNK_ROWS):
        factor = inputs_RK[rows : rows + _CHUNK_ROWS].to(dtype)
        if weight_R is not None:
            factor = factor * weight_R[rows : rows + _CHUNK_ROWS].to(wide).sqrt().to(dtype)[:, None]
        total += factor.T @ factor
    return total


@torch.no_grad()
def input_moments(
    replay: Replay, blocks: Collection[int], sublayers: Sequence[Sublayer] = SUBLAYERS
) -> Iterator[tuple[int, BlockMoments]]:
    """The moments of the inputs of each linear layer of some blocks, block after block.

    Args:
        replay: the source on the calibration windows; `boundaries=[0]` is enough.
        blocks: source indices.
        sublayers: whose layers.

    Yields:
        Source index and moments, in order of depth. Nothing is kept of a block once the next is asked for.

    Raises:
        UnsupportedModelError: the blocks do not consist of linear layers of known sublayers.
    """
    stream_WTH = replay.states[0].clone()
    for index in range(max(blocks, default=-1) + 1):
        if index in blocks:
            yield index, block_moments(replay, index, stream_WTH, sublayers)
            continue
        for rows in replay.batches():
            stream_WTH[rows] = replay.block(index, stream_WTH[rows])


@torch.no_grad()
def block_moments(
    replay: Replay,
    index: int,
    stream_WTH: Tensor,
    sublayers: Sequence[Sublayer] = SUBLAYERS,
    batches: Sequence[slice] | None = None,
) -> BlockMoments:
    """The moments of the inputs of each linear layer of one block.

    Args:
        replay: the model.
        index: the block.
        stream_WTH: the stream that enters it; overwritten with what leaves it.
        sublayers: whose layers.
        batches: some of the recorded micro-batches, if not all are to count.
    """
    collector = _Collector(replay.decoder.blocks[index], linears_of(replay.decoder, index, sublayers))
    handles = collector.watch()
    try:
        for rows in replay.batches() if batches is None else batches:
            output_BTH = replay.block(index, stream_WTH[rows])
            collector.add(output_BTH)  # before the stream is overwritten, which some layers read themselves
            stream_WTH[rows] = output_BTH
    finally:
        for handle in handles:
            handle.remove()
    return collector.moments()
