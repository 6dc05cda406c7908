"""Methods side by side: nothing is made twice, nothing of another comparison is left, and what is shown is so."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from comparison_inputs import comparison
from foldgpt import pipeline, side_by_side
from foldgpt.artifacts import write_json, write_text
from foldgpt.cli import app
from foldgpt.cli.printing import print_comparison
from foldgpt.comparison import (
    Comparison,
    Training,
    method_table,
    notes_of,
    verdict,
)
from foldgpt.errors import ArtifactError, FoldGPTError, UsageError
from foldgpt.evaluation import Interval
from foldgpt.recipe import Recipe
from foldgpt.report import as_markdown, write_comparison
from foldgpt.report.rows import rows_of
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
        assert (folder / "report.html").is_file() and not (folder / "before_recovery.json").exists()
        assert bool(method.perplexity_differences) == (title not in ("bi", "bi + recovery"))
        assert method.budget_gap == 0.0 and method.is_fair
    # The reference is that of the same recovery setting.
    difference = by_title["bi + plain LoRA + recovery"].perplexity_differences["text.txt"].difference
    plain, recovered = (by_title[t].perplexities["text.txt"] for t in ("bi + plain LoRA + recovery", "bi + recovery"))
    assert difference == pytest.approx(plain - recovered)
    assert by_title["bi"].seconds is not None and by_title["last"].seconds is not None
    assert (by_title["bi + recovery"].trained_tokens, by_title["bi"].trained_tokens) == (256, None)
    assert Comparison.load(tmp_path / "c") == result
    assert {"comparison.agreement.png", "comparison.agreement.svg"} <= {p.name for p in (tmp_path / "c").iterdir()}
    said = [line for line in result.protocol if "also used" in line]
    assert said == ["text.txt was also used for calibration and training: its perplexity is no test of these models."]

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
    assert all(record["protocol"].startswith("Perplexity in float32: ") for record in records)
    assert [record["method"] for record in records] == [method.name for method in result.methods]
    assert [float(record["perplexity.text.txt"]) for record in records] == [
        method.perplexities["text.txt"] for method in result.methods
    ]
    markdown = (tmp_path / "c" / "comparison.md").read_text("utf-8")
    assert markdown == as_markdown(result)
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)]
    assert len(tables) == 3
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


def test_draws_of_random_are_summed_up_by_mean_and_spread() -> None:
    made = comparison()
    first = next(method for method in made.methods if method.name == "random")
    values = [(100.0, 0.30), (200.0, 0.36), (300.0, 0.42)]
    draws = [
        replace(
            first,
            name=name,
            perplexities={"wiki.test.raw": perplexity},
            figures={**first.figures, "task_average": accuracy},
        )
        for name, (perplexity, accuracy) in zip(("random", "random, seed 1", "random, seed 2"), values, strict=True)
    ]
    others = [method for method in made.methods if method.name != "random"]
    table = rows_of(method_table(replace(made, methods=[others[0], *draws, *others[1:]])))
    assert table is not None
    names = [row[0] for row in table.cells]
    line = table.cells[names.index("  mean of 3 ± spread")]
    assert names[names.index("  mean of 3 ± spread") - 1] == "random, seed 2"
    assert "200 ± 100" in line and "36.0 ± 6.0 %" in line
    # A single draw has no spread.
    single = rows_of(method_table(made))
    assert single is not None and not any("spread" in row[0] for row in single.cells)


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
