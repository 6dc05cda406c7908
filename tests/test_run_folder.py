"""The folder of a run: to whom it belongs, what a kill leaves behind, and what goes on from there."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import forked
from foldgpt import artifacts, checks, pipeline, planning, side_by_side
from foldgpt.analysis import sweep
from foldgpt.artifacts import write_json, write_text
from foldgpt.cli import app
from foldgpt.errors import ArtifactError, FoldGPTError, UsageError
from foldgpt.plan import FoldPlan
from foldgpt.recipe import Recipe
from foldgpt.recovery.trainer import RecoveryTrainer
from foldgpt.run_folder import RunFolder, ledger, open_run
from foldgpt.selection import Selection
from foldgpt.sharing import solver
from foldgpt.sources import model_fingerprint
from foldgpt.workbench import Workbench
from run_inputs import MAKERS, STAGES, killed, tiny_recipe, tiny_source, tiny_text


def test_what_another_recipe_does_not_ask_for_is_gone(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """A recovered model that is no longer asked for would be pushed and shown as this run's."""
    recover = {"num_tokens": 128, "context": 16, "held_out_tokens": 32, "settings": {"batch_size": 2, "rank": 2}}
    recipe = Recipe.from_dict(tiny_recipe(*inputs, recover=recover))
    pipeline.run(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "recovered").is_dir() and (tmp_path / "run" / "before_recovery.json").is_file()
    plain = recipe.changed(recover={"num_tokens": 0})
    result = pipeline.run(plain, tmp_path / "run", overwrite=True)
    assert result.model == tmp_path / "run" / "folded" and (result.model / "README.md").is_file()
    assert not (tmp_path / "run" / "recovered").exists()
    assert not (tmp_path / "run" / "before_recovery.json").exists() and result.evaluation.before_recovery is None
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
    assert not (tmp_path / "run").exists()
    # One that the user made stays, and the next call may have it.
    (tmp_path / "run").mkdir()
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


@pytest.mark.parametrize("verb", ["run", "compare"])
def test_a_run_that_was_stopped_at_its_very_beginning_goes_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """The windows that it trains on are made before the first stage."""
    recover = {"num_tokens": 512, "context": 32, "held_out_tokens": 128}
    changed = recipe.changed(recover=recover)
    whole = Recipe.from_dict({**changed.model_dump(mode="json"), "compare": {"rows": {"bi": None, "last": None}}})
    call = pipeline.run if verb == "run" else side_by_side.compare
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "make_analysis", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            call(whole, tmp_path / "run")
    assert (tmp_path / "run" / "recipe.yaml").is_file()
    call(whole, tmp_path / "run")


def test_a_recipe_beside_which_nothing_ran_is_not_replaced(recipe: Recipe, tmp_path: Path) -> None:
    recipe.save(tmp_path / "recipe.yaml")
    with pytest.raises(ArtifactError, match="a run of another recipe"):
        pipeline.run(recipe.changed(select={"remove": 1}), tmp_path)
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


def test_files_beside_a_recipe_beside_which_nothing_ran_are_not_replaced(recipe: Recipe, tmp_path: Path) -> None:
    recipe.save(tmp_path / "recipe.yaml")
    (tmp_path / "plan.json").write_text("by hand")
    with pytest.raises(ArtifactError, match=r"holds plan\.json, and no run that made it.*--overwrite"):
        pipeline.run(recipe, tmp_path)
    assert (tmp_path / "plan.json").read_text() == "by hand"
    pipeline.run(recipe, tmp_path, overwrite=True)
    assert FoldPlan.load(tmp_path).removed


def test_a_comparison_that_lost_its_hidden_files_is_one(recipe: Recipe, tmp_path: Path) -> None:
    """A copy by `cp -r cmp/* new` has none."""
    recipe.save(tmp_path / "recipe.yaml")
    recipe.save(tmp_path / "rows" / "bi" / "recipe.yaml")
    write_json(tmp_path / "comparison.json", {})
    with open_run(tmp_path, recipe, comparison=True) as folder:
        assert folder.path == tmp_path


