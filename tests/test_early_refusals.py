"""Mistakes in a recipe show before anything is measured, searched or trained for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cli_case import foldgpt
from foldgpt import pipeline, side_by_side, steps
from foldgpt.checks import check_names
from foldgpt.errors import FoldGPTError, PlanError, UnsupportedModelError, UsageError
from foldgpt.recipe import Recipe
from foldgpt.rehearsal import rehearse
from foldgpt.workbench import Workbench
from models import tiny_hybrid, tiny_model
from run_inputs import planned, tiny_recipe, tiny_source, tiny_text
from tiny import tiny_tokenizer


def test_a_teacher_with_another_tokenizer_is_refused_before_training(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    pipeline.run(Recipe.from_dict(tiny_recipe(*inputs)), tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(inputs[0], other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = dict(zip(ids, reversed(ids.values()), strict=True))
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    recover = {"num_tokens": 128, "context": 16, "held_out_tokens": 32}
    bench = Workbench(Recipe.from_dict(tiny_recipe(other, inputs[1], recover=recover)))
    with pytest.raises(UsageError, match="has another tokenizer than"):
        steps.make_recovered(bench, tmp_path / "run" / "folded", tmp_path / "recovered")
    assert not (tmp_path / "recovered").exists()


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"tasks": ["pica"]}, "unknown task 'pica'.*'piqa'"),
        ({"texts": ["nowhere.txt"]}, "nowhere.txt"),
        ({"tasks": ["piqa"], "data_dir": "nowhere"}, "nowhere"),
        ({"context": 512}, "evaluate.context is 512 .* 128 positions"),
        ({"texts": ["self:"]}, "self:"),
        # M6: never multiple choice alone.
        ({"tasks": ["piqa"], "texts": []}, "tasks need a text as well"),
    ],
    ids=str,
)
def test_mistakes_in_what_is_measured_show_before_anything_runs(
    recipe: Recipe, tmp_path: Path, stages_run: list[str], evaluate: dict[str, Any], message: str
) -> None:
    with pytest.raises(FoldGPTError, match=message):
        pipeline.run(recipe.changed(evaluate=evaluate), tmp_path / "run")
    assert stages_run == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recover": {"num_tokens": 4096, "context": 32, "texts": ["nowhere.txt"]}}, "nowhere.txt"),
        ({"recover": {"num_tokens": 10_000_000, "context": 32}}, "too short: .* 10,0.* are asked for"),
        ({"calibration": {"texts": ["nowhere.txt"]}, "recover": {"num_tokens": 4096, "context": 32}}, "nowhere.txt"),
        ({"calibration": {"num_tokens": 16}, "compensate": {"method": "none"}}, "does not fill one window of 32"),
        ({"device": "cuda:7"}, "device 'cuda:7' is not available here"),
        (
            {"recover": {"num_tokens": 127, "context": 32, "settings": {"batch_size": 4}}},
            r"recover.num_tokens is 127, and one step takes 128: 4 windows \(batch_size .* at least 128 tokens",
        ),
        ({"recover": {"num_tokens": 4096, "context": 32, "held_out_tokens": 31}}, "held_out_tokens is 31,.* least 32"),
        ({"select": {"remove": 6}}, "select.remove is 6, .* has 6 blocks"),
        ({"select": {"remove_ratio": 0.95}}, "select.remove_ratio is 0.95, .* has 6 blocks"),
        ({"select": {"options": {"colour": 1}}}, "'bi' has no option 'colour'"),
        ({"select": {"method": "gates", "options": {"effort": 1e308}}}, "effort must be a number above 0 and at most"),
        ({"select": {"sublayers": True}}, "'bi' removes whole blocks"),
        ({"select": {"remove": 0}, "share": {"method": "adjacent", "start": "zero"}}, "nothing is to be removed"),
        (
            {"compensate": {"method": "linear"}, "calibration": {"num_tokens": 63}},
            r"fitted \(compensate.method\) .* there must be two",
        ),
        (
            {
                "compensate": {"method": "none"},
                "calibration": {"num_tokens": 63},
                "share": {"method": "auto", "size": "0.7"},
            },
            r"fitted \(share.method auto\) .* there must be two",
        ),
        ({"recover": {"num_tokens": 4096, "report_to": ["tensorbord"]}}, "unknown logger 'tensorbord'.*tensorboard"),
        ({"recover": {"num_tokens": 4096, "context": 512}}, "recover.context is 512.* 128 positions"),
        ({"calibration": {"context": 512, "num_tokens": 1024}}, "calibration.context is 512.* 128 positions"),
    ],
    ids=str,
)
def test_mistakes_in_what_is_trained_on_show_before_anything_runs(
    recipe: Recipe, tmp_path: Path, stages_run: list[str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FoldGPTError, match=message):
        pipeline.run(recipe.changed(**changes), tmp_path / "run")
    assert stages_run == []


def test_a_compiler_that_is_not_there_shows_before_anything_runs(
    recipe: Recipe, tmp_path: Path, stages_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foldgpt.recovery.compiled._BACKEND", "nonsense")
    compiling = recipe.changed(recover={"num_tokens": 4096, "context": 32, "settings": {"compile": True}})
    with pytest.raises(FoldGPTError, match=r"torch\.compile does not work on cpu"):
        pipeline.run(compiling, tmp_path / "run")
    assert stages_run == []


def test_a_text_too_short_for_another_recipe_shows_before_anything_runs(
    inputs: tuple[Path, Path], tmp_path: Path, stages_run: list[str]
) -> None:
    """The recovered model that is there says nothing of it."""
    recover = {"num_tokens": 128, "context": 16, "held_out_tokens": 32, "settings": {"batch_size": 2, "rank": 2}}
    recipe = Recipe.from_dict(tiny_recipe(*inputs, recover=recover))
    pipeline.run(recipe, tmp_path / "run")
    stages_run.clear()
    longer = recipe.changed(select={"remove": 1}, recover={"num_tokens": 10_000_000})
    with pytest.raises(FoldGPTError, match="too short"):
        pipeline.run(longer, tmp_path / "run", overwrite=True)
    assert stages_run == []


def test_an_unknown_selector_is_refused_before_anything_runs(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown selector 'angula'. Did you mean 'angular'?"):
        pipeline.run(recipe.changed(select={"method": "angula"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("donor", ["meen", "owner"])
def test_an_unknown_donor_is_no_recipe(recipe: Recipe, donor: str) -> None:
    """Whose weights an owner's would be, only a plan can say."""
    with pytest.raises(UsageError, match=rf"share\.donor: Input should be .*\(got '{donor}'\)"):
        recipe.changed(share={"method": "adjacent", "donor": donor})


