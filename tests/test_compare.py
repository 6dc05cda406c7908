"""Methods side by side: rows are what they say, nothing is made twice, 'better' is said only where it is certain."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from typer.testing import CliRunner

from comparison_inputs import comparison
from foldgpt import pipeline, side_by_side
from foldgpt.artifacts import write_json, write_text
from foldgpt.cli import app
from foldgpt.cli.printing import print_comparison
from foldgpt.comparison import (
    Comparison,
    Interval,
    Training,
    accuracy_difference,
    notes_of,
    perplexity_difference,
    rows_of_recipe,
    verdict,
)
from foldgpt.errors import ArtifactError, FoldGPTError, UsageError
from foldgpt.evaluation import MeasurementError, Perplexity, TaskScore
from foldgpt.evaluation.tasks import Accuracy
from foldgpt.recipe import Recipe
from foldgpt.report import as_markdown, write_comparison
from foldgpt.run_folder import folder
from foldgpt.workbench import Workbench
from report_inputs import recovery
from run_inputs import killed, tiny_recipe

RECOVER = {
    "num_tokens": 256,
    "context": 32,
    "held_out_tokens": 64,
    "settings": {"batch_size": 4, "evaluate_every": 1, "rank": 2, "last_error": 0.1},
}

# ------------------------------------------------------------------------------------------------------- rows


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


# -------------------------------------------------------------------------------------------------- intervals


def perplexity_with(nlls: numpy.ndarray, tokens: int = 100, fingerprint: str = "f") -> Perplexity:
    mean = float(nlls.mean()) / tokens
    counts = [tokens] * len(nlls)
    return Perplexity(
        math.exp(mean), mean, None, tokens * len(nlls), len(nlls), "float32", fingerprint, {}, nlls.tolist(), counts
    )


def score_with(hits: numpy.ndarray, fingerprint: str = "f") -> TaskScore:
    return TaskScore({"acc": Accuracy.of([bool(hit) for hit in hits])}, "acc", 0.25, len(hits), fingerprint, {})


def test_pairing_sees_what_separate_errors_would_hide() -> None:
    """Windows differ by ten times the difference of the models; each window alone tells it."""
    generator = numpy.random.default_rng(0)
    windows = 300 + 50 * generator.standard_normal(40)
    worse = windows + 5 + generator.standard_normal(40)
    interval = perplexity_difference(perplexity_with(worse), perplexity_with(windows), samples=4000, confidence=0.95)
    assert interval.low > 0 and interval.is_certain
    assert interval.low < interval.difference < interval.high
    assert interval.difference == pytest.approx(math.exp(worse.mean() / 100) - math.exp(windows.mean() / 100))
    # By hand: the delta method on the mean difference, at the mean perplexity.
    spread = (worse - windows).std(ddof=1) / math.sqrt(40) / 100 * math.exp(windows.mean() / 100)
    assert interval.high - interval.low > 2 * 1.96 * spread


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = numpy.random.default_rng(1)
    covered = 0
    for seed in range(200):
        hits = generator.random((2, 150)) < numpy.array([[0.55], [0.5]])
        interval = accuracy_difference(
            {"t": score_with(hits[0])}, {"t": score_with(hits[1])}, samples=500, confidence=0.9, seed=seed
        )
        covered += interval.low <= 0.05 <= interval.high
    assert 0.84 <= covered / 200 <= 0.96


def test_tasks_count_the_same_and_are_resampled_apart() -> None:
    """Items of a large task must not be drawn into a small one: its own spread is all there is."""
    sure, other = numpy.ones(500), numpy.zeros(500)
    few = numpy.array([1, 0, 1, 1])
    interval = accuracy_difference(
        {"large": score_with(sure), "small": score_with(few)},
        {"large": score_with(other), "small": score_with(numpy.zeros(4))},
        samples=2000,
        confidence=0.95,
    )
    assert interval.difference == pytest.approx((1 + 0.75) / 2)
    # Resamples reach from one right answer in four to four; Student's quantile for four items over the normal one.
    wider = 3.182446 / 1.959964 * math.sqrt(4 / 3)
    assert interval.low == pytest.approx(0.875 - wider * (0.875 - (0.5 + 0.25 / 2)))
    assert interval.high == pytest.approx(0.875 + wider * (1.0 - 0.875))


@pytest.mark.parametrize(("num_windows", "plain"), [(5, 0.16), (8, 0.1)])
def test_equal_models_seldom_differ_for_certain_on_a_few_windows(
    num_windows: int, plain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def certain() -> float:
        generator = numpy.random.default_rng(num_windows)
        windows = perplexity_with(numpy.full(num_windows, 300.0))
        found = 0
        for seed in range(1000):
            own = perplexity_with(300 + generator.standard_normal(num_windows))
            found += perplexity_difference(own, windows, samples=300, confidence=0.95, seed=seed).is_certain
        return found / 1000

    assert certain() == pytest.approx(0.05, abs=0.02)
    monkeypatch.setattr("foldgpt.comparison.bootstrap._widening", lambda *_: 1.0)
    assert certain() == pytest.approx(plain, abs=0.03), "without widening"


def test_a_task_of_a_single_item_leaves_all_open() -> None:
    """How the accuracy on it would vary is not known, however sure the other task is."""
    right, wrong = numpy.ones(50), numpy.zeros(50)
    right[0] = 0
    own = {"many": score_with(right), "one": score_with(numpy.ones(1))}
    other = {"many": score_with(wrong), "one": score_with(numpy.zeros(1))}
    interval = accuracy_difference(own, other, samples=200, confidence=0.95)
    assert interval.low == interval.high == interval.difference == pytest.approx(0.99)
    assert not interval.is_certain


def test_the_same_model_differs_from_itself_by_nothing_and_seeds_decide_the_rest() -> None:
    nlls = numpy.random.default_rng(2).random(10) * 100
    same = perplexity_difference(perplexity_with(nlls), perplexity_with(nlls), samples=100, confidence=0.95)
    assert same == Interval(0.0, 0.0, 0.0) and not same.is_certain
    other = perplexity_with(nlls[::-1] + numpy.arange(10))
    draws = [
        perplexity_difference(perplexity_with(nlls), other, samples=100, confidence=0.95, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_single_window_proves_nothing() -> None:
    """All its resamples are itself, so the interval excludes zero whatever the difference."""
    own, other = (perplexity_with(numpy.array([nll])) for nll in (300.0, 301.0))
    interval = perplexity_difference(own, other, samples=100, confidence=0.95)
    assert interval.low == interval.high < 0 and not interval.is_certain


def test_what_cannot_be_paired_is_refused() -> None:
    nlls = numpy.ones(4)
    how: dict[str, Any] = {"samples": 100, "confidence": 0.95}
    with pytest.raises(MeasurementError, match="different windows"):
        perplexity_difference(perplexity_with(nlls), perplexity_with(nlls, fingerprint="g"), **how)
    with pytest.raises(MeasurementError, match="measure it again"):
        perplexity_difference(perplexity_with(nlls), replace(perplexity_with(nlls), window_nlls=None), **how)
    with pytest.raises(MeasurementError, match="different items"):
        accuracy_difference({"t": score_with(nlls)}, {"t": score_with(nlls, "g")}, **how)


# ----------------------------------------------------------------------------------------------- whole thing


@pytest.fixture
def recipe(inputs: tuple[Path, Path]) -> Recipe:
    rows = {"last": None, "bi": None, "bi + compensation": None, "bi + plain LoRA": None}
    return Recipe.from_dict(
        tiny_recipe(*inputs, recover=RECOVER, compare={"rows": rows, "bootstrap_samples": 200, "recovered": ["bi"]})
    )


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages that are really made, in order."""
    names: list[str] = []
    for stage in ("analysis", "plan", "folded", "recovered", "source_evaluation", "evaluation"):
        maker = getattr(pipeline, f"make_{stage}")

        def counted(*args: Any, _stage: str = stage, _maker: Any = maker, **kwargs: Any) -> Any:
            names.append(_stage)
            return _maker(*args, **kwargs)

        monkeypatch.setattr(pipeline, f"make_{stage}", counted)
    return names


