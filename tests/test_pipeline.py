"""A whole run: its artefacts, and what is done again and what is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from foldgpt import pipeline, planning, steps
from foldgpt.errors import FoldGPTError, PlanError, UsageError
from foldgpt.evaluation import perplexity
from foldgpt.plan import FoldPlan, SourceModel
from foldgpt.recipe import Recipe
from foldgpt.recovery import RecoverySettings, check_plan_suits
from foldgpt.selection import Selection
from foldgpt.workbench import Workbench
from models import token_ids
from run_inputs import STAGES, planned, tiny_recipe, tiny_text


def test_a_run_leaves_all_artefacts(recipe: Recipe, tmp_path: Path) -> None:
    result = pipeline.run(recipe, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")}
    assert names == {
        "analysis.json",
        "environment.json",
        "evaluation.json",
        "figures",
        "folded",
        "plan.json",
        "recipe.yaml",
        "report.html",
        "run.json",
        "selection.json",
        "source.json",
    }
    assert Recipe.load(tmp_path / "run" / "recipe.yaml") == recipe
    assert FoldPlan.load(tmp_path / "run") == result.plan
    assert len(result.plan.removed) == 2
    assert result.plan.origin["calibration"]["fingerprint"] == result.analysis.calibration.fingerprint  # type: ignore[union-attr]
    assert [path.is_file() and path.with_suffix(".svg").is_file() for path in result.figures] == [True] * 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "folded")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.num_hidden_layers == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "folded").chat_template is not None
    assert "4 blocks" in (tmp_path / "run" / "folded" / "README.md").read_text()
    figures = result.evaluation.folded.figures()
    assert figures["num_blocks"] == 4
    assert result.evaluation.baseline.figures()["num_blocks"] == 6  # type: ignore[union-attr]


def test_run_twice_makes_nothing_again(recipe: Recipe, tmp_path: Path, stages_run: list[str]) -> None:
    first = pipeline.run(recipe, tmp_path / "run")
    assert stages_run == STAGES
    stages_run.clear()
    second = pipeline.run(recipe, tmp_path / "run")
    assert stages_run == []
    assert second == first


def test_only_stages_with_other_inputs_run_again(recipe: Recipe, tmp_path: Path, stages_run: list[str]) -> None:
    pipeline.run(recipe, tmp_path / "run")
    stages_run.clear()
    pipeline.run(recipe.changed(evaluate={"max_windows": 2}), tmp_path / "run", overwrite=True)
    assert stages_run == ["source", "evaluation", "report"]
    stages_run.clear()
    pipeline.run(recipe.changed(select={"remove": 1}), tmp_path / "run", overwrite=True)
    assert stages_run == ["selection", "plan", "fold", "source", "evaluation", "figures", "report"]
    stages_run.clear()
    pipeline.run(recipe.changed(select={"remove": 3}), tmp_path / "run", overwrite=True)
    assert stages_run == ["selection", "plan", "fold", "evaluation", "figures", "report"]


def test_whether_speed_is_measured_is_nothing_to_the_source_by_itself(
    recipe: Recipe, tmp_path: Path, stages_run: list[str]
) -> None:
    pipeline.run(recipe, tmp_path / "run")
    stages_run.clear()
    pipeline.run(recipe.changed(evaluate={"speed": True}), tmp_path / "run", overwrite=True)
    assert stages_run == ["evaluation", "report"]


def test_another_template_beside_the_same_weights_is_another_model(
    recipe: Recipe, tmp_path: Path, stages_run: list[str]
) -> None:
    """It is saved with the folded model, and chats are rendered by it."""
    place = Path(shutil.copytree(recipe.model, tmp_path / "model"))
    recipe = recipe.changed(model=str(place))
    pipeline.run(recipe, tmp_path / "run")
    (place / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    stages_run.clear()
    pipeline.run(recipe, tmp_path / "run")
    assert stages_run == ["fold", "source", "evaluation", "report"]
    assert (tmp_path / "run" / "folded" / "chat_template.jinja").is_file()


def test_settings_that_speak_of_cuts_are_refused_before_anything_is_folded(recipe: Recipe, tmp_path: Path) -> None:
    """Which blocks go is known behind the search, hours before the recovery would refuse them."""
    settings = {"batch_size": 4, "train_fully": "cuts"}
    changed = recipe.changed(
        select={"method": "last", "remove": 0},
        share={"method": "adjacent"},
        recover={"num_tokens": 256, "context": 32, "held_out_tokens": 64, "settings": settings},
    )
    with pytest.raises(UsageError, match="the plan removes no whole block beside a kept one"):
        pipeline.run(changed, tmp_path / "run")
    assert (tmp_path / "run" / "plan.json").is_file() and not (tmp_path / "run" / "folded").exists()
    leading = FoldPlan.create(SourceModel(model="m", model_type="llama", num_blocks=6), removed=[0])
    with pytest.raises(UsageError, match="nothing follows on a removed part"):
        check_plan_suits(leading, RecoverySettings(states=1.0))


def test_another_way_to_share_does_not_repeat_the_search(recipe: Recipe, tmp_path: Path, stages_run: list[str]) -> None:
    recipe = recipe.changed(select={"method": "gates", "remove": 2})
    found = pipeline.run(recipe, tmp_path / "run").plan
    stages_run.clear()
    sharing = recipe.changed(share={"method": "adjacent", "start": "zero"})
    plan = pipeline.run(sharing, tmp_path / "run", overwrite=True).plan
    assert stages_run == ["plan", "fold", "evaluation", "figures", "report"]
    assert plan.at_start.removed == found.removed and plan.removed == ()
    assert plan.origin["report"] == found.origin["report"] and plan.origin["report"]["seconds"] > 0
    stages_run.clear()
    pipeline.run(sharing.changed(compensate={"method": "none"}), tmp_path / "run", overwrite=True)
    assert stages_run[:2] == ["selection", "plan"]


def test_best_donors_are_measured_again_on_other_windows(
    inputs: tuple[Path, Path], tmp_path: Path, stages_run: list[str]
) -> None:
    """The selection reads none of them and stands, but the donors were measured on the windows of before."""
    select = {"method": "last", "remove": 0, "num_tokens": 32}
    recipe = Recipe.from_dict(tiny_recipe(*inputs, select=select, share={"method": "adjacent", "donor": "best"}))
    pipeline.run(recipe, tmp_path / "run")
    stages_run.clear()
    pipeline.run(recipe.changed(select={"num_tokens": 256}), tmp_path / "run", overwrite=True)
    assert stages_run[:2] == ["plan", "fold"]


@pytest.mark.parametrize("sublayers", [False, True], ids=["blocks", "sublayers"])
def test_a_search_with_compensation(recipe: Recipe, tmp_path: Path, sublayers: bool) -> None:
    searched = recipe.changed(
        select={"method": "greedy", "num_tokens": 128, "remove": 2, "sublayers": sublayers},
        compensate={"method": "linear"},
    )
    result = pipeline.run(searched, tmp_path / "run")
    assert result.plan.compensation is not None
    assert result.plan.origin["report"]["compensated"] is True
    assert result.plan.origin["report"]["num_tokens"] == 128
    plain = pipeline.run(searched.changed(compensate={"method": "none"}), tmp_path / "plain")
    # Same shapes, other weights: compensation adds nothing.
    assert result.evaluation.folded.size == plain.evaluation.folded.size
    both = [tmp_path / name / "folded" for name in ("run", "plain")]
    weights = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in both]
    changed = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    one, other = ((p.removed, p.removed_attention, p.removed_mlp) for p in (result.plan, plain.plan))
    if one == other:
        carriers = ("down_proj.weight", "o_proj.weight")[: 1 + sublayers]
        assert changed and all(name.endswith(carriers) for name in changed)


def test_compensation_on_another_text_than_the_plans_is_refused(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    text = tiny_text(tmp_path / "text.txt")
    recipe = Recipe.from_dict(tiny_recipe(inputs[0], text, compensate={"method": "linear"}))
    result = pipeline.run(recipe, tmp_path / "run")
    text.write_text(text.read_text(encoding="utf-8")[5:], encoding="utf-8")
    with pytest.raises(PlanError, match="is not what it was"):
        steps.make_folded(Workbench(recipe), result.plan, tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_sharing_run(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = Recipe.from_dict(
        tiny_recipe(*inputs, share={"method": "adjacent", "group_size": 2, "donor": "mean"}, dtype="bfloat16")
    )
    result = pipeline.run(recipe, tmp_path / "run")
    assert [group.donor for group in result.plan.groups] == ["mean", "mean"]
    verification = json.loads((tmp_path / "run" / "folded" / "verification.json").read_text())
    assert verification["model_class"] == "FoldedLlamaForCausalLM"
    size = result.evaluation.folded.size
    assert size.unique_parameters == verification["num_parameters"] < size.stored_parameters
    stored = (tmp_path / "run" / "folded" / "model.safetensors").stat().st_size
    assert stored == pytest.approx(2 * size.unique_parameters, rel=0.15)  # the header weighs in tiny models


@pytest.mark.parametrize("sublayers", [["attention", "mlp"], ["mlp"]], ids=str)
def test_what_starts_at_zero_is_compensated_and_measured_as_removed(
    inputs: tuple[Path, Path], tmp_path: Path, sublayers: list[str]
) -> None:
    """The same blocks removed, and kept as positions: the same perplexity, with a few private parameters more."""
    removal = pipeline.run(Recipe.from_dict(tiny_recipe(*inputs)), tmp_path / "removal")
    share = {"method": "adjacent", "start": "zero", "rank": 2, "sublayers": sublayers}
    zero = pipeline.run(Recipe.from_dict(tiny_recipe(*inputs, share=share)), tmp_path / "zero")
    assert zero.plan.kept == (0, 1, 2, 3, 4, 5) and zero.plan.removed == ()
    assert zero.plan.at_start.removed == removal.plan.removed
    assert zero.plan.removed_attention == (() if "attention" in sublayers else removal.plan.removed)
    compensated = [
        json.loads((tmp_path / run / "folded" / "compensation.json").read_text()) for run in ("removal", "zero")
    ]
    assert compensated[0]["kept"] and compensated[1]["kl_after"] == compensated[0]["kl_after"]
    one, other = removal.evaluation.folded, zero.evaluation.folded
    assert one.perplexity is not None and other.perplexity is not None
    assert other.perplexity.value == one.perplexity.value
    assert one.size.unique_parameters < other.size.unique_parameters < 1.1 * one.size.unique_parameters


def test_a_block_that_must_attend_stays_removed(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Block 0 would be the first one, and transformers reads the length of the KV cache from its attention."""
    select = {"method": "random", "remove": 3, "options": {"seed": 6}}
    share = {"method": "adjacent", "start": "zero", "sublayers": ["mlp"]}
    bench = Workbench(Recipe.from_dict(tiny_recipe(*inputs, select=select, share=share)))
    plan = planned(bench)
    assert plan.at_start.removed[0] == 0 and len(plan.at_start.removed) == 3
    assert plan.removed == (0,) and len(plan.removed_attention) == 2
    assert "block 0 stays removed" in capsys.readouterr().err
    steps.make_folded(bench, plan, tmp_path / "folded")