def test_a_text_shorter_than_one_window_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    short = tiny_text(tmp_path / "short.txt", num_words=3)
    with pytest.raises(FoldGPTError, match=r"short.txt is too short"):
        pipeline.run(recipe.changed(calibration={"texts": [str(short)]}), tmp_path / "run")


def test_what_cannot_be_folded_is_refused_before_anything_is_fitted(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = {"method": "adjacent", "donor": "least_squares", "fit": True}
    bench = Workbench(Recipe.from_dict(tiny_recipe(*inputs, share=share, compensate={"method": "linear"})))
    plan = planned(bench)
    assert plan.fitting is not None and plan.compensation is not None
    other = plan.model_copy(update={"fitting": bench.fitting.model_copy(update={"fingerprint": "other"})})
    with pytest.raises(PlanError) as changed:
        steps.make_folded(bench, other, tmp_path / "changed")
    # Shared weights that are to be fitted cannot be made without.
    assert str(changed.value).endswith("Make the plan again.")
    monkeypatch.setattr(steps.folding, "compensate_", lambda *_, **__: pytest.fail("compensated before it was checked"))
    with pytest.raises(PlanError, match=r"are to be fitted .* the plan has no 'fitting'"):
        steps.make_folded(bench, plan.model_copy(update={"fitting": None}), tmp_path / "unfitted")


def test_a_model_that_cannot_be_trained_shows_before_anything_runs(
    inputs: tuple[Path, Path], tmp_path: Path, stages_run: list[str]
) -> None:
    tiny_model("llama").half().save_pretrained(tmp_path / "half")
    tiny_tokenizer(128).save_pretrained(tmp_path / "half")
    recover = {"num_tokens": 128, "context": 16, "held_out_tokens": 32}
    half = Recipe.from_dict(tiny_recipe(tmp_path / "half", inputs[1], recover=recover))
    with pytest.raises(UnsupportedModelError, match="the model is in float16"):
        pipeline.run(half, tmp_path / "run")
    assert stages_run == []


def test_a_model_that_cannot_be_folded_shows_before_anything_runs(
    inputs: tuple[Path, Path], tmp_path: Path, stages_run: list[str]
) -> None:
    model = tiny_source(tmp_path / "odd")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "layer_scales": [1.0] * config["num_hidden_layers"]}))
    with pytest.raises(UnsupportedModelError, match="layer_scales"):
        pipeline.run(Recipe.from_dict(tiny_recipe(model, inputs[1])), tmp_path / "run")
    shared = Recipe.from_dict(
        tiny_recipe(*inputs, select={"method": "bi", "remove": 0}, share={"method": "adjacent", "group_size": 2})
    )
    folded = pipeline.run(shared, tmp_path / "shared").model
    stages_run.clear()
    with pytest.raises(PlanError, match=r"is folded already.*or give it weights of its own with foldgpt\.unfold_"):
        pipeline.run(Recipe.from_dict(tiny_recipe(folded, inputs[1])), tmp_path / "run")
    # What lacks sublayers stays so when it is unfolded.
    config = json.loads((folded / "config.json").read_text())
    config["fold_layout"]["absent"] = [{"position": 1, "sublayer": "attention"}]
    (folded / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match=r"is folded already.*: fold its source, by one plan$"):
        pipeline.run(Recipe.from_dict(tiny_recipe(folded, inputs[1])), tmp_path / "run")
    assert stages_run == []


