"""How many tokens a model has positions for."""

from __future__ import annotations

from typing import Any


def num_positions(config: Any) -> int | None:
    """Positions of the model that a config is of, or of the language model in it; None where it does not say."""
    positions: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return positions