def test_neighbours_that_lack_the_sublayer_do_not_share_it(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning.selecting, "select", lambda *_: Selection("loo", None, (), (), removed_mlp=(2, 3)))
    select = {"method": "loo", "remove": 1, "sublayers": True}
    bench = Workbench(Recipe.from_dict(tiny_recipe(*inputs, select=select, share={"method": "adjacent"})))
    plan = planned(bench)
    assert plan.removed_mlp == (2, 3)
    assert [group.blocks for group in plan.groups] == [(0, 1), (4, 5)]
    steps.make_folded(bench, plan, tmp_path / "folded")


@pytest.mark.parametrize("donor", ["best", "least_squares"])
def test_a_recipe_measures_and_fits_donors(inputs: tuple[Path, Path], tmp_path: Path, donor: str) -> None:
    share = {"method": "adjacent", "scales": True, "donor": donor, "fit": True}
    bench = Workbench(Recipe.from_dict(tiny_recipe(*inputs, share=share)))
    plan = planned(bench)
    assert plan.groups and plan.fitting == bench.fitting
    assert {group.donor for group in plan.groups} == {"owner" if donor == "best" else donor}
    steps.make_folded(bench, plan, tmp_path / "folded")
    with pytest.raises(UsageError, match=r"it needs share\.fit"):
        Recipe.from_dict(tiny_recipe(*inputs, share={"method": "adjacent", "donor": "least_squares"}))


