"""From the number format that a model was computed in to the one that it is saved in."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from foldgpt.errors import FoldGPTError

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
        FoldGPTError: a weight that is finite is not in that format.
    """
    for name, tensor in _stored(model, dtype):
        changed = tensor.data.to(dtype)
        _check_finite(name, tensor, changed, dtype)
        tensor.data = changed


@torch.no_grad()
def round_(model: nn.Module, dtype: torch.dtype) -> None:
    """Round a model's weights to what another number format holds, in place; they keep the format that they have.

    So the model computes in its own format what the one that `cast_` makes of it will compute, loaded in that.

    Args:
        model: a causal language model of transformers.
        dtype: a floating-point format.

    Raises:
        FoldGPTError: a weight that is finite is not in that format.
    """
    for name, tensor in _stored(model, dtype):
        rounded = tensor.to(dtype)
        _check_finite(name, tensor, rounded, dtype)
        tensor.copy_(rounded)


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


def _check_finite(name: str, before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype) -> None:
    if bool(after.isfinite().all()) or not bool(before.isfinite().all()):
        return
    written = str(dtype).removeprefix("torch.")
    raise FoldGPTError(
        f"{name} holds values that {written} does not ({before.abs().max().item():.4g} at most): save it in another "
        "number format (--save-dtype bfloat16, or save_dtype in a recipe)"
    )
