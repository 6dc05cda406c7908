"""Errors of a recipe that was made of flags speak of the flags."""

from __future__ import annotations

import pytest
import typer

from foldgpt.cli import app, flags
from foldgpt.cli.flags import in_flags
from foldgpt.recipe import Recipe


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("options: select.remove: Input should be greater (got -1)", "--remove: Input should be greater (got -1)"),
        ("select.remove_ratio is 0.01; select.remove is 3", "--remove-ratio is 0.01; --remove is 3"),
        ("options: dtype: wrong; seed: wrong", "--dtype: wrong; --seed: wrong"),
        # No key of a recipe: part of a longer name, or a word of a sentence.
        ("runs/select.remove/plan.json is gone", "runs/--remove/plan.json is gone"),
        ("my.select.remove and select.removed", "my.select.remove and select.removed"),
        ("the model: it has no seed: none", "the model: it has no seed: none"),
        ("recover.context is 7", "recover.context is 7"),
    ],
)
def test_keys_become_flags(message: str, expected: str) -> None:
    assert in_flags(message, flags.PLAN) == expected


def test_where_there_is_a_recipe_the_key_stays_beside_the_flag() -> None:
    assert in_flags("select.remove is 3", flags.RUN, beside_keys=True) == "select.remove (--remove) is 3"


@pytest.mark.parametrize(
    ("verb", "table"),
    [
        ("analyze", flags.ANALYZE),
        ("plan", flags.PLAN),
        ("fold", flags.FOLD),
        ("recover", flags.RECOVER),
        ("eval", flags.EVAL),
        ("run", flags.RUN),
        ("compare", flags.COMPARE),
    ],
)
def test_each_flag_is_one_of_the_verb_and_each_key_one_of_a_recipe(verb: str, table: dict[str, str]) -> None:
    """A flag or key that is renamed must not leave errors that speak of the old one."""
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    known = {name for parameter in command.params for name in parameter.opts}
    assert set(table.values()) <= known
    for key in table:
        section, _, name = key.rpartition(".")
        fields = Recipe.model_fields
        assert name in (fields[section].annotation.model_fields if section else fields)  # type: ignore[union-attr]
