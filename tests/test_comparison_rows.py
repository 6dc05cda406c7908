"""The rows of a comparison: what each changes, and what none may."""

from __future__ import annotations

from typing import Any

import pytest

from foldgpt.comparison import rows_of_recipe
from foldgpt.errors import UsageError
from foldgpt.recipe import TAKE_OBJECTIVE, Recipe
from foldgpt.recovery import RecoverySettings
from foldgpt.selection import WITH_OBJECTIVE


def recipe_of(**changes: Any) -> Recipe:
    return Recipe.from_dict({"model": "m", "select": {"remove": 2}, **changes})


def test_baselines_are_pure_and_each_step_is_a_row_of_its_own() -> None:
    rows = {row.name: row.recipe for row in rows_of_recipe(recipe_of(compensate={"method": "linear"}))}
    assert list(rows) == [
        "random",
        "last",
        "angular",
        "bi",
        "bi + compensation",
        "greedy",
        "gates",
        "gates + compensation",
    ]
    for name, recipe in rows.items():
        assert recipe.compensate.method == ("linear" if "compensation" in name else "none")
        assert recipe.select.method == name.removesuffix(" + compensation")
        assert recipe.select.remove == 2 and recipe.share.method == "none" and recipe.recover.num_tokens == 0


def test_recovery_doubles_the_rows_and_adds_plain_lora_on_the_language_modelling_loss() -> None:
    rows = rows_of_recipe(recipe_of(recover={"num_tokens": 4096, "settings": {"rank": 8, "last_error": 1.0}}))
    without = [row.name for row in rows if not row.recovered]
    recovered = {row.name: row.recipe.recover for row in rows if row.recovered}
    assert set(recovered) == {*without, "bi + plain LoRA"}
    assert [row.recovered for row in rows] == sorted(row.recovered for row in rows)
    assert recovered["bi"] == recovered["gates"] and recovered["bi"].settings == {"rank": 8, "last_error": 1.0}
    plain = recovered["bi + plain LoRA"]
    assert plain.num_tokens == 4096
    assert plain.settings["rank"] == 8 and plain.settings["lm"] == 1.0
    assert [plain.settings[loss] for loss in ("kl", "last_error", "last_cosine", "states")] == [0.0] * 4


@pytest.mark.parametrize(
    "settings",
    [
        {"divergence": "skewed", "skew": 0.3, "temperature": 2.0},
        {"states": 1.0, "states_at": "all"},
        {"private_terms": False, "scale_rate": 4.0},
        {"train_fully": "cuts", "alpha": 32.0},
    ],
)
def test_settings_that_a_row_switches_off_are_no_idle_ones_in_it(settings: dict[str, Any]) -> None:
    """What plain LoRA does not train or look at is at its default there, whatever the recipe has."""
    for row in rows_of_recipe(recipe_of(recover={"num_tokens": 4096, "settings": settings})):
        if row.recovered:
            RecoverySettings(**row.recipe.recover.settings)


def test_rows_of_ones_own_change_the_recipe() -> None:
    section = {
        "rows": {"bi": None, "Mine, 2!": {"select": {"remove_ratio": 0.3}, "compensate": {"method": "none"}}},
        "recovered": ["bi"],
    }
    rows = rows_of_recipe(recipe_of(recover={"num_tokens": 64}, compare=section, select={"method": "loo", "remove": 2}))
    assert [(row.name, row.recovered, row.folder) for row in rows] == [
        ("bi", False, "bi"),
        ("Mine, 2!", False, "mine-2"),
        ("bi", True, "bi-recovered"),
    ]
    mine = rows[1].recipe
    assert (mine.select.method, mine.select.remove, mine.select.remove_ratio) == ("loo", None, 0.3)


def test_sharing_is_the_recipe_as_it_stands() -> None:
    recipe = recipe_of(share={"method": "adjacent"}, select={"remove": 1})
    rows = {row.name: row.recipe for row in rows_of_recipe(recipe)}
    assert rows["gates + sharing"] == recipe
    assert rows["gates"].share.method == "none"


