"""Shapes of models that are on the hub: what of their configs decides size and cost, for use without a network.

One YAML file each: `model`, its id; `source`, where the values stand; `parameters`, how many there are, by which the
values can be checked; `config`, the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Architecture:
    """One of them."""

    model: str
    """Hub id."""
    source: str
    """Address of the config that the values are from."""
    parameters: int
    """Unique parameters of the model."""
    config: dict[str, Any]
    """Values of the config, `model_type` among them."""


def known_architectures() -> dict[str, Architecture]:
    """Hub id → architecture."""
    read = [
        Architecture(**yaml.safe_load(path.read_text("utf-8"))) for path in sorted(Path(__file__).parent.glob("*.yaml"))
    ]
    return {architecture.model: architecture for architecture in read}
