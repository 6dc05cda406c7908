"""The command line: what it refuses, in one clear message, and leaves as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cli_case import CALIBRATION, foldgpt
from foldgpt import pipeline
from foldgpt.plan import FoldPlan
from foldgpt.recipe import Recipe
from run_inputs import tiny_recipe, tiny_source


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["analyze", "no-such-folder/model", "--out", "OUT"], 1, "no-such-folder/model"),
        (["analyze", "demo:smollm", "--out", "OUT"], 2, "Did you mean 'smollm2-135m'?"),
        (["analyze", "MODEL", "--text", "missing.txt", "--out", "OUT"], 1, "no text file matches missing.txt"),
        (["analyze", "MODEL", "--text", "TEXT", "--dtype", "float8", "--out", "OUT"], 2, "Did you mean 'float32'?"),
        (
            ["analyze", "MODEL", "--text", "TEXT", "--tokens", "64", "--context", "999", "--out", "OUT"],
            2,
            "error: --tokens is 64, which does not fill one window of 999 tokens (--context) for each of 1 text",
        ),
        (
            ["plan", "MODEL", "--select", "best", "--remove", "2", "--text", "TEXT", "--out", "OUT"],
            2,
            "unknown selector",
        ),
        (["plan", "MODEL", "--select", "last", "--remove", "6", "--out", "OUT"], 2, "of which one must stay"),
        (
            ["plan", "MODEL", "--remove", "1", "--remove-ratio", "0.1", "--out", "OUT"],
            2,
            "give --remove or --remove-ratio, not both",
        ),
        (
            ["plan", "MODEL", "--out", "OUT"],
            2,
            "nothing to be shared: say how many blocks (--remove, --remove-ratio, --target)",
        ),
        (
            ["plan", "MODEL", "--analysis", "run", "--remove", "2", "--out", "OUT"],
            2,
            "--analysis with the selector 'gates', which reads none: leave it out, or --select one of angular, bi",
        ),
        (
            [
                *("plan", "MODEL", "--search-tokens", "64", "--select", "last", "--remove", "2"),
                *("--compensate", "none", "--out", "OUT"),
            ],
            2,
            "--search-tokens with the selector 'last', which measures nothing on them",
        ),
        (
            [
                *("plan", "MODEL", "--select", "last", "--remove", "0", "--share", "adjacent"),
                *("--search-tokens", "64", "--out", "OUT"),
            ],
            2,
            "--search-tokens with the selector 'last', which measures nothing on them",
        ),
        (
            ["plan", "MODEL", "--copies", "0.1", "--select", "last", "--remove", "2", "--compensate", "none"],
            2,
            "--copies with the selector 'last', which measures nothing on them",
        ),
        (
            ["plan", "MODEL", "--copies", "0.75", "--remove", "2", "--out", "OUT"],
            2,
            "--copies: Input should be less than or equal to 0.5",
        ),
        (
            [
                *("run", "--model", "MODEL", "--select", "bi", "--remove", "2"),
                *("--tokens", "256", "--search-tokens", "257", "--out", "OUT"),
            ],
            2,
            "--search-tokens is 257, and the calibration text has 256",
        ),
        (
            ["plan", "MODEL", "--remove", "2", "--tokens", "256", "--search-tokens", "1M", "--out", "OUT"],
            2,
            "--search-tokens is 1,000,000, and the calibration text has 256 (--tokens): give at most 256",
        ),
        (
            ["run", "--model", "MODEL", "--remove", "2", "--tokens", "256", "--search-tokens", "257", "--out", "OUT"],
            2,
            "--search-tokens is 257, and the calibration text has 256",
        ),
        (
            ["run", "missing.yaml", "--tflops", "100", "--devices", "1", "--out", "OUT"],
            2,
            "--tflops and --devices without --dry-run",
        ),
        (["compare", "missing.yaml", "--devices", "4", "--out", "OUT"], 2, "--devices without --dry-run"),
        (["analyze", "MODEL", "--text", "TEXT", "--seed", "-1", "--out", "OUT"], 2, "error: --seed: Input should be"),
        (
            ["analyze", "MODEL", "--text", "TEXT", "--tokens", "200", "--context", "200", "--out", "OUT"],
            2,
            "--context is 200",
        ),
        (["plan", "MODEL", "--share", "pairs", "--out", "OUT"], 2, "error: --share: Input should be"),
        (
            ["plan", "MODEL", "--start", "zero", "--out", "OUT"],
            2,
            "error: --start says how blocks share weights, but --share is none",
        ),
        (
            ["plan", "MODEL", "--share", "adjacent", "--start", "zero", "--donor", "mean", "--out", "OUT"],
            2,
            "borrow from the nearest kept block; leave --donor out",
        ),
        (["plan", "MODEL", "--share", "auto", "--out", "OUT"], 2, "auto needs a size"),
        (["plan", "MODEL", "--share", "adjacent", "--size", "0.7", "--out", "OUT"], 2, "other methods read none"),
        (["plan", "MODEL", "--share", "auto", "--size", "small", "--out", "OUT"], 2, "'small' is not a size"),
        (["plan", "MODEL", "--share", "auto", "--size", "1.5", "--out", "OUT"], 2, "'1.5' is not a fraction between"),
        (
            ["plan", "MODEL", "--share", "auto", "--size", "0.7", "--remove", "2", "--out", "OUT"],
            2,
            "leave --remove out",
        ),
        (
            ["plan", "MODEL", "--share", "auto", "--size", "0.7", "--rank", "2", "--out", "OUT"],
            2,
            "--share auto chooses --rank itself",
        ),
        (["fold", "MODEL", "--plan", "missing.json", "--out", "OUT"], 1, "plan not found: missing.json"),
        (
            ["eval", "MODEL", "--perplexity", "TEXT", "--context", "1", "--out", "OUT"],
            2,
            "error: --context: Input should be",
        ),
        (
            ["eval", "MODEL", "--perplexity", "TEXT", "--context", "500", "--out", "OUT"],
            2,
            "--context is 500 for",
        ),
        (
            ["eval", "MODEL", "--tasks", "piqa", "--out", "OUT"],
            2,
            "tasks need a text as well (--perplexity): multiple choice",
        ),
        (
            ["eval", "MODEL", "--perplexity", "TEXT", "--context", "32", "--max-windows", "-1", "--out", "OUT"],
            2,
            "Invalid value for '--max-windows': Input should be greater than or equal to 0",
        ),
        (["plan", "MODEL", "--tokens", "abc", "--out", "OUT"], 2, "Invalid value for '--tokens': 'abc' is not a count"),
        (
            ["plan", "MODEL", "--target", "params=80%", "--out", "OUT"],
            2,
            "error: --target: 'params=80%': unknown target 'params'. Did you mean 'parameters'?",
        ),
        (
            ["plan", "MODEL", "--select", "last", "--remove", "1", "--figures", "TEXT", "--out", "OUT"],
            1,
            "is a file, and a folder is to be written there",
        ),
        (
            ["run", "--model", "MODEL", "--remove", "2", "--out", "MODEL", "--overwrite"],
            1,
            "holds a model, and a run is to be made there",
        ),
        (
            [
                "run",
                "--model",
                "MODEL",
                "--remove",
                "2",
                "--perplexity",
                "TEXT",
                "--tokens",
                "256",
                "--context",
                "32",
                "--out",
                "OUT",
            ],
            2,
            "evaluate.context is 512 for",
        ),
        (["run", "missing.yaml", "--out", "OUT"], 1, "recipe not found: missing.yaml"),
        (["run", "--out", "OUT"], 2, "name a recipe file, or a model"),
        (["show", "OUT"], 1, "file not found"),
        (["analyse", "MODEL"], 2, "No such command 'analyse'"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_message_and_no_output(
    arguments: list[str], exit_code: int, message: str, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    places = {"MODEL": str(model), "TEXT": str(text), "OUT": str(out)}
    made = foldgpt(*(places.get(argument, argument) for argument in arguments))
    assert made.exit_code == exit_code, made.output
    assert message in made.stderr.replace("\n", " ")
    assert "Traceback" not in made.output
    assert list(tmp_path.rglob("*")) in ([], [out])


def test_an_existing_output_is_not_overwritten(model: Path, text: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    asked = ("plan", model, "--select", "last", "--text", text, *CALIBRATION, "--out", plan, "-q")
    assert foldgpt(*asked, "--remove", 1).exit_code == 0
    before = plan.read_bytes()
    made = foldgpt(*asked, "--remove", 2)
    assert made.exit_code == 1 and "--overwrite" in made.stderr
    assert plan.read_bytes() == before
    made = foldgpt(*asked, "--remove", 2, "--overwrite")
    assert made.exit_code == 0 and len(FoldPlan.load(plan).removed) == 2


def test_an_analysis_of_another_model_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    other = tiny_source(tmp_path / "other", seed=1)
    foldgpt("analyze", other, "--text", text, *CALIBRATION, "--out", tmp_path / "run", "-q")
    asked = ("--select", "bi", "--remove", 1, "--out", tmp_path / "plan.json")
    made = foldgpt("plan", model, "--analysis", tmp_path / "run", *asked)
    assert made.exit_code == 1 and "analysis of another model" in made.stderr


def test_a_plan_for_another_model_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    other = tiny_source(tmp_path / "other", num_hidden_layers=4)
    asked = ("--select", "last", "--remove", 1, "--text", text, *CALIBRATION)
    foldgpt("plan", other, *asked, "--out", tmp_path / "plan.json", "-q")
    made = foldgpt("fold", model, "--plan", tmp_path / "plan.json", "--out", tmp_path / "folded", "-q")
    assert made.exit_code == 2 and "for a model of 4 blocks" in made.stderr
    assert not (tmp_path / "folded").exists()


def test_a_run_is_not_made_in_the_folder_of_a_model(model: Path, text: Path, tmp_path: Path) -> None:
    plan, folded = tmp_path / "plan.json", tmp_path / "folded"
    foldgpt("plan", model, "--select", "last", "--remove", 1, "--text", text, *CALIBRATION, "--out", plan, "-q")
    foldgpt("fold", model, "--plan", plan, "--out", folded, "-q")
    before = {path: path.read_bytes() for path in folded.iterdir()}
    asked = ("--select", "last", "--remove", 2, "--text", text, *CALIBRATION, "--out", folded, "--overwrite")
    made = foldgpt("run", "--model", model, *asked)
    assert made.exit_code == 1 and f"{folded} holds a model, and a run is to be made there" in made.stderr
    assert {path: path.read_bytes() for path in folded.iterdir()} == before


def test_a_run_may_lie_around_or_inside_the_folder_of_its_model(model: Path, text: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    source = tiny_source(project / "model")
    (project / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(source, text)))
    for out in (project, source / "run"):
        made = foldgpt("run", project / "recipe.yaml", "--out", out, "-q")
        assert made.exit_code == 0, made.output
    again = foldgpt("run", "--model", project / "folded", "--remove", 1, "--out", project, "--overwrite")
    assert again.exit_code == 1 and "lies where" in again.stderr


def test_what_a_run_made_is_not_replaced_apart_from_it(model: Path, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pipeline.run(Recipe.from_dict(tiny_recipe(model, text)), run)
    before = {path: path.read_bytes() for path in (run / "plan.json", run / "analysis.json")}
    asked = ("--text", text, *CALIBRATION, "--overwrite", "-q")
    for verb in (
        ("analyze", model, "--out", run),
        ("plan", model, "--select", "last", "--remove", 1, "--out", run / "plan.json"),
        ("plan", model, "--select", "last", "--remove", 1, "--out", tmp_path / "p.json", "--figures", run / "figures"),
    ):
        made = foldgpt(*verb, *asked)
        assert made.exit_code == 1 and f"belongs to the run in {run}" in made.stderr
    for verb in (
        ("fold", model, "--plan", run, "--out", run / "folded"),
        ("recover", run / "folded", "--teacher", model, "--tokens", "4k", "--out", run / "recovered"),
        ("eval", model, "--out", run / "evaluation.json"),
    ):
        made = foldgpt(*verb, "--overwrite", "-q")
        assert made.exit_code == 1 and f"belongs to the run in {run}" in made.stderr
    assert {path: path.read_bytes() for path in before} == before
    own = foldgpt("plan", model, "--select", "last", "--remove", 1, "--out", run / "other.json", *asked)
    assert own.exit_code == 0, own.output


def test_a_recovery_is_refused_before_its_text_is_read(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folded = tmp_path / "plan.json", tmp_path / "folded"
    foldgpt("plan", model, "--select", "last", "--remove", 1, "--text", text, *CALIBRATION, "--out", plan, "-q")
    foldgpt("fold", model, "--plan", plan, "--out", folded, "-q")
    other = tiny_source(tmp_path / "other", num_hidden_layers=4)
    monkeypatch.setattr("foldgpt.workbench.packed_windows", lambda *_, **__: pytest.fail("the text was read"))
    asked = ("--tokens", "4k", "--context", 32, "--text", text, "--out", tmp_path / "out", "-q")
    for flags, message in (
        (("--teacher", other), "for a model of 6 blocks"),
        (("--teacher", model, "--report-to", "tensorbord"), "unknown logger 'tensorbord'"),
        (
            ("--teacher", model, "--set", "kl=0", "--set", "lm=1", "--teacher-cache", tmp_path / "cache"),
            "no loss compares with the teacher",
        ),
    ):
        made = foldgpt("recover", folded, *flags, *asked)
        assert made.exit_code == 2 and message in made.stderr, made.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folded", "other", "plan.json"]


def test_a_teacher_that_is_not_asked_may_be_any_model(model: Path, text: Path, tmp_path: Path) -> None:
    plan, folded = tmp_path / "plan.json", tmp_path / "folded"
    foldgpt("plan", model, "--select", "last", "--remove", 1, "--text", text, *CALIBRATION, "--out", plan, "-q")
    foldgpt("fold", model, "--plan", plan, "--out", folded, "-q")
    asked = ("--tokens", 256, "--context", 32, "--held-out-tokens", 64, "--text", text, "--out", tmp_path / "out", "-q")
    made = foldgpt("recover", folded, "--teacher", folded, "--set", "kl=0", "--set", "lm=1", *asked)
    assert made.exit_code == 0, made.output


def test_both_models_of_an_evaluation_need_positions(model: Path, text: Path, tmp_path: Path) -> None:
    short = tiny_source(tmp_path / "short", max_position_embeddings=16)
    for asked in ((short, "--baseline", model), (model, "--baseline", short)):
        made = foldgpt("eval", *asked, "--perplexity", text, "--context", 32)
        assert made.exit_code == 2 and f"--context is 32 for {text}, and {short} has 16 positions" in made.stderr
        assert "loading" not in made.stderr


def test_a_home_that_does_not_exist_is_no_traceback(tmp_path: Path) -> None:
    made = foldgpt("run", "--model", "~no-such-user/model", "--remove", 1, "--out", tmp_path / "out")
    assert made.exit_code == 1 and "error: no model at ~no-such-user/model" in made.stderr
