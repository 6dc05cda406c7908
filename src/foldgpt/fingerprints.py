"""Identities of what is in memory: the weights of a model, and windows of token ids."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def ids_fingerprint(ids_WT: Tensor) -> str:
    """SHA-256 (hex) of windows, by their ids and shape."""
    digest = hashlib.sha256(str(tuple(ids_WT.shape)).encode())
    for rows in ids_WT.split(4096):
        digest.update(rows.long().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 (hex) of what tells a model's weights apart: name, shape, format and some values of each."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:  # offloaded: what is there is known by its name alone
            flat = parameter.detach().flatten()
            digest.update(flat[:: max(1, len(flat) // 1024)].cpu().double().numpy().tobytes())
    return digest.hexdigest()
