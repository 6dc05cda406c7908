"""From the number format that a model was computed in to the one that it is saved in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from foldgpt.errors import FoldGPTError, UnsupportedModelError
from foldgpt.formats import dtype_name

#: Formats that hold fewer digits or a smaller range than fp32, as transformers treats them.
_HALF = (torch.float16, torch.bfloat16)


@torch.no_grad()
def cast_(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model's weights another number format, in place, as loading its checkpoint in that format would.

    What several places share stays shared. What transformers keeps in fp32 stays as it is, and so does what is no part
    of a checkpoint, such as the frequencies of rotary embeddings.

    Args:
        model: a causal language model of transformers.
        dtype: a floating-point format.

    Raises:
        FoldGPTError: a weight that is finite is not in that format, or weights are offloaded.
    """
    for tensor, changed in _in_format(model, dtype):
        tensor.data = changed


@torch.no_grad()
def round_(model: nn.Module, dtype: torch.dtype) -> None:
    """Round a model's weights to what another number format holds, in place; they keep the format that they have.

    So the model computes in its own format what the one that `cast_` makes of it will compute, loaded in that.

    Args:
        model: a causal language model of transformers.
        dtype: a floating-point format.

    Raises:
        FoldGPTError: a weight that is finite is not in that format, or weights are offloaded.
    """
    for tensor, changed in _in_format(model, dtype):
        tensor.copy_(changed)


def _in_format(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each tensor that a checkpoint would hold in `dtype` and that has another format now, and what it is in that."""
    stored = _stored(model, dtype)
    for name, tensor in stored:
        if tensor.is_meta:  # before the first of the others is changed
            raise UnsupportedModelError(
                f"{name} is offloaded; load the whole model in memory to give it another number format"
            )
    for name, tensor in stored:
        changed = tensor.data.to(dtype)
        if not changed.isfinite().all() and tensor.isfinite().all():
            raise FoldGPTError(
                f"{name} holds values that {dtype_name(dtype)} does not ({tensor.abs().max().item():.4g} at most): "
                "save it in another number format (--save-dtype bfloat16, or save_dtype in a recipe)"
            )
        yield tensor, changed


def _stored(model: nn.Module, dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    """Name and tensor of all that a checkpoint would hold in `dtype` and that has another format now, each once."""
    whole: Any = model
    kept: set[str] = set()
    if dtype in _HALF:
        kept |= set(getattr(whole, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(whole, "_keep_in_fp32_modules", None) or ())
    wide = re.compile("|".join(rf"(?:^|\.){re.escape(part)}(?:\.|$)" for part in sorted(kept))) if kept else None
    seen: set[int] = set()
    found = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen or not tensor.is_floating_point() or tensor.dtype == dtype:
            continue
        seen.add(id(tensor))
        if wide is None or not wide.search(name):
            found.append((name, tensor))
    return found