def test_what_is_finished_may_be_opened_where_its_device_is_not(
    recipe: Recipe, tmp_path: Path, stages_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.run(recipe, tmp_path / "run")
    stages_run.clear()
    monkeypatch.setattr(checks, "device_of", lambda name: pytest.fail("the device was looked for"))
    pipeline.run(recipe, tmp_path / "run")
    assert not stages_run


def test_a_recipe_of_ones_own_keeps_its_words(recipe: Recipe, tmp_path: Path) -> None:
    """Comments are the user's."""
    recipe.save(tmp_path / "recipe.yaml")
    own = "# why: see the minutes\n" + (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(own)
    pipeline.run(recipe, tmp_path)
    assert (tmp_path / "recipe.yaml").read_text() == own and (tmp_path / "plan.json").is_file()


def test_the_command_to_go_on_can_be_pasted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "r sp [2]")
    command = shlex.split(folder.to_go_on)
    assert command == ["foldgpt", "run", str(folder.path / "recipe.yaml"), "--out", str(folder.path)]


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
    (tmp_path / "run" / ".lock").touch()
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


def test_a_changed_model_is_noticed(tmp_path: Path, stages_run: list[str]) -> None:
    model, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    recipe = Recipe.from_dict(tiny_recipe(model, text))
    pipeline.run(recipe, tmp_path / "run")
    tiny_source(model, seed=1)
    stages_run.clear()
    pipeline.run(recipe, tmp_path / "run")
    assert stages_run == STAGES


def test_code_that_comes_with_a_model_is_part_of_it(tmp_path: Path) -> None:
    """It computes what is measured, and it may be edited."""
    source = tiny_source(tmp_path / "model")
    code = source / "modeling_own.py"
    code.write_text("ONE = 1\n")
    assert model_fingerprint(source) == (plain := model_fingerprint(source))
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "auto_map": {"AutoModelForCausalLM": "modeling_own.M"}}))
    before = model_fingerprint(source)
    code.write_text("ONE = 2\n")
    assert len({plain, before, model_fingerprint(source)}) == 3


