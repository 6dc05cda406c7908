"""Sizes as people write them."""

from __future__ import annotations

import pytest
import torch

from foldgpt.families import decoder_of
from foldgpt.sharing import limit_of
from foldgpt.sizes import Size, size
from models import tiny_model


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (0.7, Size("ratio", 0.7)),
        ("0.7", Size("ratio", 0.7)),
        ("70%", Size("ratio", 0.7)),
        ("95M", Size("parameters", 95_000_000)),
        (95_000_000, Size("parameters", 95_000_000)),
        ("1e6", Size("parameters", 1_000_000)),
        ("200MB", Size("bytes", 2e8)),
        ("1.5 GB", Size("bytes", 1.5e9)),
    ],
)
def test_what_people_write_is_read(written: str | float, expected: Size) -> None:
    assert size(written) == expected


@pytest.mark.parametrize("written", ["small", "1", "0", "150%", "-3", "20 apples", ""])
def test_what_is_no_size_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match=r"is not a (size|fraction)"):
        size(written)


def test_a_limit_is_for_the_whole_model() -> None:
    model = tiny_model("llama-tied")
    total = sum(parameter.numel() for parameter in model.parameters())
    in_blocks = sum(parameter.numel() for parameter in decoder_of(model).blocks.parameters())
    assert total - in_blocks / 4 <= limit_of(model, size(0.75)) <= total - in_blocks / 4 + 0.0005 * in_blocks + 1
    assert limit_of(model, size(5000)) == 5000
    assert limit_of(model, size("20kB")) == 5000
    assert limit_of(model.to(torch.bfloat16), size("20kB")) == 10_000
