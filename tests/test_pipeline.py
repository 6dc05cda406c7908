"""A whole run: its artefacts, what is done again and what is not, and what a kill leaves behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from foldgpt import artifacts, pipeline, steps
from foldgpt.analysis import sweep
from foldgpt.artifacts import write_json, write_text
from foldgpt.cli import app
from foldgpt.errors import ArtifactError, FoldGPTError, PlanError, UnsupportedModelError, UsageError
from foldgpt.evaluation import perplexity
from foldgpt.plan import FoldPlan
from foldgpt.recipe import Recipe
from foldgpt.recovery.trainer import RecoveryTrainer
from foldgpt.run_folder import RunFolder, ledger, open_run
from foldgpt.selection import Selection
from foldgpt.workbench import Workbench
from models import tiny_hybrid, tiny_model, token_ids
from run_inputs import tiny_recipe, tiny_source, tiny_text
from tiny import tiny_tokenizer

STAGES = ["analysis", "selection", "plan", "fold", "source", "evaluation", "figures", "report"]


def planned(bench: Workbench) -> FoldPlan:
    """The plan of a recipe, from the beginning."""
    analysis = steps.make_analysis(bench)
    return steps.make_plan(bench, steps.make_selection(bench, analysis), analysis)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return tiny_source(folder / "model"), tiny_text(folder / "text.txt")


@pytest.fixture
def recipe(inputs: tuple[Path, Path]) -> Recipe:
    return Recipe.from_dict(tiny_recipe(*inputs))


@pytest.fixture
def stages_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages that are really made, in order."""
    made: list[str] = []
    makers = {
        "analysis": "make_analysis",
        "selection": "make_selection",
        "plan": "make_plan",
        "fold": "make_folded",
        "recovery": "make_recovered",
        "source": "make_source_evaluation",
        "evaluation": "make_evaluation",
        "figures": "draw",
        "report": "build_report",
    }
    for stage, name in makers.items():
        maker = getattr(pipeline, name)

        def spy(*args: Any, stage: str = stage, maker: Any = maker, **kwargs: Any) -> Any:
            made.append(stage)
            return maker(*args, **kwargs)

        monkeypatch.setattr(pipeline, name, spy)
    return made


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
    """The selection may be the same, but the donors were measured on the windows of before."""
    select = {"method": "last", "remove": 0, "num_tokens": 32}
    recipe = Recipe.from_dict(tiny_recipe(*inputs, select=select, share={"method": "adjacent", "donor": "best"}))
    pipeline.run(recipe, tmp_path / "run")
    stages_run.clear()
    pipeline.run(recipe.changed(select={"num_tokens": 256}), tmp_path / "run", overwrite=True)
    assert stages_run[:2] == ["selection", "plan"]


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


