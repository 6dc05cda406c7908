"""Recoveries that are interrupted: what is kept, what goes on, and what is not taken for another."""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import forked
from foldgpt.artifacts import alone
from foldgpt.errors import ArtifactError, UsageError
from foldgpt.recovery import RecoverySettings, TrainingWindows, recover, remove_work, work_beside
from foldgpt.recovery.trainer import RecoveryTrainer
from recovery_case import recover_by, recovered_on, run, step_losses, tiny_pair, tiny_recovery, tiny_windows

#: The module, whose name in the package is that of its function.
RECOVER = importlib.import_module("foldgpt.recovery.recover")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The order of sums, and so the last bit, depends on the number of threads."""
    given = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(given)


def test_killed_at_any_moment_it_ends_in_the_same_result(tmp_path: Path, one_thread: None) -> None:
    """SIGKILL; losses and saved weights equal those of an undisturbed run bit by bit."""
    changes = {"windows": 120, "evaluate_every": 4, "patience": 50}
    whole = tiny_recovery(tmp_path / "whole", **changes)
    folder = tmp_path / "killed"
    work = folder / ".recovered.recovery"
    process = forked.start(tmp_path / "said.txt", recover_by, folder, changes)
    deadline = time.monotonic() + 120
    while not (work / "checkpoint-8" / "complete.json").is_file():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()
    assert not (folder / "recovered").exists()
    (work / "checkpoint-999").mkdir()  # as if it had been killed while it saved
    resumed = run(folder, changes)
    assert step_losses(resumed["history"]) == step_losses(whole.history)
    assert resumed["after"] == whole.after and resumed["best_step"] == whole.best_step
    first, second = ((tmp_path / name / "recovered" / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert first == second


def stopped_in_step(folder: Path, monkeypatch: pytest.MonkeyPatch, step: int, **changes: Any) -> None:
    """A tiny recovery that is stopped before it has done a step; it is measured and saved after each third."""
    clip = RecoveryTrainer._clip_grad_norm

    def stop(self: Any, model: Any) -> Any:
        if self.state.global_step + 1 == step:
            raise KeyboardInterrupt
        return clip(self, model)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RecoveryTrainer, "_clip_grad_norm", stop)
        tiny_recovery(folder, **changes)


def test_an_unfinished_recovery_is_not_taken_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_in_step(tmp_path, monkeypatch, 5)
    with pytest.raises(ArtifactError, match=r"other inputs \(settings\)"):
        tiny_recovery(tmp_path, seed=5)
    with pytest.raises(ArtifactError, match=r"other inputs \(train\)"):
        tiny_recovery(tmp_path, windows=96)
    assert tiny_recovery(tmp_path).num_steps == 12


def test_a_recovery_is_told_from_others_by_all_that_decides_its_result() -> None:
    student, teacher, plan = tiny_pair()
    train, held_out = TrainingWindows(tiny_windows(8, seed=1)), TrainingWindows(tiny_windows(4, seed=2))
    others = TrainingWindows(tiny_windows(4, seed=3))
    settings = RecoverySettings()
    identities = [
        RECOVER._identity(*given)
        for given in (
            (student, teacher, plan, train, held_out, settings),
            (student, teacher, plan, others, held_out, settings),
            (student, teacher, plan, train, others, settings),
            (teacher, teacher, plan, train, held_out, settings),
            (student, None, plan, train, held_out, settings),
            (student, teacher, plan, train, held_out, replace(settings, temperature=2.0)),
        )
    ]
    assert all(one != other for one, other in itertools.combinations(identities, 2))
    apart = {"minutes", "micro_batch_size", "gradient_checkpointing", "compile"}
    assert settings.identity().keys() == {field.name for field in fields(settings)} - apart


def test_one_that_has_trained_nothing_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was refused, or ran out of memory, before its first checkpoint."""
    with pytest.raises(UsageError, match="nothing is trained"):
        tiny_recovery(tmp_path, rank=0, norms=False, private_terms=True)
    stopped_in_step(tmp_path, monkeypatch, 2, seed=3)
    assert tiny_recovery(tmp_path, seed=5).num_steps == 12


