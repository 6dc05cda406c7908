"""The command line: verbs, exit codes, messages, and a quick `--help`."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import foldgpt as package
import report_inputs
from cli_case import CALIBRATION, foldgpt
from foldgpt import hub, progress, steps
from foldgpt.cache import cache_folder
from foldgpt.errors import ArtifactError
from foldgpt.plan import FoldPlan, SourceModel
from foldgpt.recipe import Recipe
from models import tiny_model
from run_inputs import tiny_recipe, tiny_text
from tiny import tiny_tokenizer


def test_the_verbs_one_after_another(model: Path, text: Path, tmp_path: Path) -> None:
    made = foldgpt("analyze", model, "--text", text, *CALIBRATION, "--out", tmp_path / "run", "--quiet")
    assert made.exit_code == 0, made.output
    assert "rank" in made.stdout
    assert (tmp_path / "run" / "figures" / "similarity.svg").is_file()
    # All but the paths, which come last.
    table = foldgpt("show", tmp_path / "run").stdout
    assert table and made.stdout.startswith(table)

    (model / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    plan = tmp_path / "plan.json"
    made = foldgpt(
        *("plan", model, "--analysis", tmp_path / "run", "--select", "bi", "--remove", 2, "--out", plan),
        *("--text", text, *CALIBRATION),
    )
    assert made.exit_code == 0, made.output
    assert "6 → 4 blocks" in made.stdout

    made = foldgpt("fold", model, "--plan", plan, "--out", tmp_path / "folded", "--json", "-q")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["model_class"] == "LlamaForCausalLM"

    made = foldgpt(
        *("eval", tmp_path / "folded", "--baseline", model, "--perplexity", text, "--context", 32),
        *("--max-windows", 3, "--no-speed", "--no-memory", "--out", tmp_path / "evaluation.json", "--quiet", "--card"),
    )
    assert made.exit_code == 0, made.output
    assert "perplexity" in made.stdout and "windows 3" in made.stdout
    measured = json.loads((tmp_path / "evaluation.json").read_text())
    assert measured["folded"]["size"]["num_blocks"] == 4
    # Which models, where and when.
    assert [measured[name]["model"] for name in ("baseline", "folded")] == [str(model), str(tmp_path / "folded")]
    assert measured["environment"]["date"] and measured["baseline"]["name"] == "source"
    assert f"{measured['folded']['perplexity']['value']:.1f}"[:3] in (tmp_path / "folded" / "README.md").read_text()
    table = foldgpt("show", tmp_path / "evaluation.json").stdout
    assert table and made.stdout.startswith(table)

    made = foldgpt("show", tmp_path / "folded")
    assert made.exit_code == 0 and "6 → 4 blocks" in made.stdout
    # As `push` needs it.
    hub.check_card(tmp_path / "folded" / "README.md")
    assert "license: mit" in (tmp_path / "folded" / "README.md").read_text()


def test_a_baseline_that_is_no_source_is_not_called_one(model: Path, tmp_path: Path) -> None:
    alone = ("--no-speed", "--no-memory", "-q")
    for name, remove in (("one", 1), ("two", 2)):
        plan = tmp_path / f"{name}.json"
        assert foldgpt("plan", model, *WITHOUT_SEARCH, "--remove", remove, "--out", plan, "-q").exit_code == 0
        assert foldgpt("fold", model, "--plan", plan, "--out", tmp_path / name, "-q").exit_code == 0
    made = foldgpt("eval", tmp_path / "two", "--baseline", tmp_path / "one", "--json", *alone)
    assert made.exit_code == 0, made.output
    assert [json.loads(made.stdout)[name]["name"] for name in ("baseline", "folded")] == ["baseline", "folded"]
    made = foldgpt("eval", model, "--card", *alone)
    assert made.exit_code == 2 and "is no folder of a folded model" in made.stderr


def test_recover_trains_a_folded_model(model: Path, text: Path, tmp_path: Path) -> None:
    plan, folded = tmp_path / "plan.json", tmp_path / "folded"
    options = ("--select", "last", "--remove", 1, "--compensate", "linear", "--text", text, "--context", 32)
    assert foldgpt("plan", model, *options, "--tokens", 256, "--out", plan, "-q").exit_code == 0
    made = foldgpt("fold", model, "--plan", plan, "--out", folded, "-q")
    assert made.exit_code == 0 and "compensation: KL to the source" in made.stdout
    arguments = ("recover", folded, "--teacher", model, "--text", text, "--tokens", "0.512k", "--context", 32)
    arguments += ("--held-out-tokens", 64, "--set", "batch_size=4", "--set", "learning_rate=1e-2")
    arguments += ("--minutes", 60, "--separate-documents")
    made = foldgpt(*arguments, "--out", tmp_path / "recovered", "-q")
    assert made.exit_code == 0, made.output
    assert "on 64 held-out tokens: loss (kl)" in made.stdout and "ended by tokens" in " ".join(made.stdout.split())
    done = json.loads((tmp_path / "recovered" / "recovery.json").read_text())
    assert done["num_tokens"] == 512 and done["settings"]["minutes"] == 60
    assert done["teacher"]["model"] == str(model)
    assert done["teacher"]["fingerprint"] == FoldPlan.load(folded).source.fingerprint
    shown = foldgpt("show", tmp_path / "recovered").stdout
    assert "6 → 5 blocks" in shown and made.stdout.startswith(shown[shown.index("recovery on") :])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folded", "plan.json", "recovered"]
    hub.check_card(tmp_path / "recovered" / "README.md")
    record = (folded / "compensation.json").read_bytes()
    assert (tmp_path / "recovered" / "compensation.json").read_bytes() == record, "it holds for this model too"
    unfolded = foldgpt("recover", model, *arguments[2:], "--out", tmp_path / "other", "-q")
    assert unfolded.exit_code == 2 and "it is no model that `foldgpt fold` wrote" in unfolded.stderr
    wrong = foldgpt(*arguments, "--set", "rank", "--out", tmp_path / "other", "-q")
    assert wrong.exit_code == 2 and "--set takes NAME=VALUE, not 'rank'" in wrong.stderr
    few = foldgpt(*arguments, "--tokens", 96, "--out", tmp_path / "other", "-q")
    assert few.exit_code == 2 and "--tokens is 96, and one step takes 128" in few.stderr
    wrong = foldgpt("recover", folded, "--teacher", model, "--tokens", "2Q", "--out", tmp_path / "other")
    assert wrong.exit_code == 2 and "2Q" in wrong.stderr


def test_eval_of_one_model_alone(model: Path, text: Path) -> None:
    made = foldgpt("eval", model, "--perplexity", text, "--context", 32, "--no-speed", "--no-memory", "--json", "-q")
    assert made.exit_code == 0, made.output
    value = json.loads(made.stdout)
    assert value["baseline"] is None
    assert value["folded"]["perplexity"]["protocol"]["text_complete"] is True


def test_eval_reads_from_disk_what_may_not_be_in_memory_and_recover_says_that_it_cannot(
    model: Path, text: Path, tmp_path: Path
) -> None:
    measured = ("--perplexity", text, "--context", 32, "--no-speed", "--no-memory", "--json", "-q")
    whole, part = (foldgpt("eval", model, *measured, *more) for more in ((), ("--max-memory-gb", 0.00005)))
    assert whole.exit_code == part.exit_code == 0, part.output
    values = [json.loads(made.stdout)["folded"]["perplexity"]["value"] for made in (whole, part)]
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    plan, folded = tmp_path / "plan.json", tmp_path / "folded"
    options = ("--select", "last", "--remove", 1, "--compensate", "none", "--text", text, "--context", 32)
    assert foldgpt("plan", model, *options, "--tokens", 256, "--out", plan, "-q").exit_code == 0
    assert foldgpt("fold", model, "--plan", plan, "--out", folded, "-q").exit_code == 0
    arguments = ("recover", folded, "--teacher", model, "--text", text, "--tokens", 512, "--context", 32)
    made = foldgpt(*arguments, "--out", tmp_path / "recovered", "--max-memory-gb", 0.00005, "-q")
    assert made.exit_code == 1 and "folded does not fit in the memory that is free (or allowed" in made.stderr
    assert not (tmp_path / "recovered").exists()


def test_eval_beside_a_model_that_numbers_words_differently_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_model("llama").save_pretrained(other)
    tiny_tokenizer(100).save_pretrained(other)
    made = foldgpt("eval", other, "--baseline", model, "--perplexity", text, "--context", 32, "--no-speed", "-q")
    assert made.exit_code == 2 and "another tokenizer" in made.stderr


@pytest.mark.parametrize("verb", ["plan", "eval"])
def test_a_folder_in_place_of_a_file_is_refused_before_anything_runs(model: Path, tmp_path: Path, verb: str) -> None:
    (tmp_path / "taken").mkdir()
    made = foldgpt(verb, model, "--overwrite", "--out", tmp_path / "taken", "-q")
    assert made.exit_code == 1 and "is a folder, and a file is to be written there" in made.stderr


WITHOUT_SEARCH = ("--select", "last", "--remove", 1, "--compensate", "none")


@pytest.mark.parametrize("verb", ["analyze", "plan", "fold", "recover", "eval", "run"])
def test_a_place_below_a_file_is_refused_before_anything_is_loaded(
    model: Path, text: Path, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foldgpt.workbench.load_source", lambda *_, **__: pytest.fail("nothing must be loaded"))
    (tmp_path / "file").write_text("")
    arguments = {
        "plan": [model, "--select", "greedy", "--remove", 1, "--text", text, *CALIBRATION],
        "fold": [model, "--plan", tmp_path / "plan.json"],
        "recover": [tmp_path / "folded", "--teacher", model, "--tokens", 64, "--text", text],
        "run": ["--model", model, "--remove", 1, "--text", text, *CALIBRATION],
    }.get(verb, [model])
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "new" / "out"):
        made = foldgpt(verb, *arguments, "--out", out, "-q")
        assert made.exit_code == 1, made.output
        assert made.stderr.startswith(f"error: cannot write {out}") and "Not a directory" in made.stderr


def test_measurements_are_shown_whatever_becomes_of_their_file(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise ArtifactError("cannot write it: No space left on device")

    monkeypatch.setattr("foldgpt.artifacts.write_json", full)
    made = foldgpt(
        *("eval", model, "--perplexity", text, "--context", 32, "--max-windows", 2, "--no-speed", "--no-memory"),
        *("--out", tmp_path / "evaluation.json", "-q"),
    )
    assert made.exit_code == 1 and "No space left" in made.stderr
    assert "perplexity" in made.stdout
    assert "evaluation.json" not in made.stdout


def test_measurements_are_written_before_a_reader_has_enough(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("foldgpt.cli.stages.print_evaluation", closed)
    foldgpt("eval", model, "--no-speed", "--no-memory", "--out", tmp_path / "evaluation.json", "-q")
    assert json.loads((tmp_path / "evaluation.json").read_text())["folded"]["size"]["num_blocks"] == 6


def test_a_plan_of_other_weights_is_pointed_out(model: Path, tmp_path: Path) -> None:
    plan, other = tmp_path / "plan.json", tmp_path / "other"
    assert foldgpt("plan", model, *WITHOUT_SEARCH, "--out", plan, "-q").exit_code == 0
    tiny_model("llama", seed=1).save_pretrained(other)
    tiny_tokenizer(128).save_pretrained(other)
    for source, expected in ((model, False), (other, True)):
        made = foldgpt("fold", source, "--plan", plan, "--out", tmp_path / f"folded-{source.name}")
        assert made.exit_code == 0, made.output
        assert (f"the plan was made for other weights ({model})" in made.stderr) == expected
        folded = FoldPlan.load(tmp_path / f"folded-{source.name}")
        # Whose it is now is told, and what was measured of the other is not.
        assert folded.source.model == str(source)
        assert ("made_for" in folded.origin) == expected
        shown = " ".join(foldgpt("show", tmp_path / f"folded-{source.name}").stdout.split())
        assert (f"for {model}" in shown) == expected


def test_overwrite_replaces_a_folded_model_and_nothing_else(model: Path, text: Path, tmp_path: Path) -> None:
    plan, folded, thesis = tmp_path / "plan.json", tmp_path / "folded", tmp_path / "mine" / "thesis" / "a.txt"
    assert foldgpt("plan", model, *WITHOUT_SEARCH, "--out", plan, "-q").exit_code == 0
    fold = ("fold", model, "--plan", plan, "--overwrite", "-q", "--out")
    assert foldgpt(*fold, folded).exit_code == 0
    assert foldgpt(*fold, folded).exit_code == 0
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    (tmp_path / "link").symlink_to(model)
    inside = model / "inside"
    cases = [
        (tmp_path / "mine", "holds something else than a folded model"),
        (model, f"is the model {model}, which is read"),
        (tmp_path / "link", "is the model"),
        (model.parent, "contains the model"),
        (inside, "lies inside the model"),
    ]
    recover = ("recover", folded, "--tokens", 64, "--text", text, "--overwrite", "-q")
    asked: list[tuple[tuple[object, ...], Path, str]] = []
    for out, message in cases:
        asked += [(fold[:-1], out, message), ((*recover, "--teacher", model), out, message)]
    asked += [((*recover, "--teacher", model), folded, "is the model"), ((*recover, "--teacher", folded), model, "mod")]
    before = sorted(path for place in (model, tmp_path) for path in place.rglob("*"))
    for arguments, out, message in asked:
        made = foldgpt(*arguments, "--out", out)
        assert made.exit_code == 1 and message in made.stderr, made.output
    assert sorted(path for place in (model, tmp_path) for path in place.rglob("*")) == before


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "/private/t.txt"), "error: /private/t.txt: Permission denied"),
        (OSError("cannot load the thing\nand more"), "error: cannot load the thing"),
        (OSError(), "error: OSError"),
    ],
)
def test_an_error_of_the_system_is_one_line(
    error: OSError, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bool:
        raise error

    monkeypatch.setattr(Path, "is_file", refuse)
    made = foldgpt("show", tmp_path)
    assert made.exit_code == 1 and made.stderr == f"{message}\n"


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Path, "is_file", lambda self: (_ for _ in ()).throw(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    )
    assert "error" not in foldgpt("show", tmp_path).stderr


@pytest.mark.parametrize(
    ("error", "amount"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"), " (2.00 GiB more"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."), " (4096 bytes"),
        (RuntimeError("MPS backend out of memory"), ". "),
        (MemoryError(), ". "),
    ],
)
def test_out_of_memory_is_one_line_with_remedies(
    error: Exception, amount: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bool:
        raise error

    monkeypatch.setattr(Path, "is_file", refuse)
    made = foldgpt("show", tmp_path)
    assert made.exit_code == 1 and made.stderr.startswith(f"error: out of memory{amount}")
    assert made.stderr.count("\n") == 1
    for remedy in ("--dtype", "--device", "micro_batch_size", "gradient_checkpointing"):
        assert remedy in made.stderr


def test_a_fault_of_our_own_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda self: (_ for _ in ()).throw(RuntimeError("a fault")))
    made = foldgpt("show", tmp_path)
    assert isinstance(made.exception, RuntimeError) and "error" not in made.stderr


def test_eval_prints_what_models_write(model: Path, text: Path) -> None:
    plain = ("eval", model, "--generations", 2, "--context", 32, "--max-windows", 2, "--no-speed", "--no-memory", "-q")
    made = foldgpt(*plain, "--perplexity", text)
    assert made.exit_code == 0, made.output
    assert made.stdout.splitlines().count("  model:") == 2


def test_eval_tells_texts_of_one_name_apart(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "eval").mkdir()
    monkeypatch.chdir(tmp_path)
    texts = [tiny_text(Path("eval/test.txt"), 500), tiny_text(Path("test.txt"), 900)]
    plain = ("eval", model, "--context", 32, "--max-windows", 2, "--no-speed", "--no-memory", "-q")
    made = foldgpt(*plain, *(part for text in texts for part in ("--perplexity", text)))
    assert made.exit_code == 0, made.output
    assert [f"perplexity, {text}" in made.stdout for text in texts] == [True, True]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--generations", 2, "--stride", 8), "--stride and --generations without --perplexity"),
        (("--context", 32, "--tasks", "piqa"), "--context without --perplexity"),
        (("--max-windows", 2), "--max-windows without --perplexity"),
        (("--limit", 5, "--data-dir", "items"), "--data-dir and --limit without --tasks"),
    ],
)
def test_eval_refuses_flags_that_have_nothing_to_apply_to(model: Path, flags: tuple[Any, ...], message: str) -> None:
    made = foldgpt("eval", model, *flags, "--no-speed", "--no-memory")
    assert made.exit_code == 2 and message in made.stderr


def test_a_long_strip_is_cut_at_whole_tens_in_a_narrow_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    FoldPlan.create(SourceModel(model="m", model_type="llama", num_blocks=78), removed=[75]).save(tmp_path / "p.json")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", foldgpt("show", tmp_path / "p.json").stdout).splitlines()
    assert lines[1] == "block " + 70 * "█" and lines[2:4] == ["      70", "block █████·██"]


@pytest.mark.parametrize("verb", ["run", "compare"])
def test_flags_of_the_machine_and_the_source_take_the_place_of_the_recipes(
    model: Path, text: Path, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(model, text, revision="old", max_memory_gb=1.0)))
    seen: list[Recipe] = []

    def stop(recipe: Recipe, *_: object, **__: object) -> None:
        seen.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr("foldgpt.pipeline.run", stop)
    monkeypatch.setattr("foldgpt.side_by_side.compare", stop)
    flags = ("--revision", "new", "--max-memory-gb", 2.5, "--trust-remote-code")
    assert foldgpt(verb, tmp_path / "recipe.yaml", *flags, "--out", tmp_path / "out").exit_code == 130
    assert foldgpt(verb, tmp_path / "recipe.yaml", "--out", tmp_path / "out").exit_code == 130
    assert [(each.revision, each.max_memory_gb, each.trust_remote_code) for each in seen] == [
        ("new", 2.5, True),
        ("old", 1.0, False),
    ]


def test_flags_of_a_run_say_how_it_is_recovered(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"num_tokens": 512, "texts": ["old.txt"], "settings": {"rank": 4, "lm": 0.5, "norms": False}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(model, text, recover=given)))
    seen: list[Recipe] = []

    def stop(recipe: Recipe, *_: object, **__: object) -> None:
        seen.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr("foldgpt.pipeline.run", stop)
    flags = ("--recover-text", text, "--recover-minutes", 2, "--recover-set", "rank=8", "--recover-set", "lm=0")
    run = ("run", tmp_path / "recipe.yaml", "--out", tmp_path / "out", "-q")
    assert foldgpt(*run, *flags).exit_code == 130
    changed = seen[0].recover
    assert (changed.num_tokens, changed.texts, changed.minutes) == (512, [str(text)], 2.0)
    assert changed.settings == {"rank": 8, "lm": 0, "norms": False}
    idle = foldgpt(*run, *flags, "--recover-tokens", 0)
    assert (
        idle.exit_code == 2 and "--recover-text and --recover-minutes and --recover-set, and nothing is" in idle.stderr
    )


@pytest.mark.parametrize("verb", ["run", "compare"])
def test_any_key_of_a_recipe_can_be_set(
    verb: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(tiny_recipe(model, text, share={"method": "adjacent", "fit": True}))
    )
    seen: list[Recipe] = []

    def stop(recipe: Recipe, *_: object, **__: object) -> None:
        seen.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr("foldgpt.pipeline.run" if verb == "run" else "foldgpt.side_by_side.compare", stop)
    given = (verb, tmp_path / "recipe.yaml", "--out", tmp_path / "out", "-q")
    values = (
        "share.fit=false",
        "evaluate.tasks=[piqa]",
        "evaluate.data_dir=tasks",
        "recover.settings.train_fully=none",
    )
    stopped = foldgpt(*given, *(part for value in values for part in ("--set", value)))
    assert stopped.exit_code == 130, stopped.stderr
    assert not seen[0].share.fit
    assert (seen[0].evaluate.tasks, seen[0].evaluate.data_dir) == (["piqa"], "tasks")
    assert seen[0].recover.settings == {"train_fully": "none"}
    wrong = foldgpt(*given, "--set", "evaluate.task=[piqa]")
    assert wrong.exit_code == 2 and "error: recipe: evaluate.task: unknown key. Did you mean 'tasks'?" in wrong.stderr


def test_an_error_of_a_value_names_its_key(model: Path) -> None:
    wrong = foldgpt("run", "--model", model, "--set", "select.remove=0.5", "-q")
    assert wrong.exit_code == 2 and "select.remove (--remove): Input should be a valid integer" in wrong.stderr


def test_no_default_is_promised_where_there_is_none() -> None:
    text = " ".join(foldgpt("plan", "--help").stdout.split())
    said = text.partition("--remove <int>")[2].partition("--remove-ratio <float>")[0]
    assert "default" not in said and "needed" in said


def defaults_shown(verb: str) -> list[str]:
    return re.findall(r"\[default: (.*?)\]", " ".join(foldgpt(verb, "--help").stdout.split()))


def test_where_there_is_a_recipe_its_values_are_the_defaults() -> None:
    dry_run = ["(1); x>=1"]
    assert set(defaults_shown("compare")) == {"runs/comparison", "(the recipe's)", *dry_run}
    of_run = defaults_shown("run")
    assert {
        "(the recipe's, else 4096)",
        "(the recipe's, else gates)",
        "(the recipe's, else 0)",
    } <= set(of_run)
    others = [default for default in of_run if not default.startswith("(the recipe's, else ")]
    assert others == ["runs/latest", *dry_run]
    of_plan = defaults_shown("plan")
    assert "(4096)" in of_plan and not [default for default in of_plan if "recipe" in default]


def test_dry_runs_take_the_defaults_that_help_shows(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(model, text)))
    seen: list[dict[str, float]] = []
    monkeypatch.setattr("foldgpt.rehearsal.rehearse", lambda *_, **__: None)
    monkeypatch.setattr("foldgpt.rehearsal.expectation_table", lambda _, **said: seen.append(said) or "")
    monkeypatch.setattr("foldgpt.rehearsal.expectation_lines", lambda *_, **__: [])
    dry = ("run", tmp_path / "recipe.yaml", "--dry-run")
    for flags in ((), ("--tflops", 50, "--devices", 4)):
        assert foldgpt(*dry, *flags).exit_code == 0
    # A time without a speed would be a guess.
    assert seen == [{"teraflops": None, "devices": 1}, {"teraflops": 50, "devices": 4}]
    assert "--devices without --tflops" in foldgpt(*dry, "--devices", 4).stderr


def test_the_home_folder_may_stand_behind_an_equals_sign(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shells leave ~ there as it is, and a folder of that name is dangerous to remove."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    made = foldgpt("plan", model, "--select", "last", "--remove", 1, "--text", text, *CALIBRATION, "--out=~/plan.json")
    assert made.exit_code == 0, made.output
    assert FoldPlan.load(tmp_path / "home" / "plan.json").removed and not (tmp_path / "~").exists()
    monkeypatch.setenv("FOLDGPT_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "home" / "cache"


def test_the_version_is_one_line() -> None:
    made = foldgpt("--version")
    assert (made.exit_code, made.output) == (0, f"foldgpt {package.__version__}\n")


def test_help_says_where_the_settings_of_a_recovery_are_listed() -> None:
    said = " ".join(foldgpt("recover", "--help").stdout.split())
    place = re.search(r"(docs/\w+\.md) under (\w+)", said.partition("--set ")[2].partition("--revision")[0])
    assert place is not None
    assert f"\n## {place[2]}\n" in (Path(__file__).parent.parent / place[1]).read_text(encoding="utf-8")


def test_search_tokens_are_held_against_the_recipes_text(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(model, text)))
    asked = ("run", tmp_path / "recipe.yaml", "--select", "greedy", "--search-tokens", 512, "--out", tmp_path / "run")
    made = foldgpt(*asked)
    assert made.exit_code == 2 and "the calibration text has 256" in made.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_in_place_of_its_model_is_refused_by_the_name_of_that(model: Path, tmp_path: Path) -> None:
    run = report_inputs.write_run(tmp_path / "run", evaluation=None, recovery=None)
    verbs = [("eval", run), ("recover", run, "--teacher", model, "--tokens", "4k", "--out", tmp_path / "out")]

    def said() -> list[str]:
        return [foldgpt(*verb, "-q").stderr for verb in verbs]

    assert all(line.endswith("it has no config.json.\n") for line in said())
    for name in ("folded", "recovered"):
        (run / name).mkdir()
        (run / name / "config.json").write_text("{}")
        assert all(line.endswith(f"the folder of a run, whose model is {str(run / name)!r}.\n") for line in said())


def test_one_of_several_processes_prints(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    analyze = ("analyze", model, "--text", text, *CALIBRATION, "--overwrite", "--out", tmp_path)
    # A rank alone is some job queue's: nobody shares the work.
    for rank, local, first in (("1", None, True), ("0", "0", True), ("1", "1", False)):
        monkeypatch.setenv("RANK", rank)
        if local is not None:
            monkeypatch.setenv("LOCAL_RANK", local)
        for flags in ((), ("--json",)):
            made = foldgpt(*analyze, *flags)
            assert made.exit_code == 0, made.output
            assert (bool(made.stdout), "loading" in made.stderr) == (first, first), made.output
    # Nothing, then: neither a note nor the last lines of a result.
    assert made.output == ""
    made = foldgpt("show", tmp_path / "missing.json")
    assert made.stdout == "" and "file not found" in made.stderr, "an error may be that of one process alone"


def test_one_of_several_processes_draws_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, first in (("0", True), ("1", False)):
        screen = io.StringIO()
        monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=80))
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with progress.bar("Analysing", total=2) as running:
            running.advance()
        assert bool(screen.getvalue()) == first


def test_run_takes_a_recipe_and_flags(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(model, text)))
    out = tmp_path / "run"
    made = foldgpt("run", tmp_path / "recipe.yaml", "--remove", 1, "--out", out, "--quiet")
    assert made.exit_code == 0, made.output
    assert Recipe.load(out / "recipe.yaml").select.remove == 1
    lines = made.stdout.splitlines()
    assert lines[-1] == str(out / "report.html")
    shown = foldgpt("show", out)
    assert "perplexity" in shown.stdout and "6 → 5 blocks" in shown.stdout
    again = foldgpt("run", tmp_path / "recipe.yaml", "--out", out, "--quiet")
    assert again.exit_code == 1
    assert "select.remove (--remove) was 1 and is now 2" in again.stderr


def test_json_is_alone_on_standard_output(model: Path, text: Path, tmp_path: Path) -> None:
    made = foldgpt("analyze", model, "--text", text, *CALIBRATION, "--out", tmp_path, "--json")
    assert len(json.loads(made.stdout)["bi"]) == 6
    assert "loading" in made.stderr


def test_what_a_library_prints_is_no_part_of_the_result(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = steps.make_analysis

    def noisy(*arguments: Any) -> Any:
        print("[WARNING] no accelerator")  # noqa: T201
        return make(*arguments)

    monkeypatch.setattr(steps, "make_analysis", noisy)
    made = foldgpt("analyze", model, "--text", text, *CALIBRATION, "--out", tmp_path, "--json")
    assert made.exit_code == 0 and len(json.loads(made.stdout)["bi"]) == 6
    assert "[WARNING] no accelerator" in made.stderr


def test_schema_describes_every_key(tmp_path: Path) -> None:
    schema = json.loads(foldgpt("schema").stdout)
    assert schema["properties"]["model"]["description"].startswith("Hub id, local folder, GGUF file")
    assert schema["additionalProperties"] is False


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['foldgpt', '--help']\nfrom foldgpt.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n"
        "    print([name for name in ('torch', 'transformers', 'pydantic') if name in sys.modules])"
    )
    seconds = []
    for _ in range(5):
        # Of the processor: others may keep it busy.
        start = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        end = os.times()
        seconds.append(end.children_user - start.children_user + end.children_system - start.children_system)
        assert done.stdout.splitlines()[-1] == "[]"
    assert min(seconds) < 0.5