@pytest.mark.parametrize("start", ["hard", "zero"])
def test_a_plan_that_asks_for_a_fit_is_fitted_when_it_is_folded(
    inputs: tuple[Path, Path], tmp_path: Path, start: str
) -> None:
    share = {"method": "adjacent", "rank": 2, "scales": True, "start": start}
    share |= {"donor": "mean"} if start == "hard" else {}
    bench = Workbench(Recipe.from_dict(tiny_recipe(*inputs, share=share)))
    plan = planned(bench)
    plain = steps.make_folded(bench, plan, tmp_path / "plain")
    fitted = plan.model_copy(update={"fitting": bench.fitting})
    verification = steps.make_folded(bench, fitted, tmp_path / "fitted")
    assert verification.num_parameters == plain.num_parameters
    report = json.loads((tmp_path / "fitted" / "sharing.json").read_text())
    assert {member["block"] for member in report["members"]} == {b for g in plan.groups for b in g.fitted_members}
    assert any(member["kept"] for member in report["members"])
    ids = token_ids(bench.source.model)
    logits = [AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("plain", "fitted")]
    assert not torch.allclose(*logits, atol=1e-2)
    changed = fitted.model_copy(update={"fitting": bench.fitting.model_copy(update={"fingerprint": "other"})})
    with pytest.raises(PlanError, match=r"is not what it was .* set its fitting to null"):
        steps.make_folded(bench, changed, tmp_path / "changed")