def test_a_size_is_the_budget_of_the_rows_without_sharing_too() -> None:
    recipe = Recipe.from_dict({"model": "m", "share": {"method": "auto", "size": 0.75}})
    rows = {row.name: row.recipe for row in rows_of_recipe(recipe)}
    assert rows["gates + sharing"] == recipe
    assert rows["bi"].share == Recipe(model="m").share and rows["bi"].select.remove_ratio == 0.25
    with pytest.raises(UsageError, match=r"share\.size is '95M', .* give the size as a fraction"):
        rows_of_recipe(Recipe.from_dict({"model": "m", "share": {"method": "auto", "size": "95M"}}))
    # A row of one's own may ask for a size beside rows that count blocks.
    rows = {"bi": None, "solved": {"share": {"method": "auto", "size": 0.75}}}
    solved = rows_of_recipe(recipe_of(compare={"rows": rows}))[1].recipe
    assert (solved.share.size, solved.select.remove) == (0.75, None)

    as_text = Recipe.from_dict({"model": "m", "share": {"method": "auto", "size": "75%"}})
    assert {row.name: row.recipe for row in rows_of_recipe(as_text)}["bi"].select.remove_ratio == 0.25


def test_rows_that_all_say_what_they_change_need_no_budget_for_known_names() -> None:
    rows = {"solved": {}, "mine": {"select": {"remove": 3}, "share": {"method": "none"}}}
    recipe = Recipe.from_dict(
        {"model": "m", "share": {"method": "auto", "size": "95M"}, "compare": {"rows": rows, "reference": "mine"}}
    )
    assert [(row.recipe.share.size, row.recipe.select.remove) for row in rows_of_recipe(recipe)] == [
        ("95M", None),
        (None, 3),
    ]


def test_a_row_that_changes_the_recovery_is_left_out_without_one_and_that_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    section = {"rows": {"bi": None, "bi + plain LoRA": None}, "recovered": ["bi + plain LoRA"]}
    assert [row.title for row in rows_of_recipe(recipe_of(compare=section))] == ["bi"]
    assert "'bi + plain LoRA' is only run with a recovery, and nothing is recovered" in capsys.readouterr().err
    with_recovery = rows_of_recipe(recipe_of(compare=section, recover={"num_tokens": 64}))
    assert not capsys.readouterr().err
    rows_of_recipe(recipe_of(compare={**section, "recovered": ["bi"]}, recover={"num_tokens": 64}))
    assert "compare.recovered does not name it" in capsys.readouterr().err
    assert [row.title for row in with_recovery] == ["bi", "bi + plain LoRA + recovery"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bi recovered", r"'bi recovered' and 'bi \+ recovery' would have one folder, 'bi-recovered'"),
        ("bi + recovery", r"two rows would be called 'bi \+ recovery'"),
        ("source", r"two rows would be called 'source'"),
    ],
)
def test_a_row_is_not_taken_for_another_one_with_recovery(name: str, message: str) -> None:
    section = {"rows": {"bi": None, name: {"select": {"method": "last"}}}}
    with pytest.raises(UsageError, match=message):
        rows_of_recipe(recipe_of(recover={"num_tokens": 64}, compare=section))


def test_draws_of_random_differ_in_the_blocks_alone() -> None:
    rows = {row.name: row.recipe for row in rows_of_recipe(recipe_of(compare={"random_seeds": 2}, seed=5))}
    first, second = rows["random"], rows["random, seed 6"]
    assert (first.seed, second.seed) == (5, 5)
    assert (first.select.options, second.select.options) == ({"seed": 5}, {"seed": 6})


def test_some_known_rows_are_there_where_they_are_named_alone() -> None:
    assert not {"loo", "taylor"} & {row.name for row in rows_of_recipe(recipe_of())}
    rows = rows_of_recipe(recipe_of(compare={"rows": {"bi": None, "loo": None, "taylor": None}, "recovered": []}))
    assert [(row.name, row.recipe.select.method) for row in rows] == [
        ("bi", "bi"),
        ("loo", "loo"),
        ("taylor", "taylor"),
    ]