def test_what_another_recipe_does_not_ask_for_is_gone(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """A recovered model that is no longer asked for would be pushed and shown as this run's."""
    recover = {"num_tokens": 128, "context": 16, "held_out_tokens": 32, "settings": {"batch_size": 2, "rank": 2}}
    recipe = Recipe.from_dict(tiny_recipe(*inputs, recover=recover))
    pipeline.run(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "recovered").is_dir()
    plain = recipe.changed(recover={"num_tokens": 0})
    result = pipeline.run(plain, tmp_path / "run", overwrite=True)
    assert result.model == tmp_path / "run" / "folded" and (result.model / "README.md").is_file()
    assert not (tmp_path / "run" / "recovered").exists()
    assert "recovery" not in json.loads((tmp_path / "run" / "run.json").read_text())["stages"]


def test_measurements_of_another_plan_are_gone_when_a_run_stops(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.run(recipe, tmp_path / "run")

    def stopped(*_: Any, **__: Any) -> None:
        raise FoldGPTError("stopped")

    monkeypatch.setattr(pipeline, "make_folded", stopped)
    with pytest.raises(FoldGPTError, match="stopped"):
        pipeline.run(recipe.changed(select={"remove": 3}), tmp_path / "run", overwrite=True)
    names = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")}
    assert names == {"analysis.json", "plan.json", "recipe.yaml", "run.json", "selection.json", "source.json"}


@pytest.mark.parametrize(
    ("stopped_in", "left"),
    [
        ("make_analysis", {"recipe.yaml", "run.json", "source.json"}),
        ("make_selection", {"analysis.json", "recipe.yaml", "run.json", "source.json"}),
    ],
)
def test_a_folder_whose_take_over_stopped_is_of_one_recipe(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_in: str, left: set[str]
) -> None:
    """The page of a new recipe would show the numbers of the old model."""
    pipeline.run(recipe, tmp_path / "run")

    def stopped(*_: Any, **__: Any) -> None:
        raise FoldGPTError("stopped")

    monkeypatch.setattr(pipeline, stopped_in, stopped)
    other = recipe.changed(model=str(tiny_source(tmp_path / "gemma2", "gemma2")))
    with pytest.raises(FoldGPTError, match="stopped"):
        pipeline.run(other, tmp_path / "run", overwrite=True)
    assert {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")} == left
    assert Recipe.load(tmp_path / "run" / "recipe.yaml") == other


@pytest.mark.parametrize("changes", [{"select": {"options": {"colour": 1}}}, {"evaluate": {"texts": ["nowhere.txt"]}}])
def test_a_run_is_whole_where_its_take_over_is_refused(
    recipe: Recipe, tmp_path: Path, stages_run: list[str], changes: dict[str, Any]
) -> None:
    pipeline.run(recipe, tmp_path / "run")
    with pytest.raises(FoldGPTError):
        pipeline.run(recipe.changed(**changes), tmp_path / "run", overwrite=True)
    stages_run.clear()
    pipeline.run(recipe, tmp_path / "run")
    assert stages_run == []


def test_a_folder_in_which_nothing_was_made_is_anybodys(recipe: Recipe, tmp_path: Path) -> None:
    """The first mistake would keep the corrected command out of its folder."""
    with pytest.raises(UsageError, match="has 6 blocks"):
        pipeline.run(recipe.changed(select={"remove": 6}), tmp_path / "run")
    with pytest.raises(FoldGPTError, match="nowhere"):
        pipeline.run(recipe.changed(evaluate={"texts": ["nowhere.txt"]}), tmp_path / "run")
    # Hours of an analysis are something.
    checkpoint = tmp_path / "run" / ".analysis-checkpoint.json"
    write_text(checkpoint, "{}")
    with pytest.raises(ArtifactError, match="a run of another recipe"):
        pipeline.run(recipe, tmp_path / "run")
    checkpoint.unlink()
    with open_run(tmp_path / "run", recipe):
        assert Recipe.load(tmp_path / "run" / "recipe.yaml") == recipe


def test_a_recipe_beside_which_nothing_ran_is_not_replaced(recipe: Recipe, tmp_path: Path) -> None:
    recipe.save(tmp_path / "recipe.yaml")
    with pytest.raises(ArtifactError, match="a run of another recipe"):
        pipeline.run(recipe.changed(select={"remove": 1}), tmp_path)
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("recipe.yaml", "{"),
        ("recipe.yaml", "model: m\nolder_key: 1\n"),
        ("run.json", "{"),
        ("run.json", '{"format": "foldgpt.run", "stages": [1]}'),
        ("run.json", '{"format": "foldgpt.run", "stages": {"plan": {"seconds": "long"}}}'),
    ],
)
def test_a_damaged_run_is_refused_and_may_be_taken_over(
    recipe: Recipe, tmp_path: Path, stages_run: list[str], name: str, content: str
) -> None:
    pipeline.run(recipe, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(ArtifactError, match=rf"run that cannot be read \(.*{name}.*\)\..* pass --overwrite"):
        pipeline.run(recipe, tmp_path / "run")
    stages_run.clear()
    pipeline.run(recipe, tmp_path / "run", overwrite=True)
    # The ledger knows what the recipe does not; without it nothing is known of what is there.
    assert stages_run == (STAGES if name == "run.json" else [])
    assert Recipe.load(tmp_path / "run" / "recipe.yaml") == recipe


def test_leftovers_of_a_run_below_this_one_are_not_touched(recipe: Recipe, tmp_path: Path) -> None:
    """It may still be going: each run has its own lock."""
    own, other = (tmp_path / "run" / name for name in (".foldgpt-partial-folded-abcdefgh", "two"))
    going_on = other / own.name
    for folder in (own, going_on):
        folder.mkdir(parents=True)
    in_own = tmp_path / "run" / "figures" / ".foldgpt-partial-plan.png-abcdefgh"
    write_text(in_own, "half")
    recipe.save(tmp_path / "run" / "recipe.yaml")
    with open_run(tmp_path / "run", recipe):
        assert going_on.is_dir() and not own.exists() and not in_own.exists()


def test_measurements_keep_the_machine_and_day_they_were_made_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.run(recipe, tmp_path / "run")
    before = (tmp_path / "run" / "environment.json").read_text()
    monkeypatch.setattr(pipeline, "describe_environment", lambda: {"cpu": "another", "date": "2030-01-01"})
    pipeline.run(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "environment.json").read_text() == before
    pipeline.run(recipe.changed(evaluate={"max_windows": 2}), tmp_path / "run", overwrite=True)
    assert "another" in (tmp_path / "run" / "environment.json").read_text()


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
        ({"recover": {"num_tokens": 4096, "texts": ["nowhere.txt"]}}, "nowhere.txt"),
        ({"recover": {"num_tokens": 10_000_000, "context": 32}}, "too short: .* 10,0.* are asked for"),
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


def test_a_changed_model_is_noticed(tmp_path: Path, stages_run: list[str]) -> None:
    model, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    recipe = Recipe.from_dict(tiny_recipe(model, text))
    pipeline.run(recipe, tmp_path / "run")
    tiny_source(model, seed=1)
    stages_run.clear()
    pipeline.run(recipe, tmp_path / "run")
    assert stages_run == STAGES


def test_a_damaged_artefact_is_made_again(recipe: Recipe, tmp_path: Path, stages_run: list[str]) -> None:
    pipeline.run(recipe, tmp_path / "run")
    (tmp_path / "run" / "folded" / "model.safetensors").write_bytes(b"half a file")
    stages_run.clear()
    pipeline.run(recipe, tmp_path / "run")
    # What is made is the same as before, so the evaluation still holds; the card went with the damaged folder.
    assert stages_run == ["fold", "report"]
    assert "perplexity" in (tmp_path / "run" / "folded" / "README.md").read_text("utf-8")


def test_a_run_takes_from_one_beside_it_what_has_the_same_inputs(
    recipe: Recipe, tmp_path: Path, stages_run: list[str]
) -> None:
    first = pipeline.run(recipe, tmp_path / "runs" / "bi")
    stages_run.clear()
    other = recipe.changed(select={"method": "last"})
    with open_run(tmp_path / "runs" / "last", other, beside=tmp_path / "runs") as folder:
        taken = pipeline.carry_out(folder, Workbench(other))
        seconds = folder.seconds
    assert stages_run == ["selection", "plan", "fold", "evaluation", "figures", "report"]
    assert taken.analysis == first.analysis and taken.evaluation.baseline == first.evaluation.baseline
    assert set(seconds) == set(STAGES)
    stages_run.clear()
    alone = pipeline.run(other, tmp_path / "alone")
    assert alone.evaluation == taken.evaluation
    # What was damaged there is not taken.
    (tmp_path / "runs" / "bi" / "analysis.json").write_text("{}")
    stages_run.clear()
    third = recipe.changed(select={"method": "random"})
    (tmp_path / "runs" / "last" / "run.json").unlink()
    with open_run(tmp_path / "runs" / "random", third, beside=tmp_path / "runs") as folder:
        pipeline.carry_out(folder, Workbench(third))
    assert "analysis" in stages_run and "source" not in stages_run


def test_a_folder_of_another_recipe_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    pipeline.run(recipe, tmp_path / "run")
    with pytest.raises(ArtifactError, match=r"select.remove was 2 and is now 3.*--overwrite"):
        pipeline.run(recipe.changed(select={"remove": 3}), tmp_path / "run")
    assert Recipe.load(tmp_path / "run" / "recipe.yaml") == recipe


def test_a_folder_that_holds_something_else_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("dear reader")
    with pytest.raises(ArtifactError, match="already exists"):
        pipeline.run(recipe, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["letter.txt"]


def test_two_processes_do_not_share_a_folder(recipe: Recipe, tmp_path: Path) -> None:
    code = (
        "import sys; from foldgpt.recipe import Recipe; from foldgpt.run_folder import open_run\n"
        "from foldgpt.errors import ArtifactError\n"
        "try:\n    open_run(sys.argv[1], Recipe.load(sys.argv[2])).__enter__()\n"
        "except ArtifactError as error:\n    print(error)"
    )
    recipe.save(tmp_path / "recipe.yaml")
    with open_run(tmp_path / "run", recipe):
        command = [sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / "recipe.yaml")]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "another process is working in" in printed
    other = recipe.changed(select={"remove": 1})
    with open_run(tmp_path / "run", recipe):
        with pytest.raises(ArtifactError, match="another process"), open_run(tmp_path / "run", other, overwrite=True):
            pass
        assert Recipe.load(tmp_path / "run" / "recipe.yaml") == recipe


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_killed_run_goes_on_where_it_was(stage: str, recipe: Recipe, tmp_path: Path, stages_run: list[str]) -> None:
    recipe.save(tmp_path / "recipe.yaml")
    maker = {
        "selection": "make_selection",
        "plan": "make_plan",
        "fold": "make_folded",
        "recovery": "make_recovered",
        "source": "make_source_evaluation",
        "evaluation": "make_evaluation",
        "figures": "draw",
        "report": "build_report",
    }[stage]
    write_text(
        tmp_path / "killed.py",
        "import os, signal, sys\nfrom foldgpt import pipeline\nfrom foldgpt.recipe import Recipe\n"
        f"pipeline.{maker} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        "pipeline.run(Recipe.load(sys.argv[1]), sys.argv[2])\n",
    )
    command = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "recipe.yaml"), str(tmp_path / "run")]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    pipeline.run(recipe, tmp_path / "run")
    assert stages_run == STAGES[STAGES.index(stage) :]


