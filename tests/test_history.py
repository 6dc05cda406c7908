"""Models that are folded and recovered more than once: no text that they were made by is forgotten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli_case import foldgpt
from foldgpt.checks import check_inputs
from foldgpt.errors import ArtifactError
from foldgpt.history import HISTORY, History, Training, earlier_history, history_of
from foldgpt.plan import FoldPlan, SourceModel
from foldgpt.recipe import Recipe
from foldgpt.workbench import Workbench
from run_inputs import tiny_recipe, tiny_source, tiny_text


def _done(*arguments: Any) -> str:
    found = foldgpt(*arguments)
    assert found.exit_code == 0, found.output
    return found.stdout


def _recovered(folder: Path, teacher: Path, text: Path, out: Path) -> Path:
    sizes = ("--tokens", 128, "--context", 32, "--held-out-tokens", 64, "--device", "cpu")
    # At this rate something is learned in four steps, so that there is a state to keep.
    settings = ("--set", "rank=2", "--set", "batch_size=1", "--set", "learning_rate=0.02", "--set", "lm=1.0")
    _done("recover", folder, "--teacher", teacher, "--text", text, *sizes, *settings, "--out", out, "-q")
    assert json.loads((out / "recovery.json").read_text())["best_step"]
    return out


def _uses(folder: Path, baseline: Path, text: Path) -> list[str]:
    measured = ("--context", 32, "--max-windows", 2, "--no-speed", "--no-memory", "--json", "-q")
    said = json.loads(_done("eval", folder, "--baseline", baseline, "--perplexity", text, *measured))
    uses: list[str] = next(iter((said["folded"]["reused"] or {}).values()), [])
    return uses


def test_texts_of_earlier_rounds_are_known_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_source(tmp_path / "model")
    chosen_on, first, second, unseen = (tiny_text(tmp_path / f"{name}.txt") for name in ("chosen", "one", "two", "new"))
    calibration = ("--text", chosen_on, "--context", 32, "--tokens", 128, "--select", "bi", "--remove", 1)
    _done("plan", model, *calibration, "--compensate", "none", "--out", tmp_path / "plan.json", "-q")
    _done("fold", model, "--plan", tmp_path / "plan.json", "--out", tmp_path / "folded", "-q")
    assert not (tmp_path / "folded" / HISTORY).exists()

    once = _recovered(tmp_path / "folded", model, first, tmp_path / "once")
    assert not (once / HISTORY).exists() and "models before this one" not in (once / "README.md").read_text()
    twice = _recovered(once, model, second, tmp_path / "twice")
    trained = Training([str(first)], 128)
    assert earlier_history(twice) == History(training=[trained])
    assert history_of(twice).uses == {"calibration": [str(chosen_on)], "training": [str(first), str(second)]}
    card = (twice / "README.md").read_text()
    assert (
        "The models before this one were trained on 128 tokens of one.txt." in card and "128 tokens of two.txt" in card
    )

    recipe = tiny_recipe(twice, chosen_on, evaluate={"texts": [str(first)], "context": 32, "max_windows": 2})
    capsys.readouterr()
    check_inputs(Workbench(Recipe.from_dict(recipe)))
    assert "one.txt is used for training too" in capsys.readouterr().err, "said before a run begins"

    plan = tmp_path / "again.json"
    FoldPlan.create(SourceModel(model=str(twice), model_type="llama", num_blocks=5), removed=[2]).save(plan)
    _done("fold", twice, "--plan", plan, "--out", tmp_path / "again", "-q")
    assert "128 tokens of one.txt, then on 128 tokens of two.txt" in (tmp_path / "again" / "README.md").read_text()
    third = _recovered(tmp_path / "again", twice, second, tmp_path / "third")
    assert [training.num_tokens for training in history_of(third).training] == [128, 128, 128]
    for folder in (tmp_path / "again", third):
        assert _uses(folder, model, first) == ["training"] and _uses(folder, model, chosen_on) == ["calibration"]
        assert _uses(folder, model, unseen) == []


@pytest.mark.parametrize(("selector", "uses"), [("last", []), ("bi", ["calibration"])])
def test_a_text_on_which_a_choice_was_only_measured_is_none_the_model_was_made_by(
    selector: str, uses: list[str], tmp_path: Path
) -> None:
    model, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    asked = ("--text", text, "--context", 32, "--tokens", 128, "--select", selector, "--target", "flops=80%")
    _done("plan", model, *asked, "--compensate", "none", "--out", tmp_path / "plan.json", "-q")
    assert FoldPlan.load(tmp_path / "plan.json").origin["calibration"]["specs"] == [str(text)]
    _done("fold", model, "--plan", tmp_path / "plan.json", "--out", tmp_path / "folded", "-q")
    assert _uses(tmp_path / "folded", model, text) == uses


@pytest.mark.parametrize("written", ["3", '{"training": [{"texts": "b"}]}'])
def test_a_record_that_is_none_is_refused_and_measuring_goes_on(written: str, tmp_path: Path) -> None:
    model = tiny_source(tmp_path / "model")
    (model / HISTORY).write_text(written)
    with pytest.raises(ArtifactError, match=r"history\.json"):
        history_of(model)
    text = tiny_text(tmp_path / "text.txt")
    measured = ("--context", 32, "--max-windows", 2, "--no-speed", "--no-memory")
    said = foldgpt("eval", model, "--perplexity", text, *measured)
    assert said.exit_code == 0 and "not known which texts the model was made by" in " ".join(said.output.split())
