"""Identities of what is in memory: a model, and windows of token ids."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

#: What of a config does not change what the model computes.
CONFIG_NOISE = frozenset(("_name_or_path", "_model_name_or_path", "transformers_version", "dtype", "torch_dtype"))
#: Values that are brought from a device at a time.
_PART = 1 << 24


def ids_fingerprint(ids_WT: Tensor) -> str:
    """SHA-256 (hex) of windows, by their ids and shape."""
    digest = hashlib.sha256(str(tuple(ids_WT.shape)).encode())
    for rows in ids_WT.split(4096):
        digest.update(rows.long().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def have_same_tensors(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same parameters and saved buffers, in the same formats, on whatever devices."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        not value.is_meta
        and not theirs[name].is_meta
        and value.shape == theirs[name].shape
        and value.dtype == theirs[name].dtype
        and torch.equal(value, theirs[name].to(value.device))
        for name, value in mine.items()
    )


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 (hex) of a model: its config, and the name, shape, format and all values of each weight and buffer.

    Buffers that are made anew with each model are left out. What is offloaded is known by its name, shape and format.
    """
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    if config is not None:
        values = {name: value for name, value in config.to_dict().items() if name not in CONFIG_NOISE}
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    saved = model.state_dict(keep_vars=True).keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    for name, value in (*model.named_parameters(), *buffers):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if not value.is_meta:
            for part in value.detach().flatten().split(_PART):
                digest.update(part.cpu().view(torch.uint8).numpy())
    return digest.hexdigest()
