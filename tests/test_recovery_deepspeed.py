"""Recovery by DeepSpeed gives what one process gives."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from deepspeed_case import VARIABLES, recover_by_deepspeed
from recovery_case import SAID, run, step_losses, tiny_recovery

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles what it needs on a CPU")

#: All that makes a forward pass differ from the plainest.
SETTINGS = {"train_fully": "cuts", "gradient_checkpointing": True, "lm": 0.5}


def by_deepspeed(folder: Path, changes: dict[str, Any], **variables: str) -> dict[str, Any]:
    """A tiny recovery by two processes; its result."""
    return run(folder, changes, 2, recover_by_deepspeed, **(VARIABLES | variables))


@pytest.mark.parametrize(
    ("stage", "changes"),
    [("1", {"shared": True}), ("2", {"shared": False}), ("2", {"shared": False, "bf16": True})],
    ids=str,
)
def test_a_student_under_deepspeed_learns_what_it_does_alone(
    tmp_path: Path, stage: str, changes: dict[str, Any]
) -> None:
    changes |= SETTINGS
    one = tiny_recovery(tmp_path / "one", **changes)
    two = by_deepspeed(tmp_path / "two", changes, ACCELERATE_DEEPSPEED_ZERO_STAGE=stage)
    near, rounding = (
        (2e-3, {"rtol": 2**-6, "atol": 1e-3}) if "bf16" in changes else (1e-5, {"rtol": 1e-4, "atol": 1e-5})
    )
    assert step_losses(two["history"]) == pytest.approx(step_losses(one.history), rel=near)
    assert two["after"] == pytest.approx(one.after, rel=near)
    files = [load_file(tmp_path / name / "recovered" / "model.safetensors") for name in ("one", "two")]
    assert files[0].keys() == files[1].keys()
    for name, weight in files[0].items():
        assert weight.allclose(files[1][name], **rounding), name


def test_its_checkpoints_are_gone_on_from_and_the_best_is_kept(tmp_path: Path) -> None:
    """At this rate training makes things worse after a while, so that the best checkpoint is not the last one."""
    changes = {"learning_rate": 0.06, "evaluate_every": 2}
    one = tiny_recovery(tmp_path / "one", shared=False, **changes)
    with pytest.raises(AssertionError):
        by_deepspeed(tmp_path / "two", changes, DIE_AT="6")
    assert not (tmp_path / "two" / "recovered").exists()
    checkpoint = tmp_path / "two" / ".recovered.recovery" / "checkpoint-6"
    assert (checkpoint / "complete.json").is_file() and list(checkpoint.rglob("*optim_states.pt"))
    two = by_deepspeed(tmp_path / "two", changes)
    assert "going on at step 6" in (tmp_path / "two" / SAID).read_text(encoding="utf-8")
    assert step_losses(two["history"]) == pytest.approx(step_losses(one.history), rel=1e-3)
    assert two["best_step"] == one.best_step == 4
    assert two["after"] == pytest.approx(one.after, rel=1e-4)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "shard it by FSDP, or ask for stage 1 or 2"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "set mixed_precision to no, and load both models in bfloat16"),
    ],
)
def test_what_would_not_end_in_the_student_is_refused(tmp_path: Path, variables: dict[str, str], message: str) -> None:
    with pytest.raises(AssertionError):
        by_deepspeed(tmp_path, {}, **variables)
    assert message in (tmp_path / SAID).read_text(encoding="utf-8")
    assert not (tmp_path / "recovered").exists() and not (tmp_path / ".recovered.recovery").exists()
