"""A student in training computes what it computes when it is measured: its teacher runs without dropout as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

#: In the names of what draws at random in training: attention_dropout, resid_pdrop, layerdrop, router_jitter_noise.
_DRAWN = ("drop", "jitter")


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Set all that a model drops or jitters in training to 0 meanwhile.

    That is what its modules hold, and what is in their configs, which some read while they run.
    """
    holders: dict[int, Any] = {}
    for module in model.modules():
        holders[id(module)] = module
        config = vars(module).get("config")
        while config is not None and id(config) not in holders:
            holders[id(config)] = config
            config = config.get_text_config() if hasattr(config, "get_text_config") else None
    drawn = [(holder, name, value) for holder in holders.values() for name, value in _drawn(holder)]
    try:
        for holder, name, _ in drawn:
            setattr(holder, name, 0.0)
        yield
    finally:
        for holder, name, value in drawn:
            setattr(holder, name, value)


def _drawn(holder: Any) -> Iterator[tuple[str, float]]:
    for name, value in vars(holder).items():
        is_named_so = any(part in name for part in _DRAWN) or (name == "p" and isinstance(holder, _DropoutNd))
        if is_named_so and isinstance(value, float):
            yield name, value
