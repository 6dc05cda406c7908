"""How many blocks a wish means: a count, a ratio, or a target for parameters, FLOPs or measured latency.

A target is for the whole model: "at most so many parameters", "at most so many FLOPs for this input". What the
blocks account for is read off the model or measured; embeddings and head stay.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from foldgpt.errors import UsageError
from foldgpt.families import decoder_of
from foldgpt.formats import amount
from foldgpt.targets import Target


@dataclass(frozen=True)
class Share:
    """What a model takes of something, and each of its blocks.

    Attributes:
        what: what it is, with its unit, for messages: "parameters", "FLOPs", "seconds".
        total: the whole model.
        per_block: each block.
    """

    what: str
    total: float
    per_block: tuple[float, ...]


def number_to_remove(num_blocks: int, *, remove: int | None, ratio: float | None) -> int:
    """How many blocks a count or a ratio means; the ratio is of all blocks, rounded to the nearest count."""
    if remove is not None:
        return remove
    return round(num_blocks * ratio) if ratio is not None else 0


def number_for_target(share: Share, target: float) -> int:
    """The least number of blocks whose removal brings the model down to a target, whichever blocks they are.

    Args:
        share: what the model and its blocks take.
        target: what it may take, in the same unit.

    Raises:
        UsageError: no number does so for certain, one block being left.
    """
    smallest_first = sorted(share.per_block)
    left = share.total
    for number, block in enumerate(smallest_first):
        if left <= target:
            return number
        left -= block
    least = share.total - sum(smallest_first[:-1])
    raise UsageError(
        f"no number of removed blocks, whichever they are, brings the model to {amount(target, share.what)}: it has "
        f"{amount(share.total, share.what)}, of which all {len(share.per_block)} blocks are "
        f"{amount(sum(share.per_block), share.what)}, and one must stay. The least that can be had for certain is "
        f"{amount(least, share.what)} ({least / share.total:.1%})"
    )


def number_for_wish(share: Share, wanted: Target, written: str) -> int:
    """The number of blocks that a target means, which is at least one.

    Args:
        share: what the model and its blocks take of that which the target limits.
        wanted: the target.
        written: how it was written, for the error message.

    Raises:
        UsageError: no number meets it, or the model does as it is.
    """
    number = number_for_target(share, wanted.limit(share.total))
    if not number:
        raise UsageError(
            f"select.target is {written}, and the model takes no more as it is ({amount(share.total, share.what)}): "
            "there is nothing to remove"
        )
    return number


def share_for(target: Target, model: nn.Module, window: Callable[[], Tensor]) -> Share:
    """What a model and its blocks take of that which a target limits.

    Args:
        target: the target.
        model: a causal language model.
        window: gives one calibration window, int64 [1, T], where one is needed; a token of it is what is decoded.
    """
    if target.what == "parameters":
        return parameters_of(model)
    ids_BT = window()
    if target.what == "flops":
        return flops_of(model, ids_BT)
    return seconds_of(model, ids_BT[:, :1] if target.what == "decode" else ids_BT)


def parameters_of(model: nn.Module) -> Share:
    """Unique parameters of the model and of each block."""
    blocks = decoder_of(model).blocks
    per_block = tuple(float(sum(p.numel() for p in block.parameters())) for block in blocks)
    return Share("parameters", float(sum(p.numel() for p in model.parameters())), per_block)


@torch.no_grad()
def flops_of(model: nn.Module, ids_BT: Tensor, *, attention_mask: Tensor | None = None) -> Share:
    """Floating-point operations of one forward pass over some token ids, of matrix products and attention.

    Args:
        model: a causal language model; it may be on the meta device.
        ids_BT: token ids, int64 [B, T].
        attention_mask: in place of the one that the model makes; for the meta device, bool [B, 1, T, T].
    """
    decoder = decoder_of(model)
    counter = FlopCounterMode(display=False, custom_mapping=_uncounted())
    masked = {} if attention_mask is None else {"attention_mask": attention_mask}
    with counter:
        model(input_ids=ids_BT, use_cache=False, **masked)
    counts: dict[str, Any] = counter.get_flop_counts()
    root = type(model).__name__
    per_block = tuple(
        float(sum(counts.get(f"{root}.{decoder.blocks_path}.{index}", {}).values()))
        for index in range(len(decoder.blocks))
    )
    return Share("FLOPs", float(counter.get_total_flops()), per_block)


def _uncounted() -> dict[Any, Any]:
    """Formulas of what torch has none for: attention on CPUs, and the experts of mixtures, all in one product."""
    known: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    for library, name in (("aten", "_grouped_mm"), ("transformers", "grouped_mm_fallback")):
        operation = getattr(getattr(torch.ops, library), name, None)
        if operation is not None:
            known[operation] = _grouped_flops
    return known


def _grouped_flops(rows: Sequence[int], experts: Sequence[int], *_: Any, **__: Any) -> int:
    """Of [M, K] rows, each by the [K, N] matrix of its expert."""
    return 2 * rows[0] * rows[1] * experts[-1]


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Of Q Kᵀ and of the product with V, [B, heads, T, channels] each; the mask saves nothing, as torch counts."""
    batch, heads, length, channels = query
    return 2 * batch * heads * length * key[-2] * (channels + value[-1])


@torch.no_grad()
def seconds_of(model: nn.Module, ids_BT: Tensor, *, repeats: int = 5) -> Share:
    """Measured time of one forward pass over some token ids; medians after one pass to warm up.

    All blocks are given the median of theirs: they are timed one by one, and a slow moment of the machine says
    nothing about the block that it hits.

    Args:
        model: a causal language model.
        ids_BT: token ids, int64 [B, T]; [1, 1] gives the time of a token.
        repeats: timed passes.
    """
    decoder = decoder_of(model)
    device = ids_BT.device
    started: list[float] = []
    blocks: list[float] = []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    handles = [block.register_forward_pre_hook(lambda *_: started.append(now())) for block in decoder.blocks]
    handles += [block.register_forward_hook(lambda *_: blocks.append(now() - started[-1])) for block in decoder.blocks]
    totals = []
    try:
        for _ in range(repeats + 1):
            began = now()
            model(input_ids=ids_BT, use_cache=False)
            totals.append(now() - began)
    finally:
        for handle in handles:
            handle.remove()
    num_blocks = len(decoder.blocks)
    of_block = statistics.median(blocks[num_blocks:])
    return Share("seconds", statistics.median(totals[1:]), (of_block,) * num_blocks)