@pytest.mark.parametrize("full", ["analysis.json", "run.json"])
def test_a_sweep_is_not_repeated_where_its_result_could_not_be_written(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    monkeypatch.setattr(sweep, "_CHECKPOINT_SECONDS", 0.0)
    checkpoint = tmp_path / "run" / ".analysis-checkpoint.json"
    with monkeypatch.context() as patch:
        for module in (pipeline, ledger):
            patch.setattr(module, "write_json", _disk_full_at(full))
        with pytest.raises(ArtifactError, match="disk full"):
            pipeline.run(recipe, tmp_path / "run")
    assert json.loads(checkpoint.read_text())["windows_done"] == 8
    pipeline.run(recipe, tmp_path / "run")
    assert not checkpoint.exists()


def test_a_search_is_not_repeated_where_the_ledger_could_not_be_written(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "run" / ".search-checkpoint.json"

    def selected(*arguments: Any) -> Selection:
        write_text(arguments[-1], "{}")
        monkeypatch.setattr(ledger, "write_json", _disk_full_at("run.json"))
        return steps.make_selection(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "make_selection", selected)
        with pytest.raises(ArtifactError, match="disk full"):
            pipeline.run(recipe, tmp_path / "run")
    assert checkpoint.is_file()
    monkeypatch.undo()
    pipeline.run(recipe, tmp_path / "run")
    assert not checkpoint.exists()


def test_analyze_keeps_the_sweep_until_its_result_is_written(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_CHECKPOINT_SECONDS", 0.0)
    model, text = map(str, inputs)
    command = ["analyze", model, "--text", text, "--context", "32", "--tokens", "256", "--out", str(tmp_path), "-q"]
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write_json", _disk_full_at("analysis.json"))
        assert "disk full" in CliRunner().invoke(app, command).output
    assert (tmp_path / ".analysis-checkpoint.json").is_file()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert not (tmp_path / ".analysis-checkpoint.json").exists()


def _disk_full_at(name: str) -> Any:
    """`write_json` on a disk that has no room for one file."""

    def write(path: Path, value: Any) -> None:
        if Path(path).name == name:
            raise ArtifactError("disk full")
        write_json(path, value)

    return write


def test_killed_while_saving_leaves_no_folded_model(recipe: Recipe, tmp_path: Path) -> None:
    recipe.save(tmp_path / "recipe.yaml")
    write_text(
        tmp_path / "killed.py",
        "import os, signal, sys\nfrom foldgpt import pipeline\nfrom foldgpt.folding import checkpoint\n"
        "from foldgpt.recipe import Recipe\n"
        "checkpoint.verify_checkpoint = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        "pipeline.run(Recipe.load(sys.argv[1]), sys.argv[2])\n",
    )
    command = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "recipe.yaml"), str(tmp_path / "run")]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "folded").exists()
    assert any(path.name.startswith(".foldgpt-partial-folded") for path in (tmp_path / "run").iterdir())
    pipeline.run(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "folded" / "verification.json").is_file()
    assert not any(path.name.startswith(".foldgpt-partial") for path in (tmp_path / "run").iterdir())


