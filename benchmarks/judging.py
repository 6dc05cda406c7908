"""What benchmarks measure of a model beside its source, on windows that do not overlap."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foldgpt.objectives import Head, cross_entropy, forward_kl
from foldgpt.recovery.states import Body


@torch.inference_mode()
def last_hidden(model: Any, ids_WT: Tensor) -> Tensor:
    """What the head would get, [W, T, H]."""
    body = Body(model)
    return torch.cat([body(ids_BT.to(model.device)).last_BTH for ids_BT in ids_WT.split(4)])


@torch.inference_mode()
def perplexity_and_kl(head: Head, source_WTH: Tensor, model_WTH: Tensor, ids_WT: Tensor) -> tuple[float, float]:
    """Perplexity, and mean KL(source ‖ model), over all tokens but each window's first.

    Args:
        head: the source's.
        source_WTH: what the source's head gets; see `last_hidden`.
        model_WTH: what the model's would get.
        ids_WT: the windows.
    """
    losses, divergences = [], []
    # A few windows at a time: the text may be long.
    for ids_BT, source_BTH, model_BTH in zip(
        *(part.split(16) for part in (ids_WT, source_WTH, model_WTH)), strict=True
    ):
        source_RH, model_RH = (states[:, :-1].flatten(0, 1) for states in (source_BTH, model_BTH))
        losses.append(cross_entropy(head, model_RH, ids_BT[:, 1:].flatten().to(model_RH.device)))
        divergences.append(forward_kl(head, source_RH, model_RH))
    loss, kl = (float(torch.cat(parts).double().mean()) for parts in (losses, divergences))
    return math.exp(loss), kl
