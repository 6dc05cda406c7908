"""Saved folded models, and damage to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from foldgpt.folding import (
    fold_,
    source_model_of,
)
from foldgpt.plan import FoldPlan, Group
from models import tiny_model

#: Large enough that the header of a safetensors file does not matter.
LARGE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}


def folded(family: str = "llama", removed: tuple[int, ...] = (1,), shared: bool = False, **changes: Any) -> Any:
    """A folded tiny model and its plan."""
    model = tiny_model(family, **changes)
    groups = [Group(blocks=(3, 4, 5), donor="mean")] if shared else []
    plan = FoldPlan.create(source_model_of(model), removed=removed, groups=groups)
    fold_(model, plan)
    return model, plan


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