def test_an_unknown_selector_is_refused_before_anything_runs(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown selector 'angula'. Did you mean 'angular'?"):
        pipeline.run(recipe.changed(select={"method": "angula"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("donor", ["meen", "owner"])
def test_an_unknown_donor_is_refused_before_anything_runs(recipe: Recipe, tmp_path: Path, donor: str) -> None:
    """Whose weights an owner's would be, only a plan can say."""
    with pytest.raises(UsageError, match=f"unknown donor '{donor}'"):
        pipeline.run(recipe.changed(share={"method": "adjacent", "donor": donor}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_failing_stage_keeps_the_finished_ones(
    recipe: Recipe, tmp_path: Path, stages_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise FoldGPTError("failed")

    with monkeypatch.context() as patched, pytest.raises(FoldGPTError, match="failed"):
        patched.setattr(pipeline, "make_selection", failing)
        pipeline.run(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "analysis.json").is_file()
    assert not (tmp_path / "run" / "plan.json").exists()
    stages_run.clear()
    pipeline.run(recipe, tmp_path / "run")
    assert stages_run == STAGES[1:]


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


def test_a_text_shorter_than_one_window_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    short = tiny_text(tmp_path / "short.txt", num_words=3)
    with pytest.raises(FoldGPTError, match=r"short.txt is too short"):
        pipeline.run(recipe.changed(calibration={"texts": [str(short)]}), tmp_path / "run")


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
    monkeypatch.setattr(steps, "select", lambda *_: Selection("loo", None, (), (), removed_mlp=(2, 3)))
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
    with pytest.raises(UsageError, match="set fit to true"):
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
    monkeypatch.setattr(steps, "compensate_", lambda *_, **__: pytest.fail("compensated before it was checked"))
    with pytest.raises(PlanError, match=r"are to be fitted .* there is no fit of"):
        steps.make_folded(bench, plan.model_copy(update={"fitting": None}), tmp_path / "unfitted")


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
    assert measured != pytest.approx(perplexity(models["folded"], windows).value)
    stages_run.clear()
    pipeline.run(trained, tmp_path / "run")
    assert stages_run == []
    # Nor is the text packed again.
    assert not (tmp_path / "run" / ".recovered.windows").exists()


def test_a_recovery_is_not_repeated_where_the_ledger_does_not_know_of_it(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the recovered model was there, and nothing said yet what it was made of."""
    settings = {"batch_size": 2, "rank": 2}
    recipe = Recipe.from_dict(
        tiny_recipe(*inputs, recover={"num_tokens": 128, "context": 16, "held_out_tokens": 32, "settings": settings})
    )
    enter, step = RunFolder._enter, RecoveryTrainer.training_step
    steps_made = []

    def killed(self: Any, name: str, *arguments: Any) -> None:
        if name == "recovery":
            raise KeyboardInterrupt
        enter(self, name, *arguments)

    def counted(*arguments: Any, **named: Any) -> Any:
        steps_made.append(None)
        return step(*arguments, **named)

    monkeypatch.setattr(RecoveryTrainer, "training_step", counted)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "_enter", killed)
        pipeline.run(recipe, tmp_path / "run")
    first = (tmp_path / "run" / "recovered" / "model.safetensors").read_bytes()
    assert len(steps_made) == 4
    result = pipeline.run(recipe, tmp_path / "run")
    assert len(steps_made) == 4 and (result.model / "model.safetensors").read_bytes() == first
    assert not [entry.name for entry in (tmp_path / "run").glob(".recovered.*")]


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
    with pytest.raises(PlanError, match="is folded already"):
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
    text.write_text(text.read_text().upper())
    pipeline.run(cached, out, overwrite=True)
    assert stages_run[0] == "recovery"
    assert len(list((tmp_path / "states").iterdir())) == 1
    later = pipeline.run(
        cached.changed(seed=3, recover={"minutes": 60.0, "separate_documents": True}), out, overwrite=True
    )
    settings = json.loads((later.model / "recovery.json").read_text())["settings"]
    assert (settings["seed"], settings["minutes"]) == (3, 60.0)


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


def test_an_unknown_setting_of_the_recovery_is_refused_before_anything_runs(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no setting 'ranks'. Did you mean 'rank'"):
        pipeline.run(recipe.changed(recover={"settings": {"ranks": 4}}), tmp_path / "run")
    with pytest.raises(UsageError, match=r"recover\.settings: rank: .*integer.*'many'"):
        pipeline.run(recipe.changed(recover={"settings": {"rank": "many"}}), tmp_path / "run")
    with pytest.raises(UsageError, match="give minutes once"):
        pipeline.run(recipe.changed(recover={"minutes": 1.0, "settings": {"minutes": 2.0}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