def test_the_format_that_auto_means_is_an_input(tmp_path: Path, stages_run: list[str]) -> None:
    source, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    recipe = Recipe.from_dict(tiny_recipe(source, text))
    pipeline.run(recipe, tmp_path / "run")
    stages_run.clear()
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "dtype": "bfloat16"}))
    result = pipeline.run(recipe, tmp_path / "run")
    assert stages_run[0] == "analysis" and result.evaluation.folded.size is not None
    assert json.loads((result.model / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_same_said_in_another_way_makes_nothing_again(
    inputs: tuple[Path, Path], tmp_path: Path, stages_run: list[str]
) -> None:
    """Neither a ratio in place of a number, nor tokens that nobody reads or that the text does not have."""
    recover = {"num_tokens": 128, "context": 16, "held_out_tokens": 32, "settings": {"batch_size": 2, "rank": 2}}
    for method in ("bi", "loo"):
        select = {"method": method, "remove": 2, "num_tokens": 256}
        pipeline.run(Recipe.from_dict(tiny_recipe(*inputs, recover=recover, select=select)), tmp_path / method)
        stages_run.clear()
        said = {"method": method, "remove_ratio": 0.34, "num_tokens": 512}
        again = Recipe.from_dict(tiny_recipe(*inputs, recover=recover, select=said))
        pipeline.run(again, tmp_path / method, overwrite=True)
        assert stages_run == ["report"]
    stages_run.clear()
    fewer = again.changed(select={"num_tokens": 128})
    pipeline.run(fewer, tmp_path / "loo", overwrite=True)
    assert "selection" in stages_run


@pytest.mark.parametrize("changes", [{}, {"evaluate": {"max_windows": 1}}, {"select": {"remove": 3}}])
def test_a_plan_that_was_edited_is_kept_beside_the_one_that_is_made_again(
    changes: dict[str, Any], recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    source = pipeline.run(recipe, run).plan.source
    for removed, name in ([0, 1], "plan.json.edited"), ([0, 2], "plan.json.edited-2"):
        edited = FoldPlan.create(source, removed=removed)
        edited.save(run / "plan.json")
        made = pipeline.run(recipe.changed(**changes), run, overwrite=True).plan
        assert FoldPlan.load(run / "plan.json") == made != edited
        assert FoldPlan.load(run / name) == edited
    assert capsys.readouterr().err.count("is not the one that this run wrote") == 2


def test_a_card_that_was_edited_stays_and_is_kept_where_it_is_made_again(
    recipe: Recipe, tmp_path: Path, stages_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The docs tell people to add to it before they publish the model."""
    run = tmp_path / "run"
    pipeline.run(recipe, run)
    card = run / "folded" / "README.md"
    for edited, changes in ("mine", {"evaluate": {"max_windows": 1}}), ("mine too", {"select": {"remove": 3}}):
        card.write_text(edited, encoding="utf-8")
        stages_run.clear()
        recipe, before = recipe.changed(**changes), recipe
        pipeline.run(before, run)
        assert card.read_text(encoding="utf-8") == edited and not stages_run
        pipeline.run(recipe, run, overwrite=True)
        assert card.read_text(encoding="utf-8").startswith("---") and "report" in stages_run
    kept = [run / name for name in ("README.md.edited", "README.md.edited-2")]
    assert [path.read_text(encoding="utf-8") for path in kept] == ["mine", "mine too"]
    assert capsys.readouterr().err.count("yours is kept as README.md.edited") == 2
    card.write_text("mine again", encoding="utf-8")
    (run / "folded" / "model.safetensors").write_bytes(b"half a file")
    pipeline.run(recipe, run)
    assert (run / "README.md.edited-3").read_text(encoding="utf-8") == "mine again"
    card.unlink()
    pipeline.run(recipe, run)
    assert card.is_file()


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
        "except ArtifactError as error:\n    sys.stderr.write(str(error))"
    )
    recipe.save(tmp_path / "recipe.yaml")
    with open_run(tmp_path / "run", recipe):
        given = (code, str(tmp_path / "run"), str(tmp_path / "recipe.yaml"))
        forked.together(tmp_path / "said.txt", 1, forked.run_script, *given)
    assert "another process is working in" in (tmp_path / "said.txt").read_text(encoding="utf-8")
    other = recipe.changed(select={"remove": 1})
    with open_run(tmp_path / "run", recipe):
        with pytest.raises(ArtifactError, match="another process"), open_run(tmp_path / "run", other, overwrite=True):
            pass
        assert Recipe.load(tmp_path / "run" / "recipe.yaml") == recipe


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_killed_run_goes_on_where_it_was(stage: str, recipe: Recipe, tmp_path: Path, stages_run: list[str]) -> None:
    script = f"from foldgpt import pipeline\npipeline.{MAKERS[stage]} = kill\npipeline.run(recipe, out)"
    killed(recipe, tmp_path / "run", script)
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
        return planning.make_selection(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "make_selection", selected)
        with pytest.raises(ArtifactError, match="disk full"):
            pipeline.run(recipe, tmp_path / "run")
    assert checkpoint.is_file()
    monkeypatch.undo()
    pipeline.run(recipe, tmp_path / "run")
    assert not checkpoint.exists()


def test_what_the_solver_measured_is_kept_over_a_kill(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = inputs
    recipe = Recipe.from_dict(tiny_recipe(model, text, select={"method": "bi"}, share={"method": "auto", "size": 0.7}))
    run, whole = tmp_path / "run", tmp_path / "whole"
    checkpoint = run / ".sharing-checkpoint.json"
    script = (
        "from foldgpt import pipeline\nfrom foldgpt.sharing import solver\n"
        "measure = solver._Solver._measure\n"
        "def some(search, *arguments, **options):\n"
        "    measure(search, *arguments, **options) if len(search.candidates) < 2 else kill()\n"
        "solver._Solver._measure = some\npipeline.run(recipe, out)"
    )
    killed(recipe, run, script)
    assert len(json.loads(checkpoint.read_text())["candidates"]) == 2
    found = pipeline.run(recipe, run).plan
    assert capsys.readouterr().err.count("measured before") == 2
    assert not checkpoint.exists()
    afresh = pipeline.run(recipe, whole).plan
    for plan in (found, afresh):
        assert plan.origin["report"].pop("seconds") > 0
    assert found == afresh

    out = tmp_path / "plan.json"
    command = ["plan", str(model), "--text", str(text), "--context", "32", "--tokens", "256", "--select", "bi"]
    command += ["--share", "auto", "--size", "0.7", "--out", str(out), "-q"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FoldPlan, "save", _raising)
        assert "disk full" in CliRunner().invoke(app, command).output
    (kept,) = tmp_path.glob(".plan.json.*.sharing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "fit_sharing", _raising)
        assert CliRunner().invoke(app, command).exit_code == 0, "all of it was measured before"
    assert FoldPlan.load(out).origin["candidates"]
    assert not kept.exists()


def _raising(*_: Any) -> None:
    raise ArtifactError("disk full")


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
    script = "from foldgpt import pipeline\nfrom foldgpt.folding import checkpoint\n"
    killed(recipe, tmp_path / "run", script + "checkpoint.verify_checkpoint = kill\npipeline.run(recipe, out)")
    assert not (tmp_path / "run" / "folded").exists()
    assert any(path.name.startswith(".foldgpt-partial-folded") for path in (tmp_path / "run").iterdir())
    pipeline.run(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "folded" / "verification.json").is_file()
    assert not any(path.name.startswith(".foldgpt-partial") for path in (tmp_path / "run").iterdir())


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
