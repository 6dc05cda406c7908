"""Where a model's class comes from."""

from __future__ import annotations

from torch import nn


def brings_own_code(model: nn.Module) -> bool:
    """Whether the model's class came with its checkpoint, and was trusted when the model was loaded.

    What is saved of it has that code beside it, and needs the same trust to be loaded.
    """
    return type(model).__module__.startswith("transformers_modules.")