def test_a_set_that_cannot_be_folded_shows_before_the_fold(
    inputs: tuple[Path, Path], tmp_path: Path, stages_run: list[str]
) -> None:
    tiny_hybrid(4).save_pretrained(tmp_path / "hybrid")
    tiny_tokenizer(128).save_pretrained(tmp_path / "hybrid")
    recipe = tiny_recipe(tmp_path / "hybrid", inputs[1], select={"method": "last", "remove": 3})
    with pytest.raises(PlanError, match="cannot remove all blocks that attend"):
        pipeline.run(Recipe.from_dict(recipe), tmp_path / "run")
    assert stages_run == ["analysis", "selection"]


@pytest.mark.parametrize(("ratio", "least"), [(0.05, "0.084"), (0.001, "0.084")])
def test_a_ratio_that_removes_nothing_is_refused(recipe: Recipe, tmp_path: Path, ratio: float, least: str) -> None:
    with pytest.raises(UsageError, match=rf"which of 6 blocks is none. The least that removes one is {least}"):
        pipeline.run(recipe.changed(select={"remove": None, "remove_ratio": ratio}), tmp_path / "run")
    changed = recipe.changed(select={"remove": None, "remove_ratio": float(least)})
    assert len(pipeline.run(changed, tmp_path / "run").plan.removed) == 1


def test_an_unknown_setting_of_the_recovery_is_refused_before_anything_runs(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no setting 'ranks'. Did you mean 'rank'"):
        pipeline.run(recipe.changed(recover={"settings": {"ranks": 4}}), tmp_path / "run")
    with pytest.raises(UsageError, match=r"recover\.settings: rank: .*integer.*'many'"):
        pipeline.run(recipe.changed(recover={"settings": {"rank": "many"}}), tmp_path / "run")
    with pytest.raises(UsageError, match="give minutes once"):
        pipeline.run(recipe.changed(recover={"minutes": 1.0, "settings": {"minutes": 2.0}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "value"), [("norms", 0), ("rank", True), ("minutes", True), ("lm", False)])
def test_a_switch_is_no_number_and_a_number_no_switch(name: str, value: object) -> None:
    recipe = Recipe.from_dict({"model": "m", "recover": {"num_tokens": 64, "settings": {name: value}}})
    wanted = "true or false" if name == "norms" else "neither true nor false"
    with pytest.raises(UsageError, match=rf"recover\.settings\.{name} must be {wanted}, not {value}"):
        Workbench(recipe)


@pytest.mark.parametrize(
    ("change", "gap"),
    [
        ({"select": {"method": "greedy", "remove": 1}}, "+25.0"),
        ({"select": {"remove": 3}, "share": {"method": "adjacent"}}, ""),
        ({"share": {"method": "adjacent", "start": "zero", "rank": 4}}, ""),
        ({"share": {"method": "adjacent", "donor": "best"}}, ""),
    ],
)
def test_unequal_budgets_that_no_search_can_change_are_refused_before_any(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], gap: str
) -> None:
    """By as much as they are once all plans are made."""
    compared = {"rows": {"bi": None, "other": change}, "recovered": []}
    unequal = recipe.changed(compare=compared)
    messages = []
    for early in (True, False):
        with monkeypatch.context() as patched:
            patched.setattr(
                side_by_side, *(("make_up_plan", _too_late) if early else ("expected_parameters", lambda *_: None))
            )
            with pytest.raises(UsageError, match=r"unequal budgets: .*other [+-]") as refused:
                side_by_side.compare(unequal, tmp_path / f"{early}")
        messages.append(str(refused.value))
    assert messages[0] == messages[1] and gap in messages[0]
    big = Recipe.from_dict({**unequal.model_dump(mode="json"), "select": {"method": "bi", "remove": 2}})
    with monkeypatch.context() as patched, pytest.raises(UsageError, match="unequal budgets") as rehearsed:
        patched.setattr(side_by_side, "compare", _too_late)
        rehearse(big, compare=True)
    assert str(rehearsed.value) == messages[0]


def _too_late(*_: Any) -> None:
    pytest.fail("searched before budgets were compared")


def test_a_cache_for_a_teacher_that_is_not_asked_is_refused_but_of_rows(recipe: Recipe, tmp_path: Path) -> None:
    """Rows have it in common, and each has losses of its own."""
    recover = {"num_tokens": 4096, "teacher_cache": str(tmp_path), "settings": {"kl": 0, "lm": 1}}
    asked = recipe.changed(recover=recover)
    with pytest.raises(UsageError, match=r"recover\.teacher_cache is .* no loss compares with the teacher"):
        check_names(Workbench(asked))
    check_names(Workbench(asked, common=tmp_path))


@pytest.mark.parametrize("method", ["gates", "greedy", "bi"])
def test_a_text_that_is_not_there_is_missed_before_the_model_is_loaded(
    method: str, model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes(b"nothing that could be loaded")
    given = ("--select", method, "--remove", 1, "--text", tmp_path / "none.txt", "--out", tmp_path / "plan.json")
    refused = foldgpt("plan", broken, *given)
    assert refused.exit_code == 1 and "no text file matches" in refused.stderr
