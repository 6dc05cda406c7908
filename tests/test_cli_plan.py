"""The command line: `plan`, its selectors, its groups, and its progress where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli_case import CALIBRATION, foldgpt
from foldgpt import planning
from foldgpt.analysis import sweep
from foldgpt.artifacts import alone
from foldgpt.cli.requests import select_of
from foldgpt.history import history_of
from foldgpt.plan import WITHOUT_TEXT, FoldPlan
from foldgpt.recipe import Recipe
from foldgpt.report.headline import headlines
from foldgpt.selection import ANALYSIS_FREE, MEASURED
from foldgpt.selection.gating.score_function import ScoreFunction


def test_plan_measures_by_itself_and_knows_its_groups(model: Path, text: Path, tmp_path: Path) -> None:
    made = foldgpt(
        *("plan", model, "--text", text, *CALIBRATION, "--select", "angular", "--remove-ratio", 0.34, "-q"),
        *("--share", "adjacent", "--group-size", 2, "--donor", "last", "--out", tmp_path / "plan.json"),
    )
    assert made.exit_code == 0, made.output
    plan = FoldPlan.load(tmp_path / "plan.json")
    first, last = plan.removed
    assert last == first + 1
    assert [group.donor for group in plan.groups] == ["last", "last"]


def test_a_plan_that_is_fitted_finds_its_text_from_elsewhere_whatever_chose_it(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(text.parent)
    asked = ("plan", model, "--text", text.name, *CALIBRATION, "--select", "last", "-q")
    for name, flags in {
        "compensated": ("--remove", 2),
        "fitted": ("--remove", 0, "--share", "adjacent", "--group-size", 2, "--fit"),
        "neither": ("--remove", 1, "--compensate", "none"),
    }.items():
        made = foldgpt(*asked, *flags, "--out", tmp_path / f"{name}.json")
        assert made.exit_code == 0, made.output
    assert "calibration" not in FoldPlan.load(tmp_path / "neither.json").origin
    monkeypatch.chdir(elsewhere)
    for name in ("compensated", "fitted"):
        plan = FoldPlan.load(tmp_path / f"{name}.json")
        assert plan.origin["calibration"]["specs"] == [str(text)]
        folded = foldgpt("fold", model, "--plan", tmp_path / f"{name}.json", "--out", tmp_path / name, "-q")
        assert folded.exit_code == 0, folded.output
    # It was not chosen on that text.
    shown = foldgpt("show", tmp_path / "compensated.json").stdout
    assert "chosen by last, seed 0" in shown and "calibrated on" not in shown
    assert set(WITHOUT_TEXT) == ANALYSIS_FREE - MEASURED


@pytest.mark.parametrize("how", [(), ("--share", "adjacent", "--start", "zero")])
def test_of_a_plan_whose_cut_was_edited_nothing_is_claimed_that_was_measured(
    how: tuple[str, ...], model: Path, text: Path, tmp_path: Path
) -> None:
    out, claims = tmp_path / "plan.json", ("chosen by loo", "nats per token")
    made = foldgpt(
        *("plan", model, "--text", text, *CALIBRATION, "--select", "loo", "--remove", 2, *how, "--out", out, "-q")
    )
    assert made.exit_code == 0, made.output
    plan, shown = FoldPlan.load(out), foldgpt("show", out).stdout
    assert not plan.was_edited and "edited" not in shown and all(claim in shown for claim in claims)
    assert "chosen by loo" in headlines(plan, None)[-1].details
    # Of those that go one comes back, whether it was removed or starts at zero.
    value = plan.to_json_dict()
    value["removed"], value["groups"] = list(plan.at_start.removed[:1]), []
    value["kept"] = [block for block in range(plan.source.num_blocks) if block not in value["removed"]]
    FoldPlan.from_json_dict(value).save(out)
    edited, shown = FoldPlan.load(out), foldgpt("show", out).stdout
    assert edited.was_edited and "edited since it was chosen by loo\n" in shown and "nats per token" not in shown
    assert "edited since it was chosen by loo" in headlines(edited, None)[-1].details


def test_two_processes_do_not_make_one_plan(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "plan.json"
    arguments = ("plan", model, "--text", text, *CALIBRATION, "--select", "last", "--remove", 1, "--out", out, "-q")
    with alone(out):
        second = foldgpt(*arguments)
    assert second.exit_code == 1 and f"another process is writing {out}" in second.stderr
    assert foldgpt(*arguments).exit_code == 0
    assert [path.name for path in out.parent.iterdir()] == ["plan.json"]
    assert "already exists" in foldgpt(*arguments).stderr
    # What is refused leaves no folder of its own.
    wrong = foldgpt("plan", model, "--text", text, "--remove", 9, "--out", tmp_path / "other" / "plan.json")
    assert wrong.exit_code == 2 and not (tmp_path / "other").exists()


def test_a_plan_is_not_put_where_it_would_pass_for_that_of_a_model(model: Path, text: Path) -> None:
    put = foldgpt("plan", model, "--text", text, "--select", "last", "--remove", 1, "--out", model / "plan.json")
    assert put.exit_code != 0 and "would be taken for the plan that the model there was folded by" in put.stderr
    assert not (model / "plan.json").exists()


@pytest.mark.parametrize("how", [("adjacent",), ("adjacent", "--start", "zero")])
def test_a_rank_that_no_matrix_has_is_refused_before_the_search(
    how: tuple[str, ...], model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning.selecting, "select", lambda *_: pytest.fail("searched"))
    made = foldgpt(
        *("plan", model, "--text", text, *CALIBRATION, "--select", "last", "--remove", 1, "--share", *how),
        *("--rank", 1000, "--out", tmp_path / "plan.json"),
    )
    assert made.exit_code == 2, made.output
    assert "--rank is 1000, and the smallest matrix that is shared has 16 rows or columns" in made.stderr


def test_an_analysis_without_its_protocol_says_so_and_a_wrong_one_is_named(
    model: Path, text: Path, tmp_path: Path
) -> None:
    assert foldgpt("analyze", model, "--text", text, *CALIBRATION, "--out", tmp_path, "-q").exit_code == 0
    file = tmp_path / "analysis.json"
    values = json.loads(file.read_text())
    values["calibration"]["protocol"] = {}
    file.write_text(json.dumps(values))
    arguments = ("plan", model, "--text", text, *CALIBRATION, "--select", "bi", "--remove", 1, "--analysis", file)
    made = foldgpt(*arguments, "--out", tmp_path / "plan.json")
    assert made.exit_code == 0, made.output
    assert "the analysis does not say which text it was made on" in made.stderr
    file.write_text(json.dumps({**values, "bi": values["bi"][:-1]}))
    wrong = foldgpt(*arguments, "--out", tmp_path / "other.json")
    assert wrong.exit_code != 0 and str(file) in wrong.stderr


def test_a_stopped_plan_goes_on_beside_the_file(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("plan", model, "--text", text, *CALIBRATION, "--select", "gates", "--remove", 2, "-q")
    arguments += ("--compensate", "none", "--out", tmp_path / "plan.json")
    with monkeypatch.context() as patched:
        patched.setattr(ScoreFunction, "step", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert foldgpt(*arguments).exit_code == 130
    (left,) = tmp_path.glob(".plan.json.*.search")
    kept = left.read_bytes()
    # Nothing of it is lost where somebody asks for another plan in between.
    with monkeypatch.context() as patched:
        patched.setattr(ScoreFunction, "step", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        other = foldgpt(*(argument for argument in arguments if argument != "-q"), "--seed", 5)
    assert other.exit_code == 130
    assert f"{left.name}: begun for {tmp_path / 'plan.json'} with other flags" in other.stderr
    assert left.read_bytes() == kept and len(list(tmp_path.glob(".plan.json.*.search"))) == 2
    # How much memory there is decides nothing.
    made = foldgpt(*arguments, "--max-memory-gb", 3)
    assert made.exit_code == 0, made.output
    assert not left.exists() and (tmp_path / "plan.json").is_file() and len(list(tmp_path.iterdir())) == 2


def test_a_plan_that_failed_behind_its_analysis_does_not_sweep_again(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("plan", model, "--text", text, *CALIBRATION, "--select", "bi", "--remove", 2, "-q")
    arguments += ("--compensate", "none", "--out", tmp_path / "plan.json")
    monkeypatch.setattr(sweep, "_CHECKPOINT_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(planning.selecting, "select", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert foldgpt(*arguments).exit_code == 130
    (left,) = tmp_path.iterdir()
    assert left.match(".plan.json.*.analysis")
    # What is removed in the end is nothing to it.
    changed = [3 if argument == 2 else argument for argument in arguments]
    monkeypatch.setattr(sweep, "_measure_", lambda *_: pytest.fail("it sweeps again"))
    assert foldgpt(*changed, "--figures", tmp_path / "figures").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "figures"}
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"redundancy", "similarity", "plan"}


def test_plan_keeps_positions_that_start_at_zero(model: Path, text: Path, tmp_path: Path) -> None:
    made = foldgpt(
        *("plan", model, "--text", text, *CALIBRATION, "--select", "last", "--remove", 1, "--compensate", "none"),
        *("--share", "adjacent", "--start", "zero", "--rank", 2, "--out", tmp_path / "plan.json", "-q"),
    )
    assert made.exit_code == 0, made.output
    plan = FoldPlan.load(tmp_path / "plan.json")
    (group,) = plan.groups
    assert group.started_at_zero == plan.at_start.removed == plan.kept[-1:]
    assert group.ranks == 2 and group.private == ("norms", "scales")


def test_plan_finds_the_best_for_a_size_and_fold_keeps_to_it(model: Path, text: Path, tmp_path: Path) -> None:
    made = foldgpt(
        *("plan", model, "--text", text, *CALIBRATION, "--select", "loo", "--compensate", "none"),
        *("--share", "auto", "--size", "0.6", "--out", tmp_path / "plan.json"),
    )
    assert made.exit_code == 0, made.output
    assert "remove 3" in made.output and "adjacent pairs" in made.output
    plan = FoldPlan.load(tmp_path / "plan.json")
    candidates = plan.origin["candidates"]
    best = min(candidates, key=lambda candidate: candidate["kl"])
    assert plan.origin["chosen"] == best["name"] and plan.removed == tuple(best["removed"])
    # A winner with groups was measured as fitted: without the text in its plan, fold would not fit it.
    assert [list(group.blocks) for group in plan.groups] == [group["blocks"] for group in best["groups"]] != []
    assert plan.fitting is not None
    assert (plan.fitting.texts, plan.fitting.context, plan.fitting.num_tokens) == ((str(text),), 32, 256)
    folded = foldgpt("fold", model, "--plan", tmp_path / "plan.json", "--out", tmp_path / "folded", "-q", "--json")
    assert folded.exit_code == 0, folded.output
    assert json.loads(folded.stdout)["num_parameters"] == best["parameters"]
    fitted = json.loads((tmp_path / "folded" / "sharing.json").read_text())
    assert fitted["kl"] == pytest.approx(best["kl"], rel=1e-3)


@pytest.mark.parametrize("cut", [("--remove", 2), ("--target", "parameters=80%")])
def test_selectors_that_look_at_nothing_read_no_text(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: tuple[Any, ...]
) -> None:
    """And it is said that flags which speak of one change nothing."""
    monkeypatch.setattr("foldgpt.workbench.calibration_windows", lambda *_, **__: pytest.fail("read a text"))
    asked = ("plan", model, "--select", "last", *cut, "--compensate", "none", "--out", tmp_path / "p", "-q")
    made = foldgpt(*asked)
    assert made.exit_code == 0, made.output
    assert FoldPlan.load(tmp_path / "p").removed[-1] == 5
    made = foldgpt(*asked[:-1], "--overwrite", "--text", "no-such.txt", "--tokens", "2k")
    assert made.exit_code == 0
    assert "no calibration text is read, so --text and --tokens change nothing" in " ".join(made.stderr.split())


@pytest.mark.parametrize(
    "reads",
    [("--target", "flops=80%"), ("--remove", 2, "--share", "adjacent", "--donor", "best")],
    ids=["flops", "donors"],
)
def test_where_text_is_read_in_any_case_what_selectors_chose_that_look_at_none_is_measured(
    model: Path, text: Path, tmp_path: Path, reads: tuple[Any, ...]
) -> None:
    asked = ("plan", model, "--text", text, *CALIBRATION, "--select", "last", "--compensate", "none", *reads)
    asked = (*asked, "--search-tokens", 128)
    made = foldgpt(*asked, "--out", tmp_path / "plan.json")
    assert made.exit_code == 0, made.output
    plan = FoldPlan.load(tmp_path / "plan.json")
    assert plan.origin["report"]["cost"] > 0
    # It is said on which text.
    assert plan.origin["calibration"]["specs"] == [str(text)]
    words = " ".join(made.output.split())
    assert "; measured on " in words and "8 windows of 32 tokens" in words and "on 128 calibration tokens" in words


def test_search_tokens_are_also_for_the_best_donors(model: Path, text: Path, tmp_path: Path) -> None:
    made = foldgpt(
        *("plan", model, "--text", text, *CALIBRATION, "--select", "last", "--remove", 1, "--compensate", "none"),
        *("--share", "adjacent", "--donor", "best", "--search-tokens", 64, "--out", tmp_path / "plan.json", "-q"),
    )
    assert made.exit_code == 0, made.output


def test_a_plan_from_an_analysis_fits_on_the_text_of_the_analysis(model: Path, text: Path, tmp_path: Path) -> None:
    """With the defaults of the flags it would be fitted on another text than the blocks were ranked on."""
    analysis = tmp_path / "analysis"
    made = foldgpt("analyze", model, "--text", text, *CALIBRATION, "--seed", 3, "--out", analysis, "-q")
    assert made.exit_code == 0, made.output
    arguments = ("plan", model, "--analysis", analysis, "--select", "bi", "--remove", 2)
    made = foldgpt(*arguments, "--out", tmp_path / "plan.json")
    assert made.exit_code == 0, made.output
    plan = FoldPlan.load(tmp_path / "plan.json")
    fitted = plan.compensation
    assert fitted is not None
    assert (fitted.texts, fitted.context, fitted.num_tokens, fitted.seed) == ((str(text),), 32, 256, 3)
    assert "what is fitted" not in made.stderr and "calibrated on text.txt, 8 windows of 32 tokens" in made.stdout
    # What is said of it holds, and is told apart.
    made = foldgpt(*arguments, "--tokens", 128, "--out", tmp_path / "other.json")
    fitted = FoldPlan.load(tmp_path / "other.json").compensation
    assert fitted is not None and (fitted.num_tokens, fitted.context) == (128, 32)
    assert "what is fitted is fitted on 128 tokens of" in " ".join(made.stderr.split())


def test_a_plan_tells_the_text_it_is_fitted_on_from_that_of_its_analysis(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis, other = tmp_path / "analysis", tmp_path / "other.txt"
    other.write_text(text.read_text().upper())
    assert foldgpt("analyze", model, "--text", text, *CALIBRATION, "--out", analysis, "-q").exit_code == 0
    monkeypatch.chdir(tmp_path)
    asked = ("plan", model, "--analysis", analysis, "--select", "bi", "--remove", 2, "--text", "other.txt")
    made = foldgpt(*asked, "--out", tmp_path / "plan.json")
    assert made.exit_code == 0, made.output
    words = " ".join(made.stdout.split())
    assert "calibrated on text.txt" in words and "calibration tokens of other.txt" in words
    plan = FoldPlan.load(tmp_path / "plan.json")
    assert plan.origin["fitted_on"]["specs"] == [str(other)] and plan.origin["calibration"]["specs"] == [str(text)]
    # From elsewhere it is found, and it is known that it was used.
    monkeypatch.chdir(model)
    made = foldgpt("fold", model, "--plan", tmp_path / "plan.json", "--out", tmp_path / "folded", "-q")
    assert made.exit_code == 0, made.output
    assert set(history_of(tmp_path / "folded").uses["calibration"]) >= {str(text), str(other)}


def test_an_interruption_says_how_it_goes_on(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning.selecting, "select", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    arguments = ("--text", text, *CALIBRATION, "--select", "last", "--remove", 1, "-q", "--out", tmp_path / "plan.json")
    stopped = foldgpt("plan", model, *arguments)
    assert stopped.exit_code == 130
    assert stopped.stderr == "stopped. The same command goes on from the last checkpoint, if there is one.\n"


def test_a_search_is_told_what_to_measure_and_how_long(model: Path, text: Path, tmp_path: Path) -> None:
    made = foldgpt(
        *("plan", model, "--text", text, *CALIBRATION, "--select", "gates", "--remove", 1, "--objective", "lm", "-q"),
        *("--sublayers", "--option", "steps=2", "--option", "refine=false", "--compensate", "none"),
        *("--out", tmp_path / "plan.json", "--figures", tmp_path / "figures"),
    )
    assert made.exit_code == 0, made.output
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"gates", "plan"}
    plan = FoldPlan.load(tmp_path / "plan.json")
    report = plan.origin["report"]
    assert report["objective"] == "lm" and len(report["trace"]) <= 3
    assert len(report["trace"][0]["keep"]) == 12  # attention and MLP of six blocks
    assert "language-modelling loss" in made.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--option", "efort=1"), "the selector 'gates' has no option 'efort'. Did you mean 'effort'?"),
        (("--option", "effort"), "--option takes NAME=VALUE, not 'effort'"),
        (("--objective", "loss"), "--objective: Input should be 'kl' or 'lm' (got 'loss')"),
        (("--select", "bi", "--sublayers"), "bi"),
        (
            ("--search-tokens", "16"),
            "--search-tokens is 16, and a window has 32 (--context): give at least 32",
        ),
        (("--select", "bi", "--objective", "kl"), "--objective with the selector 'bi', for which there is nothing to"),
        (("--select", "taylor", "--objective", "lm"), "leave it out, or --select one of gates, greedy, loo"),
    ],
)
def test_what_a_search_cannot_do_is_refused(
    model: Path, text: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "plan.json"
    made = foldgpt("plan", model, "--text", text, *CALIBRATION, "--remove", 1, "--out", out, *flags)
    assert made.exit_code == 2 and message in made.stderr and not out.exists()


def test_a_set_of_ones_own_is_planned_and_measured(model: Path, text: Path, tmp_path: Path) -> None:
    asked = ("plan", model, "--text", text, *CALIBRATION, "--select", "blocks", "--out", tmp_path / "plan.json")
    made = foldgpt(*asked, "--option", "blocks=2-3")
    assert made.exit_code == 0, made.output
    plan = FoldPlan.load(tmp_path / "plan.json")
    assert plan.removed == (2, 3) and plan.origin["report"]["cost"] > 0 and "chosen by blocks" in made.stdout
    wrong = foldgpt(*asked, "--overwrite", "--option", "blocks=2-3", "--remove", 1)
    assert wrong.exit_code == 2 and "are 2, and 1 are to be removed" in wrong.stderr


def test_an_option_changes_a_single_one_of_a_recipe() -> None:
    base = Recipe.from_dict({"model": "m", "select": {"remove": 1, "options": {"estimator": "concrete", "steps": 50}}})
    asked = dict.fromkeys(("remove", "remove_ratio", "target", "search_tokens", "copies", "objective", "sublayers"))
    for method, expected in (
        (None, {"estimator": "concrete", "steps": 50, "effort": 1}),
        ("gates", {"estimator": "concrete", "steps": 50, "effort": 1}),
        ("random", {"effort": 1}),
    ):
        assert select_of(method=method, **asked, options=["effort=1"], over=base)["options"] == expected


def test_what_a_selector_was_given_is_in_the_plan(model: Path, text: Path, tmp_path: Path) -> None:
    def planned(name: str, *flags: object) -> tuple[FoldPlan, str]:
        asked = ("plan", model, "--select", "random", "--remove", 2, "--text", text, *CALIBRATION)
        made = foldgpt(*asked, *flags, "--out", tmp_path / name)
        assert made.exit_code == 0, made.output
        return FoldPlan.load(tmp_path / name), made.stdout

    (option, shown), (flag, _) = planned("a.json", "--option", "seed=5"), planned("b.json", "--seed", 5)
    assert option.removed == flag.removed and "options" not in flag.origin
    assert option.origin["options"] == {"seed": 5} and "chosen by random, seed 5" in shown


def test_sharing_by_itself_says_nothing_of_a_search_and_what_its_fit_came_to(
    model: Path, text: Path, tmp_path: Path
) -> None:
    asked = ("plan", model, "--text", text, *CALIBRATION, "--remove", 0, "--share", "adjacent", "--fit")
    made = foldgpt(*asked, "--donor", "least_squares", "--out", tmp_path / "plan.json")
    assert made.exit_code == 0, made.output
    assert "shared weights and private terms: fitted" in made.stdout
    assert "chosen by" not in made.stdout and "KL" not in made.stdout
    made = foldgpt("fold", model, "--plan", tmp_path / "plan.json", "--out", tmp_path / "folded", "-q")
    assert made.exit_code == 0, made.output
    record = json.loads((tmp_path / "folded" / "sharing.json").read_text())
    line = f"of {len(record['members'])} positions kept; KL to the source {record['kl']:.4f} nats per token"
    assert line in made.stdout and line in foldgpt("show", tmp_path / "folded").stdout
    for damaged in ({}, {**record, "kl": "x"}, {**record, "num_held_out": None}, {**record, "members": [{}]}):
        (tmp_path / "folded" / "sharing.json").write_text(json.dumps(damaged))
        shown = foldgpt("show", tmp_path / "folded")
        assert shown.exit_code == 1 and "is not the record of a fit of what is shared" in shown.stderr


def test_groups_that_do_not_exist_are_said(model: Path, text: Path, tmp_path: Path) -> None:
    asked = ("plan", model, "--text", text, *CALIBRATION, "--share", "adjacent", "--group-size", 6)
    asked += ("--select", "last", "--out", tmp_path / "plan.json")
    # All six share; without one there are five.
    assert foldgpt(*asked, "--remove", 0, "-q").exit_code == 0
    made = foldgpt(*asked, "--remove", 1, "--overwrite")
    assert made.exit_code == 0 and "nothing is shared: no 6 neighbours of one kind" in made.stderr
    made = foldgpt(*asked[:-4], "--group-size", 7, *asked[-4:], "--remove", 0, "--overwrite")
    assert made.exit_code == 2 and "(--group-size), and nothing is removed" in made.stderr


def test_a_text_of_a_plan_is_found_where_it_was(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.txt").write_bytes(text.read_bytes())
    monkeypatch.chdir(tmp_path / "here")
    made = foldgpt("plan", model, "--text", "mine.txt", *CALIBRATION, "--select", "greedy", "--remove", 1, "-q")
    assert made.exit_code == 0 and FoldPlan.load("plan.json").compensation is not None, made.output
    monkeypatch.chdir(tmp_path)
    asked = ("fold", model, "--plan", "here", "--out", "folded", "-q")
    made = foldgpt(*asked)
    assert made.exit_code == 0, made.output
    # Another text of that name here is not taken for it.
    (tmp_path / "mine.txt").write_text("other words " * 4000)
    made = foldgpt(*asked, "--overwrite")
    assert made.exit_code == 2 and "(mine.txt) is not what it was" in made.stderr