def test_a_model_too_large_for_memory_is_analysed_but_not_folded(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(FoldGPTError, match="folding needs the whole model in memory"):
        pipeline.run(recipe.changed(max_memory_gb=0.0001), tmp_path / "run")
    assert (tmp_path / "run" / "analysis.json").is_file()


def test_a_run_with_recovery_ends_in_a_recovered_model(recipe: Recipe, tmp_path: Path, stages_run: list[str]) -> None:
    trained = recipe.changed(
        recover={
            "num_tokens": 1024,
            "context": 32,
            "held_out_tokens": 128,
            "settings": {"batch_size": 4, "evaluate_every": 2, "rank": 4},
        }
    )
    result = pipeline.run(trained, tmp_path / "run")
    assert result.model == tmp_path / "run" / "recovered"
    done = json.loads((result.model / "recovery.json").read_text())
    assert done["num_steps"] == 8 and done["after"]["loss"] < done["before"]["loss"]
    assert "were trained on 1,024 tokens of text.txt" in (result.model / "README.md").read_text("utf-8")
    # Nothing is added, and what is measured is the recovered model, not the folded one.
    models = {name: AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name) for name in ("folded", "recovered")}
    counts = {name: model.num_parameters() for name, model in models.items()}
    assert counts["folded"] == counts["recovered"] == result.evaluation.folded.size.unique_parameters
    windows = Workbench(trained).test
    assert windows is not None and result.evaluation.folded.perplexity is not None
    measured = result.evaluation.folded.perplexity.value
    assert measured == pytest.approx(perplexity(models["recovered"], windows).value)
    before = result.evaluation.before_recovery
    assert before is not None and before.name == "folded" and before.perplexity is not None
    assert before.perplexity.value == pytest.approx(perplexity(models["folded"], windows).value) != measured
    assert "recovery" in stages_run and stages_run.index("before recovery") < stages_run.index("recovery")
    page = " ".join((tmp_path / "run" / "report.html").read_text("utf-8").split())
    assert "(source, folded, recovered) on text.txt" in page and "Recovery changed perplexity by −" in page
    stages_run.clear()
    pipeline.run(trained, tmp_path / "run")
    assert stages_run == []
    # Nor is the text packed again.
    assert not (tmp_path / "run" / ".recovered.windows").exists()


