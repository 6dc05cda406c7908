"""Counts as people write them."""

from __future__ import annotations

import pytest

from foldgpt.counts import count


@pytest.mark.parametrize(
    ("written", "value"),
    [
        (7, 7),
        ("7", 7),
        ("500k", 500_000),
        ("2M", 2_000_000),
        ("1.5m", 1_500_000),
        ("0.001k", 1),
        ("1e6", 1_000_000),
        ("32_768", 32_768),
        ("32,768", 32_768),
        (" 3 B ", 3_000_000_000),
        ("1.001M", 1_001_000),
    ],
)
def test_counts(written: str | int, value: int) -> None:
    assert count(written) == value


@pytest.mark.parametrize(
    "written", ["", "k", "two", "2 MB", "-5", "1.5", "1.0005k", "1e-3", "0x10", "2G", "1,5M", "1,,2", "1_", "12,34"]
)
def test_what_is_no_count_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        count(written)