def test_an_objective_goes_with_the_selectors_that_take_one() -> None:
    assert TAKE_OBJECTIVE == WITH_OBJECTIVE
    recipe = recipe_of(select={"method": "gates", "remove": 2, "objective": "lm"}, compare={"recovered": []})
    rows = {row.name: row.recipe.select.objective for row in rows_of_recipe(recipe)}
    assert (rows["gates"], rows["greedy"], rows["bi"], rows["random"]) == ("lm", "lm", "kl", "kl")


def test_random_stands_for_all_its_draws_where_rows_are_named() -> None:
    section = {"rows": {"bi": None, "random": None}, "random_seeds": 3, "recovered": ["random"]}
    rows = [row.title for row in rows_of_recipe(recipe_of(recover={"num_tokens": 64}, compare=section))]
    draws = ["random", "random, seed 1", "random, seed 2"]
    assert rows == ["bi", *draws, *(f"{draw} + recovery" for draw in draws)]
    own = {"rows": {"bi": None, "random": {"select": {"method": "random"}}}, "random_seeds": 3}
    assert [row.name for row in rows_of_recipe(recipe_of(compare=own))] == ["bi", "random"]


def test_options_belong_to_the_selector_they_were_given_for() -> None:
    rows = {
        row.name: row.recipe
        for row in rows_of_recipe(recipe_of(select={"method": "gates", "remove": 2, "options": {"steps": 3}}))
    }
    assert rows["gates"].select.options == {"steps": 3} and rows["greedy"].select.options == {}
    apart = {"method": "gates", "remove": 2, "options": {"steps": 3}, "sublayers": True}
    section = {"rows": {"bi": None, "mine": {"select": {"method": "greedy", "sublayers": True}}}}
    rows = {row.name: row.recipe for row in rows_of_recipe(recipe_of(select=apart, compare=section))}
    assert (rows["bi"].select.options, rows["bi"].select.sublayers) == ({}, False)
    assert (rows["mine"].select.options, rows["mine"].select.sublayers) == ({}, True)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rows": {"gatez": None}}, r"'gatez' is not a known row.*Did you mean 'gates'"),
        ({"rows": {"bi": None, "x": {"selct": {}}}}, r"compare\.rows\.x: a row may not change 'selct'.*'select'"),
        ({"rows": {"bi": None, "x": {"evaluate": {}}}}, r"the same for all rows"),
        ({"rows": {"bi": None, "x": {"select": {"mthod": "bi"}}}}, r"rows\.x: select\.mthod: unknown key.*'method'"),
        ({"rows": {"bi": None, "x": {"select": 3}}}, r"rows\.x\.select: must be a mapping"),
        (
            {"rows": {"bi": None, "x": {"recover": {"num_tokens": 3}}}},
            r"recover\.num_tokens: a row may change settings",
        ),
        ({"rows": {"bi": None, "B-i": {}, "b i": {}}}, r"'B-i' and 'b i' would have one folder"),
        ({"rows": {"bi": None, "…": {}}}, r"neither a letter nor a digit"),
        ({"rows": {"gates": None}}, r"'bi' is not one of the rows"),
        ({"recovered": ["gate"]}, r"'gate' is not one of the rows.*Did you mean 'gates'"),
        ({"reference": "greedier"}, r"'greedier' is not one of the rows.*Did you mean 'greedy'"),
    ],
)
def test_a_wrong_section_is_named_with_its_place(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rows_of_recipe(recipe_of(compare=section))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"row": {}}, r"compare\.row: unknown key\. Did you mean 'rows'"),
        ({"random_seeds": 0}, r"compare\.random_seeds: Input should be greater than or equal to 1"),
        ({"confidence": 1.0}, r"compare\.confidence"),
        ({"unequal_budgets": "ignore"}, r"compare\.unequal_budgets: Input should be 'refuse' or 'flag'"),
    ],
)
def test_the_section_is_strict(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_of(compare=section)
