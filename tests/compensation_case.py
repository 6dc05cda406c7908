"""What tests of compensation begin with."""

from __future__ import annotations

from typing import Any

import torch

from foldgpt.compensation import Correction, CutReport

#: Families with a norm between the output matrix and the stream.
NORMED = ("gemma2", "gemma3", "olmo2")


def correction(size: int = 32, block: int = 2, **changes: Any) -> Correction:
    """A correction with a random map."""
    map_KH = torch.randn(size, size, generator=torch.Generator().manual_seed(5)) * 0.1
    report = CutReport(tokens=1, left_out=0, ridge=0.1, before=1.0, after=1.0, fitted=1.0)
    fields = {"block": block, "sublayer": "mlp", "features": "output", "map_KH": map_KH, "bias_H": None}
    return Correction(**{**fields, "scale_H": None, "report": report, **changes})
