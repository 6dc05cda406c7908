"""How large a model will be, before it is known what goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from foldgpt.errors import PlanError
from foldgpt.folding import predicted_parameters, source_model_of
from foldgpt.plan import FoldPlan
from foldgpt.planning import expected_parameters, make_plan, make_selection
from foldgpt.recipe import Recipe
from foldgpt.steps import make_analysis
from foldgpt.workbench import Workbench
from models import tiny_hybrid, tiny_model
from run_inputs import tiny_recipe, tiny_source, tiny_text
from tiny import tiny_tokenizer


def recipe_of(**changes: Any) -> Recipe:
    return Recipe.from_dict({"model": "m", "select": {"remove": 2}, **changes})


def test_where_blocks_are_alike_any_of_them_tell_the_size() -> None:
    model = tiny_model("llama")
    removed = FoldPlan.create(source_model_of(model), removed=[1, 3])
    assert expected_parameters(recipe_of(), model) == predicted_parameters(model, removed)
    mixed = tiny_model("gemma3")  # of sliding and full attention, which are of one size
    removed = FoldPlan.create(source_model_of(mixed), removed=[1, 3])
    assert expected_parameters(recipe_of(), mixed) == predicted_parameters(mixed, removed)
    nothing = {"select": {}, "share": {"method": "adjacent"}}
    assert expected_parameters(recipe_of(**nothing), model) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma3", {"share": {"method": "adjacent"}}),
        ("qwen3_moe", {}),
        ("llama", {"select": {"method": "loo", "remove": 2, "sublayers": True}}),
        ("llama", {"select": {}, "share": {"method": "auto", "size": 0.7}}),
        ("llama", {"share": {"method": "adjacent", "start": "zero", "sublayers": ["mlp"]}}),
    ],
)
def test_what_a_search_decides_is_not_known_before_it(family: str, changes: dict[str, Any]) -> None:
    """Which sizes go, which may lend to which, and which need their own attention."""
    assert expected_parameters(recipe_of(**changes), tiny_model(family)) is None


@pytest.mark.parametrize("method", ["angular", "last", "bi"])
def test_numbers_that_cannot_go_are_left_out_of_a_search_for_a_size(method: str, tmp_path: Path) -> None:
    """Of a model in which one block attends; with a checkpoint, whose identity asks for every number."""
    tiny_hybrid(3).save_pretrained(tmp_path / "model")
    tiny_tokenizer(128).save_pretrained(tmp_path / "model")
    text = tiny_text(tmp_path / "text.txt")
    recipe = Recipe.from_dict(
        tiny_recipe(tmp_path / "model", text, select={"method": method}, share={"method": "auto", "size": 0.85})
    ).changed(compensate={"method": "none"})
    bench = Workbench(recipe)
    analysis = make_analysis(bench)
    try:
        selection = make_selection(bench, analysis)
    except PlanError as error:
        # These selectors mean one certain set, which the attending block may be in.
        assert method != "angular" and "cannot remove all blocks that attend" in str(error)
        return
    plan = make_plan(bench, selection, analysis, tmp_path / "progress.json")
    assert 3 in plan.kept and (tmp_path / "progress.json").is_file()


@pytest.mark.parametrize("method", ["angular", "bi", "last", "random"])
def test_ways_to_a_size_remove_what_the_selector_would(method: str, tmp_path: Path) -> None:
    """A run of fewer blocks is another run, and not the beginning of the longer one."""
    source, text = tiny_source(tmp_path / "model", num_hidden_layers=8), tiny_text(tmp_path / "text.txt")
    recipe = Recipe.from_dict(
        tiny_recipe(source, text, select={"method": method}, share={"method": "auto", "size": 0.6})
    ).changed(compensate={"method": "none"})
    bench = Workbench(recipe)
    analysis = make_analysis(bench)
    plan = make_plan(bench, make_selection(bench, analysis), analysis)
    removed = {tuple(candidate["removed"]) for candidate in plan.origin["candidates"]}
    assert len({len(blocks) for blocks in removed}) > 2
    for blocks in removed:
        asked = recipe.changed(select={"remove": len(blocks)}, share={"method": "none", "size": None})
        assert make_selection(Workbench(asked), analysis).removed == blocks