def test_one_that_ran_out_of_memory_goes_on_with_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    whole = tiny_recovery(tmp_path / "whole")
    stopped_in_step(tmp_path / "less", monkeypatch, 8)
    starts = []
    step = RecoveryTrainer.training_step

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        starts.append(self.state.global_step)
        return step(self, *arguments, **named)

    monkeypatch.setattr(RecoveryTrainer, "training_step", counted)
    less = tiny_recovery(tmp_path / "less", micro_batch_size=1, gradient_checkpointing=True)
    assert starts == [step for step in range(6, 12) for _ in range(4)]
    assert step_losses(less.history) == pytest.approx(step_losses(whole.history), rel=1e-4)


def test_one_that_patience_had_ended_is_only_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = (1.0, 0.5, 0.7, 0.8)
    measured_as(monkeypatch, *measured, 0.5)
    whole = tiny_recovery(tmp_path / "whole", patience=2, windows=96)
    measured_as(monkeypatch, *measured)
    stopped(tmp_path / "killed", monkeypatch, RECOVER, "merge_trained_", stop_at_the_end, patience=2, windows=96)
    measured_as(monkeypatch, 1.0, 0.5)
    resumed = tiny_recovery(tmp_path / "killed", patience=2, windows=96)
    assert (whole.ended, whole.num_steps, whole.best_step, whole.num_tokens) == ("patience", 9, 3, 9 * 64)
    assert resumed == replace(whole, seconds=resumed.seconds, history=resumed.history)
    files = [(tmp_path / name / "recovered" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]


@pytest.mark.parametrize(("minutes", "steps", "ended"), [(1e-6, 1, "time"), (60, 12, "tokens"), (None, 12, "tokens")])
def test_one_that_its_time_had_ended_goes_on_if_it_is_given_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float | None, steps: int, ended: str
) -> None:
    stopped(tmp_path, monkeypatch, RECOVER, "merge_trained_", stop_at_the_end, minutes=1e-6)
    result = tiny_recovery(tmp_path, minutes=minutes)
    assert (result.num_steps, result.ended) == (steps, ended)


@pytest.mark.parametrize(
    "full",
    [
        SafetensorError("No space left on device"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 93120 vs 93012"),
    ],
    ids=repr,
)
def test_a_disk_that_is_full_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Exception
) -> None:
    save = RecoveryTrainer._save

    def no_space(self: Any, *arguments: Any, **named: Any) -> None:
        if self.state.global_step == 6:
            raise full
        save(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(RecoveryTrainer, "_save", no_space)
        with pytest.raises(ArtifactError, match=r"checkpoint of step 6 .*is kept"):
            tiny_recovery(tmp_path)
        with pytest.raises(ArtifactError, match=r"checkpoint of step 6 .*There was none before it"):
            tiny_recovery(tmp_path / "late", evaluate_every=6)
    assert not (tmp_path / ".recovered.recovery" / "checkpoint-6").exists()
    assert (tmp_path / ".recovered.recovery" / "checkpoint-3" / "complete.json").is_file()
    assert tiny_recovery(tmp_path).num_steps == 12


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), OSError("gone")], ids=repr)
def test_a_student_that_was_half_trained_is_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: BaseException
) -> None:
    """Its weights are neither those that were given nor those of any checkpoint, and LoRA's terms are in it."""
    student, teacher, plan = tiny_pair()
    windows, held_out = TrainingWindows(tiny_windows(16, seed=1)), TrainingWindows(tiny_windows(8, seed=2))

    def again(out: str, **settings: Any) -> Any:
        given = RecoverySettings(batch_size=4, rank=2, **settings)
        return recover(student, teacher, plan, windows, held_out, given, tmp_path / out)

    def stop(*_: Any, **__: Any) -> None:
        raise stopped

    def full(*_: Any, **__: Any) -> None:
        raise ArtifactError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(type(stopped)):
        patch.setattr(RecoveryTrainer, "training_step", stop)
        again("out")
    for settings in ({}, {"learning_rate": 1e-4}):
        with pytest.raises(UsageError, match="changed by a recovery that was broken off: load it again"):
            again("other", **settings)
    student = tiny_pair()[0]
    with monkeypatch.context() as patch, pytest.raises(ArtifactError, match="disk"):
        patch.setattr(RECOVER, "save_folded", full)
        again("out")
    with pytest.raises(UsageError, match="load it again"):
        again("out")
    student = tiny_pair()[0]
    again("out")
    again("more"), "one that came to its end may be trained again"


