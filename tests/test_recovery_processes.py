"""Recovery by launchers: several processes, sharded students and mixed precision give what one process gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cli_case import foldgpt
from foldgpt.errors import UsageError
from foldgpt.plan import FoldPlan, SourceModel
from foldgpt.recovery.trainer import RecoveryTrainer
from recovery_case import SAID, recover_compiled, run, step_losses, tiny_recovery
from run_inputs import tiny_source, tiny_text
from sharded_case import VARIABLES, recover_sharded

#: All that makes a forward pass differ from the plainest.
SETTINGS = {"train_fully": "cuts", "gradient_checkpointing": True, "lm": 0.5}


def sharded(folder: Path, changes: dict[str, Any], **variables: str) -> dict[str, Any]:
    """A tiny recovery of a student that two processes have shards of; its result."""
    return run(folder, changes, 2, recover_sharded, **(VARIABLES | variables))


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    one = tiny_recovery(tmp_path / "one")
    two = run(tmp_path / "two", {}, 2)
    assert step_losses(one.history).keys() == step_losses(two["history"]).keys()
    for step, loss in step_losses(one.history).items():
        assert step_losses(two["history"])[step] == pytest.approx(loss, rel=1e-5)
    assert two["after"]["loss"] == pytest.approx(one.after["loss"], rel=1e-5)


def test_two_processes_that_compile_give_the_losses_of_one(tmp_path: Path) -> None:
    changes = {"windows": 16, "train_fully": "cuts"}
    one = run(tmp_path / "one", changes, 1, recover_compiled)
    two = run(tmp_path / "two", changes, 2, recover_compiled)
    assert step_losses(two["history"]) == pytest.approx(step_losses(one["history"]), rel=1e-5)
    assert two["after"]["loss"] == pytest.approx(one["after"]["loss"], rel=1e-5)


def test_two_processes_of_the_command_line_give_the_losses_of_one(tmp_path: Path) -> None:
    model, plan = tiny_source(tmp_path / "model"), tmp_path / "plan.json"
    source = SourceModel(model=str(model), model_type="llama", num_blocks=6)
    FoldPlan.create(source, removed=[2]).save(plan)
    assert foldgpt("fold", model, "--plan", plan, "--out", tmp_path / "folded", "-q").exit_code == 0
    arguments = [
        *("recover", tmp_path / "folded", "--teacher", model, "--text", tiny_text(tmp_path / "text.txt")),
        *("--tokens", 512, "--context", 32, "--held-out-tokens", 64, "--device", "cpu", "-q", "--json"),
        *("--set", "batch_size=4", "--set", "rank=2", "--out"),
    ]
    one = foldgpt(*arguments, tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "foldgpt.cli"]
    two = subprocess.run([*launch, *map(str, arguments), str(tmp_path / "two")], capture_output=True, text=True)
    assert one.exit_code == 0 and two.returncode == 0, two.stderr
    # One result, not two.
    results = [json.loads(shown) for shown in (one.stdout, two.stdout)]
    losses = [step_losses(result["history"]) for result in results]
    assert losses[0].keys() == losses[1].keys() == set(range(1, 5))
    for step, loss in losses[0].items():
        assert losses[1][step] == pytest.approx(loss, rel=1e-5)
    assert results[0]["after"]["loss"] == pytest.approx(results[1]["after"]["loss"], rel=1e-5)
    assert (tmp_path / "two" / "model.safetensors").is_file()


def test_a_sharded_student_learns_what_a_whole_one_does(tmp_path: Path) -> None:
    one = tiny_recovery(tmp_path / "one", shared=False, **SETTINGS)
    two = sharded(tmp_path / "two", SETTINGS)
    assert step_losses(two["history"]) == pytest.approx(step_losses(one.history), rel=1e-5)
    assert two["after"] == pytest.approx(one.after, rel=1e-5)
    files = [load_file(tmp_path / name / "recovered" / "model.safetensors") for name in ("one", "two")]
    assert files[0].keys() == files[1].keys()
    for name, weight in files[0].items():
        assert weight.allclose(files[1][name], rtol=1e-4, atol=1e-5), name


def test_sharded_checkpoints_are_gone_on_from_and_the_best_is_kept(tmp_path: Path) -> None:
    """At this rate training makes things worse after a while, so that the best checkpoint is not the last one."""
    changes = {"learning_rate": 0.06, "evaluate_every": 2}
    one = tiny_recovery(tmp_path / "one", shared=False, **changes)
    variables = {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    with pytest.raises(AssertionError):
        sharded(tmp_path / "two", changes, **variables, DIE_AT="6")
    assert not (tmp_path / "two" / "recovered").exists()
    assert (tmp_path / "two" / ".recovered.recovery" / "checkpoint-6" / "complete.json").is_file()
    two = sharded(tmp_path / "two", changes, **variables)
    assert "going on at step 6" in (tmp_path / "two" / SAID).read_text(encoding="utf-8")
    assert step_losses(two["history"]) == pytest.approx(step_losses(one.history), rel=1e-3)
    assert two["best_step"] == one.best_step == 4
    assert two["after"] == pytest.approx(one.after, rel=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_processes_learn_from_a_file_what_they_do_from_the_teacher(tmp_path: Path, precision: str) -> None:
    one = tiny_recovery(tmp_path / "one", shared=False)
    changes = {"shared": False, "teacher_cache": str(tmp_path / "cache")}
    given = {"ACCELERATE_MIXED_PRECISION": precision, "ACCELERATE_USE_CPU": "true"}
    found = [run(tmp_path / "two", changes, 2, **given), sharded(tmp_path / "shards", changes, **given)]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for result in found:
        expected = pytest.approx(step_losses(one.history), rel=1e-5 if precision == "no" else 0.02)
        assert step_losses(result["history"]) == expected
        assert result["after"]["loss"] < result["before"]["loss"]


@pytest.mark.parametrize("is_sharded", [False, True])
def test_mixed_precision_of_a_launcher(tmp_path: Path, is_sharded: bool) -> None:
    """Losses are near those of fp32, and not the same: it is on."""
    exact = step_losses(tiny_recovery(tmp_path / "fp32", shared=False).history)
    given = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}
    mixed = (sharded if is_sharded else run)(tmp_path / "bf16", {"shared": False}, **given)
    losses = step_losses(mixed["history"])
    assert losses == pytest.approx(exact, rel=0.02) and losses != pytest.approx(exact, rel=1e-4)
    assert mixed["after"]["loss"] < mixed["before"]["loss"]
    # And themselves in more than 16 bits.
    assert not any(float(torch.tensor(loss).bfloat16()) == pytest.approx(loss, rel=1e-7) for loss in losses.values())


def test_fsdp_is_refused_for_shared_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = RecoveryTrainer.__init__

    def under_fsdp(self: RecoveryTrainer, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(RecoveryTrainer, "__init__", under_fsdp)
    with pytest.raises(UsageError, match="FSDP gathers a block's weights"):
        tiny_recovery(tmp_path)
    assert not (tmp_path / "recovered").exists()
