"""NAME=VALUE of a command line."""

from __future__ import annotations

import re
from typing import Any

import pytest

from foldgpt.assignments import assignments
from foldgpt.errors import UsageError


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("32", 32),
        ("5e-4", 5e-4),
        ("true", True),
        ("False", False),
        ("null", None),
        ("None", None),
        ("none", "none"),
        ("cuts", "cuts"),
        ("", ""),
        ("a=b", "a=b"),
        ("[piqa, arc_easy]", ["piqa", "arc_easy"]),
        ("{remove: 3}", {"remove": 3}),
        ("2M", "2M"),
        ('"12345678"', "12345678"),
        ("'[a]'", "[a]"),
        ("NULL", None),
    ],
)
def test_a_value_is_what_it_looks_like(written: str, value: Any) -> None:
    found = assignments([f"name={written}"])["name"]
    assert found == value and type(found) is type(value)


def test_of_a_name_that_is_given_twice_the_last_counts() -> None:
    assert assignments(["rank=1", "lm=0", "rank=2"]) == {"rank": 2, "lm": 0}


@pytest.mark.parametrize("written", ["rank", "=3"])
def test_what_is_no_assignment_is_refused(written: str) -> None:
    with pytest.raises(UsageError, match="--option takes NAME=VALUE, not"):
        assignments([written], "--option")


@pytest.mark.parametrize(
    "written",
    ["[piqa", "[piqa] arc_easy", "[2026-13-01]", "{a: b: c}", "{a: 1, a: 2}", "[!!bool maybe]", "[" * 5000],
    ids=lambda written: written[:9],
)
def test_what_is_no_list_or_mapping_is_refused(written: str) -> None:
    with pytest.raises(
        UsageError, match=re.escape(f"--set tasks={written}: lists, mappings and quotes are as in YAML")
    ):
        assignments([f"tasks={written}"])