@pytest.mark.parametrize("inside", ["", "deeper/still"], ids=repr)
def test_what_is_kept_meanwhile_does_not_lie_where_the_model_will(tmp_path: Path, inside: str) -> None:
    """With it in there the model could not be saved, once it is trained."""
    out = tmp_path / "out"
    train = TrainingWindows(tiny_windows(8, seed=1))
    for name in ("work", "teacher_cache"):
        with pytest.raises(UsageError, match=f"{name} is .*, and .*out is where the recovered model will be"):
            recovered_on(train, out, **{name: out / inside})
    with pytest.raises(UsageError, match=r"out lies in work, .*, which is removed in the end"):
        recovered_on(train, out, work=tmp_path)
    with pytest.raises(UsageError, match=r"states lies in work, .*work, which is removed in the end"):
        recovered_on(train, out, work=tmp_path / "work", teacher_cache=tmp_path / "work" / "states")
    assert not list(tmp_path.iterdir())


def test_what_is_recorded_does_not_tell_an_interrupted_training_from_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers sums up the steps since the last start."""
    whole = tiny_recovery(tmp_path / "whole")
    save = RecoveryTrainer._save_checkpoint

    def killed(self: Any, *arguments: Any) -> None:
        save(self, *arguments)
        if self.state.global_step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RecoveryTrainer, "_save_checkpoint", killed)
        tiny_recovery(tmp_path / "stopped")
    resumed = tiny_recovery(tmp_path / "stopped")
    timed = {"epoch", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}

    def without_times(history: list[dict[str, float]]) -> list[dict[str, float]]:
        return [{name: value for name, value in row.items() if name not in timed} for row in history]

    assert without_times(resumed.history) == without_times(whole.history)


def test_two_processes_do_not_recover_into_one_place(tmp_path: Path) -> None:
    """The second would take what the first has for a killed one's, and remove it."""
    place = work_beside(tmp_path / "recovered")
    with alone(place), pytest.raises(ArtifactError, match="another process is writing"):
        tiny_recovery(tmp_path)
    assert tiny_recovery(tmp_path).num_steps == 12
    assert [entry.name for entry in tmp_path.iterdir()] == ["recovered"]


def test_an_error_of_another_kind_while_saving_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="closed by peer"):
        patch.setattr(RecoveryTrainer, "_save", lost)
        tiny_recovery(tmp_path)


