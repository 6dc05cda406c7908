"""What a recovery is given: loggers, teachers and inputs that fit, or are refused before anything is begun."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from transformers.integrations import integration_utils

from foldgpt.errors import UsageError
from foldgpt.folding import fold_
from foldgpt.plan import FoldPlan, Group
from foldgpt.recovery import (
    RecoverySettings,
    TrainingWindows,
    check_loggers,
    recover,
)
from foldgpt.recovery.inputs import check_inputs
from models import tiny_model
from recovery_case import recovered_on, tiny_pair, tiny_recovery, tiny_windows


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.uint8], ids=str)
def test_ids_may_be_of_any_integer_type(tmp_path: Path, dtype: torch.dtype) -> None:
    windows = TrainingWindows(tiny_windows(8, seed=1).to(dtype))
    assert recovered_on(windows, tmp_path / "out").num_steps == 2


def test_numbers_of_numpy_are_settings_as_any_others(tmp_path: Path) -> None:
    given = RecoverySettings(rank=numpy.int64(2), learning_rate=numpy.float32(0.5), minutes=numpy.float64(3))
    assert [type(value) for value in (given.rank, given.learning_rate, given.minutes)] == [int, float, float]
    assert given == RecoverySettings(rank=2, learning_rate=0.5, minutes=3.0)
    json.dumps(given.identity())


def test_without_a_compiler_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldgpt.recovery.compiled._BACKEND", "nonsense")
    with pytest.raises(UsageError, match=r"torch\.compile does not work on cpu here; train without.*nonsense"):
        tiny_recovery(tmp_path, compile=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("has_amx", "settings", "tokens", "is_said"),
    [
        (True, {}, 128, True),
        (True, {"compile": True}, 128, False),
        (True, {"states": 1.0, "states_at": "all"}, 128, False),
        (True, {"minutes": 5.0}, 128, False),
        (True, {}, 64, False),
        (False, {}, 128, False),
    ],
)
def test_it_is_said_where_compiling_would_pay(
    has_amx: bool,
    settings: dict[str, Any],
    tokens: int,
    is_said: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("foldgpt.recovery.compiled._BACKEND", "eager")
    monkeypatch.setattr("foldgpt.recovery.compiled.computes_by_amx", lambda _: has_amx)
    student = tiny_pair()[0]
    parameters = sum(parameter.numel() for parameter in student.parameters())
    monkeypatch.setattr("foldgpt.recovery.compiled._PAYS_FROM", {"cpu": 128 * parameters})
    recovered_on(TrainingWindows(tiny_windows(tokens // 16, seed=1)), tmp_path / "out", settings)
    assert ("compiled (the setting compile=true)" in capsys.readouterr().err) == is_said


def test_loggers_are_known_and_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    check_loggers([])
    check_loggers(["none"])
    check_loggers(["tensorboard"])
    with pytest.raises(UsageError, match=r"unknown logger 'tensorbord' in report_to\. Did you mean 'tensorboard'"):
        check_loggers(["tensorbord"])
    windows = TrainingWindows(tiny_windows(8, seed=1))
    with pytest.raises(UsageError, match=r"'wandb' of report_to is not installed; installed: .*tensorboard"):
        recovered_on(windows, tmp_path / "out", report_to=["wandb"])
    assert not list(tmp_path.iterdir())


def test_what_tensorboard_writes_is_kept_beside_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []

    class Writer:
        def __init__(self, log_dir: str) -> None:
            folders.append(Path(log_dir))
            Path(log_dir).mkdir(parents=True)

        def __getattr__(self, _: str) -> Any:
            return lambda *args, **kwargs: None

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    windows = TrainingWindows(tiny_windows(8, seed=1))
    for seed in (0, 1):
        recovered_on(windows, tmp_path / "out", {"seed": seed}, report_to=["tensorboard"], replace=True)
    assert len(set(folders)) == 2 and {folder.parent for folder in folders} == {tmp_path / "out.logs"}
    assert all(folder.is_dir() for folder in folders)


@pytest.mark.parametrize("seed", [0, 5])
def test_a_teacher_of_other_weights_is_pointed_out(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, _, plan = tiny_pair()
    teacher = tiny_model("llama", seed=seed).to(torch.bfloat16)
    windows, held_out = TrainingWindows(tiny_windows(8, seed=1)), TrainingWindows(tiny_windows(4, seed=2))
    check_inputs(student, teacher, plan, RecoverySettings(batch_size=4), windows, held_out)
    assert ("was hardly folded from it" in capsys.readouterr().err) == bool(seed)


@pytest.mark.parametrize(
    "what",
    [
        "vocabulary",
        "channels",
        "blocks",
        "more blocks",
        "same model",
        "no teacher",
        "too few",
        "ids",
        "negative id",
        "another plan",
        "other groups",
        "too long",
        "mask",
    ],
)
def test_inputs_that_do_not_fit_are_refused(tmp_path: Path, what: str) -> None:
    student, teacher, plan = tiny_pair()
    windows, held_out = tiny_windows(8, seed=1), TrainingWindows(tiny_windows(4, seed=2))
    expected = {
        "vocabulary": "vocabulary has 130 entries",
        "channels": "have 64 channels, the student's 32, so last_error and states cannot",
        "blocks": "the teacher has 4 blocks, the plan's source 6",
        "more blocks": "the teacher has 7 blocks, the plan's source 6",
        "same model": "one model in memory",
        "no teacher": "there is none",
        "too few": "do not fill one step",
        "ids": "hold the id 400",
        "negative id": "hold the id -1;",
        "another plan": "the plan keeps 4 blocks, the model has 5",
        "other groups": "the model was folded by another plan",
        "too long": "the windows have 16 tokens, and the model has 8 positions",
        "mask": "nothing to predict",
    }[what]
    if what == "vocabulary":
        teacher = tiny_model("llama", vocab_size=130)
    elif what == "channels":
        teacher = tiny_model("llama", hidden_size=64)
    elif what == "blocks":
        teacher = tiny_model("llama", num_hidden_layers=4)
    elif what == "more blocks":
        teacher = tiny_model("llama", num_hidden_layers=7)
    elif what == "same model":
        teacher = student
    elif what == "no teacher":
        teacher = None
    elif what == "ids":
        windows[0, 0] = 400
    elif what == "negative id":
        windows[0, 0] = -1
    elif what == "another plan":
        plan = FoldPlan.create(plan.source, removed=[2, 3])
    elif what == "too long":
        student.config.max_position_embeddings = 8
    elif what == "other groups":
        student, plan = tiny_model("llama"), FoldPlan.create(plan.source, groups=[Group(blocks=(1, 2))])
        fold_(student, FoldPlan.create(plan.source, groups=[Group(blocks=(3, 4))]))
    losses = {"last_error": 1.0, "states": 1.0} if what == "channels" else {}
    settings = RecoverySettings(batch_size=100 if what == "too few" else 4, **losses)
    with pytest.raises(UsageError, match=expected):
        scored = torch.zeros_like(windows, dtype=torch.bool) if what == "mask" else None
        recover(student, teacher, plan, TrainingWindows(windows, scored), held_out, settings, tmp_path / "out")
    assert not list(tmp_path.iterdir())
