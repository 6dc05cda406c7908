"""Identities of what is in memory: a model, and windows of token ids."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

#: What of a config does not change what the model computes.
CONFIG_NOISE = frozenset(("_name_or_path", "_model_name_or_path", "transformers_version", "dtype", "torch_dtype"))


def ids_fingerprint(ids_WT: Tensor) -> str:
    """SHA-256 (hex) of windows, by their ids and shape."""
    digest = hashlib.sha256(str(tuple(ids_WT.shape)).encode())
    for rows in ids_WT.split(4096):
        digest.update(rows.long().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 (hex) of what tells a model apart: name, shape, format and some values of each weight, and its config."""
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    if config is not None:
        values = {name: value for name, value in config.to_dict().items() if name not in CONFIG_NOISE}
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:  # offloaded: what is there is known by its name alone
            flat = parameter.detach().flatten()
            digest.update(flat[:: max(1, len(flat) // 1024)].cpu().double().numpy().tobytes())
    return digest.hexdigest()