def test_a_comparison_makes_nothing_twice_and_says_what_is_certain(
    recipe: Recipe, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe.changed(compare={"recovered": ["bi", "bi + plain LoRA"]})
    result = side_by_side.compare(wanted, tmp_path / "c")
    assert [method.title for method in result.methods] == [
        "source",
        "last",
        "bi",
        "bi + compensation",
        "bi + recovery",
        "bi + plain LoRA + recovery",
    ]
    counts = {stage: made.count(stage) for stage in set(made)}
    assert counts == {
        "analysis": 1,
        "source_evaluation": 1,
        # last, bi, bi + compensation: those with recovery take plan and model from the ones without.
        "plan": 3,
        "folded": 3,
        "recovered": 2,
        "evaluation": 5,
    }
    assert not (tmp_path / "c" / ".common").exists()
    by_title = {method.title: method for method in result.methods}
    for title, method in by_title.items():
        if method.run is None:
            continue
        folder = tmp_path / "c" / method.run
        done = pipeline.Evaluation.load(folder / "evaluation.json")
        assert done.folded.perplexity is not None
        assert method.perplexities == {"text.txt": done.folded.perplexity.value}
        assert (folder / "report.html").is_file()
        assert bool(method.perplexity_differences) == (title not in ("bi", "bi + recovery"))
        assert method.budget_gap == 0.0 and method.is_fair
    # The reference is that of the same recovery setting.
    difference = by_title["bi + plain LoRA + recovery"].perplexity_differences["text.txt"].difference
    plain, recovered = (by_title[t].perplexities["text.txt"] for t in ("bi + plain LoRA + recovery", "bi + recovery"))
    assert difference == pytest.approx(plain - recovered)
    assert by_title["bi"].seconds is not None and by_title["last"].seconds is not None
    assert (by_title["bi + recovery"].trained_tokens, by_title["bi"].trained_tokens) == (256, None)
    assert Comparison.load(tmp_path / "c") == result

    made.clear()
    monkeypatch.setattr(Workbench, "training_windows", lambda *_: made.append("windows"))
    again = side_by_side.compare(wanted, tmp_path / "c")
    assert made == []
    assert again.methods == result.methods


def test_rows_that_were_measured_elsewhere_are_named(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side_by_side.compare(recipe, tmp_path / "c")
    here = json.loads((tmp_path / "c" / "rows" / "bi" / "environment.json").read_text())
    shutil.rmtree(tmp_path / "c" / "rows" / "bi-recovered")
    elsewhere = {**here, "cpu": "another", "date": "2040-01-01"}
    monkeypatch.setattr(pipeline, "describe_environment", lambda: elsewhere)
    result = side_by_side.compare(recipe, tmp_path / "c")
    assert result.environment == elsewhere
    [line] = [line for line in result.protocol if line.startswith("Measured elsewhere")]
    assert f"bi ({here['cpu']}" in line and "bi + recovery (" not in line


def test_files_say_the_same(recipe: Recipe, tmp_path: Path) -> None:
    result = side_by_side.compare(recipe.changed(compare={"recovered": []}), tmp_path / "c")
    with (tmp_path / "c" / "comparison.csv").open(encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    assert [record["method"] for record in records] == [method.name for method in result.methods]
    assert [float(record["perplexity.text.txt"]) for record in records] == [
        method.perplexities["text.txt"] for method in result.methods
    ]
    markdown = (tmp_path / "c" / "comparison.md").read_text("utf-8")
    assert markdown == as_markdown(result)
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)]
    assert len(tables) == 2
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
    page = (tmp_path / "c" / "comparison.html").read_text("utf-8")
    assert '<a href="rows/bi-compensation/report.html">bi + compensation</a>' in page
    assert "default-src 'none'" in page and "http" not in page.replace("http-equiv", "")


def test_a_killed_comparison_goes_on_where_it_was(recipe: Recipe, tmp_path: Path, made: list[str]) -> None:
    script = "from foldgpt import pipeline, side_by_side\npipeline.make_recovered = kill\n"
    killed(recipe, tmp_path / "c", script + "side_by_side.compare(recipe, out)")
    assert not (tmp_path / "c" / "comparison.json").exists()
    side_by_side.compare(recipe, tmp_path / "c")
    assert made == ["recovered", "evaluation"]


def test_unequal_budgets_are_refused_before_anything_is_folded(recipe: Recipe, tmp_path: Path, made: list[str]) -> None:
    rows = {"bi": None, "less": {"select": {"method": "last", "remove": 1}}}
    unequal = recipe.changed(compare={"rows": rows, "recovered": []})
    with pytest.raises(UsageError, match=r"unequal budgets: .* less \+25\.0 %"):
        side_by_side.compare(unequal, tmp_path / "c")
    assert "folded" not in made
    flagged = unequal.changed(compare={"unequal_budgets": "flag"})
    result = side_by_side.compare(flagged, tmp_path / "c", overwrite=True)
    less = result.methods[-1]
    assert less.budget_gap == pytest.approx(0.25) and not less.is_fair
    assert verdict(less, Interval(-9.0, -10.0, -8.0), less_is_better=True) == "other budget"
    assert "less †" in (tmp_path / "c" / "comparison.md").read_text("utf-8")


def test_a_take_over_never_leaves_numbers_of_one_recipe_beside_another(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = recipe.changed(compare={"rows": {"bi": None, "last": None}, "recovered": []})
    out = tmp_path / "c"
    result = side_by_side.compare(before, out)
    other = before.changed(compare={"rows": {"bi": None, "random": None}}, evaluate={"context": 16})
    unequal = other.changed(compare={"rows": {"bi": None, "less": {"select": {"method": "last", "remove": 1}}}})

    def is_whole() -> bool:
        return Recipe.load(out / "recipe.yaml") == before and Comparison.load(out) == result

    # Refused before anything is made: the folder is what it was.
    with pytest.raises(FoldGPTError, match="nowhere"):
        side_by_side.compare(other.changed(evaluate={"texts": ["nowhere.txt"]}), out, overwrite=True)
    assert is_whole()
    with pytest.raises(UsageError, match="unequal budgets"):
        side_by_side.compare(unequal, out, overwrite=True)
    assert is_whole()
    with monkeypatch.context() as patch:
        patch.setattr(folder, "remove", _killed)
        with pytest.raises(KeyboardInterrupt):
            side_by_side.compare(other, out, overwrite=True)
    assert is_whole()
    # Stopped later: nothing is shown of it.
    with monkeypatch.context() as patch:
        patch.setattr(side_by_side, "make_up_plan", _killed)
        with pytest.raises(KeyboardInterrupt):
            side_by_side.compare(other, out, overwrite=True)
    assert Recipe.load(out / "recipe.yaml") == other and not list(out.glob("comparison.*"))
    side_by_side.compare(other, out)
    assert Recipe.load(out / "recipe.yaml") == other and list(out.glob("comparison.*"))


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_runs_and_comparisons_do_not_take_each_others_folders(recipe: Recipe, tmp_path: Path, made: list[str]) -> None:
    recipe = recipe.changed(compare={"rows": {"bi": None, "last": None}, "recovered": []}, recover={"num_tokens": 0})
    pipeline.run(recipe, tmp_path / "run")
    side_by_side.compare(recipe, tmp_path / "c")
    made.clear()
    other = recipe.changed(select={"remove": 1})
    with pytest.raises(ArtifactError, match="run holds a run, and a comparison is to be made there"):
        side_by_side.compare(other, tmp_path / "run", overwrite=True)
    with pytest.raises(ArtifactError, match="c holds a comparison, and a run is to be made there"):
        pipeline.run(other, tmp_path / "c", overwrite=True)
    # Its rows are one before it is finished.
    (tmp_path / "c" / "comparison.json").unlink()
    with pytest.raises(ArtifactError, match="c holds a comparison, and a run is to be made there"):
        pipeline.run(recipe, tmp_path / "c")
    assert made == []


def test_a_recovery_that_cannot_start_shows_before_anything_is_made(
    recipe: Recipe, tmp_path: Path, made: list[str]
) -> None:
    rows = {"bi": None, "large": {"recover": {"settings": {"batch_size": 9}}}}
    with pytest.raises(UsageError, match=r"row 'large \+ recovery': recover.num_tokens is 256, .* at least 288 tokens"):
        side_by_side.compare(recipe.changed(compare={"rows": rows, "recovered": list(rows)}), tmp_path / "c")
    # The text as well, whatever a comparison of before had enough of.
    own = recipe.changed(compare={"rows": {"bi": None}, "recovered": ["bi"]})
    result = side_by_side.compare(own, tmp_path / "c")
    made.clear()
    with pytest.raises(FoldGPTError, match="too short"):
        side_by_side.compare(own.changed(recover={"num_tokens": 10_000_000}), tmp_path / "c", overwrite=True)
    assert made == [] and Comparison.load(tmp_path / "c") == result


def test_rows_that_were_not_trained_alike_are_named_and_not_judged(recipe: Recipe, tmp_path: Path) -> None:
    rows = {
        "bi": None,
        "less": {"recover": {"settings": {"batch_size": 3}}},
        "other": {"recover": {"settings": {"kl": 0.0, "lm": 1.0}}},
    }
    changed = recipe.changed(compare={"rows": rows, "recovered": list(rows)})
    result = side_by_side.compare(changed, tmp_path / "c")
    by_title = {method.title: method for method in result.methods}
    reference, less, other = (by_title[f"{name} + recovery"] for name in rows)
    # Eight windows of 32 tokens: with three a step, two are left over.
    assert [method.trained_tokens for method in (reference, less, other)] == [256, 192, 256]
    assert [method.is_trained_alike for method in (reference, less, other)] == [True, False, True]
    certain = Interval(-9.0, -10.0, -8.0)
    assert verdict(less, certain, less_is_better=True) == "unequal training"
    # Another loss is what the row is for; it saw the same text.
    assert verdict(other, certain, less_is_better=True) == "better"
    [note] = [note for note in notes_of(result) if note.startswith("Recovery: ")]
    assert "the same" not in note
    assert "less + recovery: 192 (all that fill whole steps)" in note
    assert "Neither better nor worse is said of less + recovery. With settings other than bi's: " in note
    assert "less + recovery (batch_size); other + recovery (kl, lm)." in note
    assert "unequal training" in (tmp_path / "c" / "comparison.md").read_text("utf-8")
    assert Comparison.load(tmp_path / "c") == result


def test_what_ended_a_training_is_read_from_its_record(tmp_path: Path) -> None:
    record = {**recovery(), "num_tokens": 995, "ended": "time", "settings": {"kl": 1.0, "minutes": 0.5}}
    write_json(tmp_path / "recovery.json", record)
    short = Training.load(tmp_path)
    whole = Training(1000, "tokens", {"kl": 1.0, "minutes": None})
    assert (short.num_tokens, short.ended, short.differing_from(whole)) == (995, "time", ["minutes"])
    # What does not fill a last step makes no difference, a twentieth does.
    assert short.is_as_long_as(whole) and not replace(short, num_tokens=950).is_as_long_as(whole)
    for damaged in ({**record, "settings": 3}, {**record, "ended": "soon"}, {"num_tokens": 3}, []):
        write_json(tmp_path / "recovery.json", damaged)
        with pytest.raises(ArtifactError, match="not the record of a recovery"):
            Training.load(tmp_path)


def test_a_comparison_that_kept_no_account_of_trainings_claims_no_sameness(tmp_path: Path) -> None:
    old = comparison().to_dict()
    for method in old["methods"]:
        for name in ("trained_tokens", "training_ended", "own_settings", "is_trained_alike"):
            del method[name]
    write_json(tmp_path / "comparison.json", old)
    [note] = [note for note in notes_of(Comparison.load(tmp_path)) if note.startswith("Recovery: ")]
    assert "up to 1,000,000 tokens" in note and "the same" not in note
    [note] = [note for note in notes_of(comparison()) if note.startswith("Recovery: ")]
    assert "the same 1,000,000 tokens" in note and "settings" not in note


def test_an_error_says_which_row_it_is_of(recipe: Recipe, tmp_path: Path) -> None:
    rows = {"bi": None, "greedy at will": {"select": {"method": "greedy", "options": {"steps": 3}}}}
    with pytest.raises(UsageError, match=r"row 'greedy at will': .*no option 'steps'"):
        side_by_side.compare(recipe.changed(compare={"rows": rows, "recovered": []}), tmp_path / "c")
    rows = {"bi": None, "mine": {"select": {"method": "greedie"}}}
    with pytest.raises(UsageError, match=r"row 'mine': unknown selector 'greedie'.*'greedy'"):
        side_by_side.compare(recipe.changed(compare={"rows": rows, "recovered": []}), tmp_path / "d")


def test_verdicts(recipe: Recipe, tmp_path: Path) -> None:
    result = side_by_side.compare(recipe.changed(compare={"recovered": []}), tmp_path / "c")
    method = result.methods[1]
    assert verdict(method, Interval(-2, -3, -1), less_is_better=True) == "better"
    assert verdict(method, Interval(-2, -3, -1), less_is_better=False) == "worse"
    assert verdict(method, Interval(2, -1, 3), less_is_better=True) == "unclear"
    with pytest.raises(ArtifactError, match="not a comparison"):
        write_text(tmp_path / "x.json", "{}")
        Comparison.load(tmp_path / "x.json")
    written = write_comparison(result, tmp_path / "elsewhere")
    assert Comparison.load(written["json"]) == result


@pytest.mark.parametrize("columns", [None, 80])
def test_tables_are_printed_whole_with_the_names_of_the_rows(
    columns: int | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redirected, and in a terminal of 80 columns. Brackets and colons are markup to rich, unless told otherwise."""
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
    names = ["source", "bi", "gates [kl]", "gates [lm]", "last [/old]", "gates :cat:", "bi"]
    shown = comparison()
    methods = [replace(method, name=name) for method, name in zip(shown.methods, names, strict=True)]
    print_comparison(replace(shown, methods=methods), as_json=False)
    tables = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines() if line[0] in "┃│"]
    for part in (
        *names,
        "parameters",
        "above chance",
        "134.0 M",
        "41,234",
        "+41,000 [+38,000, +44,000] worse",
        "1.22×",
    ):
        assert any(f" {part} " in line for line in tables), part
    assert columns is None or max(map(len, tables)) <= columns


def test_on_the_command_line(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    recipe.changed(compare={"rows": {"bi": None, "last": None}, "recovered": []}).save(path)
    arguments = ["compare", str(path), "--out", str(tmp_path / "c"), "--quiet", "--recover-tokens", "0"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    for part in ("against bi", "perplexity", "comparison.html", "resamples"):
        assert part in shown.output
    as_json = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(as_json.stdout) == json.loads((tmp_path / "c" / "comparison.json").read_text("utf-8"))
    again = CliRunner().invoke(app, ["show", str(tmp_path / "c")])
    assert again.exit_code == 0 and again.stdout in shown.stdout and "against bi" in again.stdout
    again = CliRunner().invoke(app, ["show", str(tmp_path / "c"), "--json"])
    assert again.stdout == as_json.stdout
    page = tmp_path / "c" / "comparison.html"
    before = page.read_text("utf-8")
    page.unlink()
    built = CliRunner().invoke(app, ["report", str(tmp_path / "c"), "--quiet"])
    assert built.stdout.split() == [str(page)] and page.read_text("utf-8") == before
    wrong = CliRunner().invoke(app, ["compare", str(path), "--out", str(tmp_path / "c"), "--remove", "1", "--quiet"])
    assert wrong.exit_code == 1 and "--overwrite" in wrong.output