def test_the_work_stays_for_a_caller_who_asks_for_it(tmp_path: Path) -> None:
    windows, out = TrainingWindows(tiny_windows(8, seed=1)), tmp_path / "out"
    first = recovered_on(windows, out, keep_work=True)
    assert work_beside(out).is_dir()
    again = recovered_on(windows, out, keep_work=True, replace=True)
    assert again.after == first.after and step_losses(again.history) == step_losses(first.history)
    remove_work(work_beside(out))
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_of_other_files_is_not_taken_for_the_checkpoints(tmp_path: Path, replace: bool) -> None:
    own = tmp_path / "work" / "checkpoint-1" / "mine.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    windows = TrainingWindows(tiny_windows(8, seed=1))
    with pytest.raises(ArtifactError, match="work holds something else than an unfinished recovery"):
        recovered_on(windows, tmp_path / "out", work=tmp_path / "work", replace=replace)
    assert own.read_text() == "mine" and not (tmp_path / "out").exists()
    # Empty, or killed before it was said whose it is: taken.
    own.unlink()
    own.parent.rmdir()
    (tmp_path / "work" / ".foldgpt-partial-identity.json-abcd1234").write_text("{")
    recovered_on(windows, tmp_path / "out", work=tmp_path / "work", replace=replace)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def measured_as(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Held-out losses in the order in which they are asked for."""
    given = iter(losses)
    monkeypatch.setattr(RecoveryTrainer, "measure", lambda _: {"loss": next(given)})


def stopped(folder: Path, monkeypatch: pytest.MonkeyPatch, target: Any, name: str, stop: Any, **changes: Any) -> None:
    """A tiny recovery in which something is replaced by what stops it."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(target, name, stop)
        tiny_recovery(folder, **changes)


def test_a_kill_while_older_checkpoints_are_dropped_leaves_one_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best is the first; so the last but one goes, and no other is left than the one that was just saved."""
    rmtree = shutil.rmtree

    def kill(path: Any, *args: Any, **kwargs: Any) -> None:
        found = next(Path(path).rglob("optimizer.pt"), None)
        if found is None:
            rmtree(path, *args, **kwargs)
        else:
            found.unlink()
            raise KeyboardInterrupt

    measured_as(monkeypatch, 1.0, 0.5, 0.7, 0.8)
    stopped(tmp_path, monkeypatch, shutil, "rmtree", kill)
    measured_as(monkeypatch, 1.0, 0.9, 0.5)
    result = tiny_recovery(tmp_path)
    assert result.best_step == 3 and result.num_steps == 12
    assert [entry.name for entry in tmp_path.iterdir()] == ["recovered"]


def stop_at_the_end(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_recovery_that_goes_on_in_another_place_still_saves_its_best_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    measured_as(monkeypatch, 1.0, 0.5, 0.7, 0.8, 0.9, 0.5)
    tiny_recovery(tmp_path / "whole")
    measured_as(monkeypatch, 1.0, 0.5, 0.7, 0.8, 0.9)
    stopped(tmp_path / "before", monkeypatch, RECOVER, "merge_trained_", stop_at_the_end)
    (tmp_path / "before").rename(tmp_path / "after")
    measured_as(monkeypatch, 1.0, 0.5)
    assert tiny_recovery(tmp_path / "after").best_step == 3
    whole, after = ((tmp_path / name / "recovered" / "model.safetensors").read_bytes() for name in ("whole", "after"))
    assert whole == after


def test_a_best_state_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = Path(".recovered.recovery") / "checkpoint-3"
    measured_as(monkeypatch, 1.0, 0.5, 0.7, 0.8, 0.9)
    stopped(tmp_path, monkeypatch, RECOVER, "merge_trained_", stop_at_the_end)
    shutil.rmtree(tmp_path / best)
    measured_as(monkeypatch, 1.0)
    with pytest.raises(ArtifactError, match="checkpoint-3, is gone"):
        tiny_recovery(tmp_path)

    given = iter([1.0, 0.5, 0.7, 0.8, 0.9])

    def measure(_: Any) -> dict[str, float]:
        value = next(given)
        if value == 0.9:
            shutil.rmtree(tmp_path / "while" / best)
        return {"loss": value}

    monkeypatch.setattr(RecoveryTrainer, "measure", measure)
    with pytest.raises(ArtifactError, match="best state, step 3, is gone"):
        tiny_recovery(tmp_path / "while")
    assert not (tmp_path / "while" / "recovered").exists()


@pytest.mark.parametrize("minutes", [60, None])
def test_how_long_it_may_take_is_said_by_the_call_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float | None
) -> None:
    class Stopped(Exception):
        pass

    step = RecoveryTrainer.training_step
    steps = 0

    def stopped(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 9:  # two micro-batches in each step; the last measurement was after the third
            raise Stopped
        return step(self, *arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(RecoveryTrainer, "training_step", stopped)
        tiny_recovery(tmp_path, minutes=minutes)
    result = tiny_recovery(tmp_path, minutes=1e-6)
    assert result.ended == "time" and result.num_steps == 4


@pytest.mark.parametrize(("kept", "seconds"), [(True, 240), (False, 180)])
def test_seconds_are_those_of_all_steps_that_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool, seconds: int
) -> None:
    """24 micro-batches of ten seconds, stopped in the ninth; those since the last checkpoint are made again."""
    now = 0
    step = RecoveryTrainer.training_step

    def slow(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal now
        if now == 80 and self.state.global_step == 4:
            raise KeyboardInterrupt
        now += 10
        return step(self, *arguments, **named)

    monkeypatch.setattr("foldgpt.recovery.callbacks.time", SimpleNamespace(monotonic=lambda: now))
    stopped(tmp_path, monkeypatch, RecoveryTrainer, "training_step", slow)
    if not kept:  # as another version may have left it
        path = tmp_path / ".recovered.recovery" / "checkpoint-3" / "trainer_state.json"
        state = json.loads(path.read_text())
        del state["stateful_callbacks"]["TimeBudget"]
        path.write_text(json.dumps(state))
    monkeypatch.setattr(RecoveryTrainer, "training_step", slow)
    result = tiny_recovery(tmp_path)
    assert result.num_steps == 12 and result.seconds == seconds


def test_another_unfinished_recovery_is_dropped_where_the_output_is_to_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_in_step(tmp_path, monkeypatch, 5)
    result = recovered_on(TrainingWindows(tiny_windows(8, seed=1)), tmp_path / "recovered", replace=True)
    assert result.num_steps == 2
    assert "dropping an unfinished recovery with other inputs" in capsys.readouterr().err