def test_what_a_stopped_recovery_left_goes_where_recovery_is_switched_off(recipe: Recipe, tmp_path: Path) -> None:
    pipeline.run(recipe, tmp_path / "run")
    left = [tmp_path / "run" / name for name in (".recovered.recovery", ".recovered.windows")]
    for folder in left:
        folder.mkdir()
    pipeline.run(recipe, tmp_path / "run")
    assert not any(folder.exists() for folder in left)


def test_a_text_that_was_moved_is_read_from_its_new_place(recipe: Recipe, text: Path, tmp_path: Path) -> None:
    old = Path(shutil.copy(text, tmp_path / "old.txt"))
    calibration = {"context": 32, "num_tokens": 256}
    moving = {"select": {"method": "last", "remove": 1}, "compensate": {"method": "linear"}}
    before = recipe.changed(calibration={**calibration, "texts": [str(old)]}, **moving)
    pipeline.run(before, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "folded")
    new = old.rename(tmp_path / "new.txt")
    after = before.changed(calibration={**calibration, "texts": [str(new)]})
    pipeline.run(after, tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "folded" / "compensation.json").is_file()


def test_recovery_runs_again_when_its_text_or_seed_changed_and_not_for_its_loggers(
    recipe: Recipe, tmp_path: Path, stages_run: list[str]
) -> None:
    text = tiny_text(tmp_path / "train.txt", 2000)
    trained = recipe.changed(
        recover={
            "texts": [str(text)],
            "num_tokens": "0.256k",
            "context": 32,
            "held_out_tokens": 64,
            "settings": {"batch_size": 4, "rank": 2, "norms": False},
        }
    )
    out = tmp_path / "run"
    first = pipeline.run(trained, out)
    assert json.loads((first.model / "recovery.json").read_text())["settings"]["seed"] == trained.seed
    stages_run.clear()
    cached = trained.changed(recover={"teacher_cache": str(tmp_path / "states")})
    pipeline.run(cached, out, overwrite=True)
    # The page alone: it shows the recipe as it now is.
    assert stages_run == ["report"]
    assert str(tmp_path / "states") in (out / "report.html").read_text("utf-8")
    stages_run.clear()
    # How settings are written, and in how much memory, changes nothing either.
    again = {"alpha": None, "micro_batch_size": 2, "gradient_checkpointing": True, "lm": 0}
    pipeline.run(cached.changed(recover={"settings": {**cached.recover.settings, **again}}), out, overwrite=True)
    assert stages_run == ["report"]
    stages_run.clear()
    text.write_text(text.read_text().upper())
    pipeline.run(cached, out, overwrite=True)
    assert stages_run[0] == "recovery"
    assert len(list((tmp_path / "states").iterdir())) == 1
    later = pipeline.run(
        cached.changed(seed=3, recover={"minutes": 60.0, "separate_documents": True}), out, overwrite=True
    )
    settings = json.loads((later.model / "recovery.json").read_text())["settings"]
    assert (settings["seed"], settings["minutes"]) == (3, 60.0)


def test_a_recovery_without_tokens_is_said_to_be_none(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.run(recipe.changed(recover={"minutes": 60.0, "settings": {"rank": 4}}), tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    assert "nothing is trained, for recover.num_tokens is 0: recover.minutes, recover.settings change nothing" in said


def test_a_run_without_any_text_of_ones_own(
    recipe: Recipe, tmp_path: Path, stages_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibrated, compensated and recovered on what the model writes."""
    monkeypatch.setenv("FOLDGPT_CACHE", str(tmp_path / "cache"))
    alone = recipe.changed(
        calibration={"texts": ["self:?length=60"]},
        compensate={"method": "linear"},
        recover={"num_tokens": 512, "context": 32, "held_out_tokens": 64, "settings": {"batch_size": 4, "rank": 2}},
    )
    result = pipeline.run(alone, tmp_path / "run")
    assert result.model.name == "recovered"
    assert result.plan.compensation is not None and result.plan.compensation.texts == ("self:?length=60",)
    assert len(list((tmp_path / "cache" / "own-text").rglob("*.jsonl"))) == 1
    stages_run.clear()
    pipeline.run(alone, tmp_path / "run")
    assert stages_run == []
