"""The teacher's states: read from a file or on the way, and cached for several recoveries."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from foldgpt.folding import source_model_of
from foldgpt.objectives import Head, ReducedPredictions
from foldgpt.plan import FoldPlan
from foldgpt.recovery import (
    RecoverySettings,
    TrainingWindows,
)
from foldgpt.recovery.teacher import Teacher, TeacherStates
from foldgpt.recovery.teacher_cache import Kept, cache_states
from foldgpt.recovery.windows import places_in_documents
from models import tiny_model
from recovery_case import recovered_by, recovered_on, step_losses, tiny_windows


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_the_teacher_may_be_read_from_a_file(tmp_path: Path, divergence: str) -> None:
    """Its predictions where the loss can be told from them, its last hidden states otherwise."""
    results = []
    for name in ("fresh", "first", "second"):
        cache = None if name == "fresh" else tmp_path / "cache"
        windows = TrainingWindows(tiny_windows(8, seed=1))
        settings = {"states": 1.0, "divergence": divergence}
        results.append(recovered_on(windows, tmp_path / name, settings, teacher_cache=cache))
    fresh, first, second = (list(step_losses(result.history).values()) for result in results)
    assert first == second
    assert first == (fresh if divergence == "reverse" else pytest.approx(fresh, rel=1e-5))
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("family", "changes", "states", "temperature"),
    [
        ("llama", {}, 0, 1.0),
        ("llama", {"temperature": 2, "lm": 0.5}, 0, 2.0),
        ("llama", {"last_cosine": 1.0}, 1, 1.0),
        ("llama", {"divergence": "skewed"}, 1, None),
        ("llama", {"kl": 0.0, "last_error": 1.0}, 1, None),
        ("llama", {"kl": 0.0, "lm": 1.0, "states": 1.0}, 1, None),
        ("llama", {"kl": 0.0, "lm": 1.0, "states": 1.0, "train_blocks": "behind"}, 2, None),
        ("gemma2", {}, 1, None),
    ],
)
def test_the_cache_holds_what_the_losses_need(
    tmp_path: Path, family: str, changes: dict[str, Any], states: int, temperature: float | None
) -> None:
    """And the student learns from it as it would from the teacher beside it; soft-capped logits are no product."""
    losses = []
    for name in ("fresh", "cached"):
        teacher = tiny_model(family)
        plan = FoldPlan.create(source_model_of(teacher), removed=[4])
        settings = RecoverySettings(**{"batch_size": 4, "rank": 2, **changes})
        cache = None if name == "fresh" else tmp_path / "cache"
        result = recovered_by(teacher, plan, tmp_path / name, settings, windows=(8, 4), teacher_cache=cache)
        losses.append(list(step_losses(result.history).values()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    (file,) = (tmp_path / "cache").iterdir()
    # Of each of 8 · 16 tokens 32 channels, of predictions 32 likeliest tokens, their probabilities and an entropy too.
    predictions = 0 if temperature is None else 32 + 2 * 32 + 1
    assert file.stat().st_size == 8 * 16 * 4 * (32 * states + predictions)


def test_predictions_for_one_temperature_are_not_taken_for_another(tmp_path: Path) -> None:
    teacher, ids = Teacher(tiny_model("llama")), tiny_windows(2, seed=1)
    found = []
    for kept in (Kept(last=False, temperature=1.0), Kept(last=False, temperature=2.0), Kept(temperature=1.0), Kept()):
        table = cache_states(teacher, TrainingWindows(ids), tmp_path, batch_size=2, kept=kept)
        found.append(table.states(torch.arange(2), torch.device("cpu")))
    assert len(list(tmp_path.iterdir())) == 4
    one, two, both, last = (states.predictions for states in found)
    assert one is not None and two is not None and both is not None and last is None
    torch.testing.assert_close(both.tensors, one.tensors)
    assert (one.temperature, two.temperature) == (1, 2)
    assert float(two.own_R.mean()) != pytest.approx(float(one.own_R.mean()), rel=1e-2)
    assert [states.last_BTH is not None for states in found] == [False, False, True, True]


def test_a_teacher_in_a_file_makes_no_logits_in_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what its predictions are kept for; it makes those of the held-out windows alone."""
    rows: list[int] = []
    product = Head.product

    def counted(self: Head, hidden_RH: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden_RH))
        return product(self, hidden_RH)

    settings = RecoverySettings(batch_size=4, rank=2)
    teacher = tiny_model("llama")
    plan = FoldPlan.create(source_model_of(teacher), removed=[4])
    counts = []
    for name in ("fresh", "first", "second"):
        cache = None if name == "fresh" else tmp_path / "cache"
        with monkeypatch.context() as patch:
            patch.setattr(Head, "product", counted)
            recovered_by(teacher, plan, tmp_path / name, settings, windows=(8, 4), teacher_cache=cache)
        counts.append(sum(rows))
        rows.clear()
    assert counts[0] - counts[2] == 8 * 15 and counts[1] - counts[2] == 8 * 16


def test_the_teacher_keeps_documents_apart_by_their_places() -> None:
    teacher, ids = Teacher(tiny_model("llama")), tiny_windows(2, seed=1)
    begins = torch.zeros_like(ids, dtype=torch.bool)
    begins[:, 7] = True
    apart = teacher.states(ids, places_in_documents(begins)).last_BTH[:, 7:]
    torch.testing.assert_close(apart, teacher.states(ids[:, 7:]).last_BTH, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(teacher.states(ids).last_BTH[:, 7:], apart, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_holds_the_stream_in_front_of_the_cut(tmp_path: Path, dtype: torch.dtype) -> None:
    """In the model's own format: from a rounded stream the loss would not be that of the saved model."""
    losses, ways = [], {"divergence": "reverse", "batch_size": 4, "rank": 2, "train_blocks": "behind"}
    for name in ("fresh", "cached"):
        teacher = tiny_model("llama").to(dtype)
        plan = FoldPlan.create(source_model_of(teacher), removed=[4])
        settings = RecoverySettings(**ways)
        cache = None if name == "fresh" else tmp_path / "cache"
        result = recovered_by(teacher, plan, tmp_path / name, settings, windows=(8, 4), teacher_cache=cache)
        losses.append(list(step_losses(result.history).values()))
    assert losses[1] == losses[0]
    (file,) = (tmp_path / "cache").iterdir()
    assert file.stat().st_size == 8 * 16 * 32 * 2 * dtype.itemsize


def test_the_cache_is_of_one_teacher_and_one_text(tmp_path: Path) -> None:
    ids = tiny_windows(4, seed=1)
    models = [tiny_model("llama", seed=seed) for seed in (0, 1)]
    for model, windows in ((models[0], ids), (models[1], ids), (models[0], tiny_windows(4, seed=2)), (models[0], ids)):
        teacher = Teacher(model)
        table = cache_states(teacher, TrainingWindows(windows), tmp_path, batch_size=2, kept=Kept())
        rows = table.states(torch.tensor([3, 1]), torch.device("cpu")).last_BTH
        torch.testing.assert_close(rows, teacher.states(windows[[3, 1]]).last_BTH)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("kept", [Kept(), Kept(last=True, temperature=1.0)])
def test_the_cache_is_of_one_way_to_keep_documents_apart(tmp_path: Path, kept: Kept) -> None:
    teacher, ids = Teacher(tiny_model("llama")), tiny_windows(4, seed=1)
    marks = [torch.zeros_like(ids, dtype=torch.bool) for _ in range(2)]
    marks[0][:, 5], marks[1][:, 9] = True, True
    for begins in (None, *marks, marks[0]):
        # What is scored is nothing to the teacher.
        windows = TrainingWindows(ids, marks[1] if begins is None else None, begins)
        table = cache_states(teacher, windows, tmp_path, batch_size=2, kept=kept)
        places = None if begins is None else places_in_documents(begins)
        found = table.states(torch.arange(4), torch.device("cpu"))
        last_BTH = teacher.states(ids, places).last_BTH
        torch.testing.assert_close(found.last_BTH, last_BTH)
        assert (found.predictions is None) == (kept.temperature is None) and last_BTH is not None
        if found.predictions is not None:
            expected = ReducedPredictions.of(teacher.head, last_BTH.flatten(0, 1))
            torch.testing.assert_close(found.predictions.mean_RH.flatten(0, 1), expected.mean_RH)
            torch.testing.assert_close(found.predictions.own_R.flatten(), expected.own_R)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_cache_is_of_one_config(tmp_path: Path) -> None:
    """The same weights see less text through a shorter window."""
    ids = tiny_windows(4, seed=1)
    found = []
    for changes in ({}, {"sliding_window": 4}):
        teacher = Teacher(tiny_model("mistral", **changes))
        table = cache_states(teacher, TrainingWindows(ids), tmp_path, batch_size=2, kept=Kept())
        rows = table.states(torch.arange(4), torch.device("cpu")).last_BTH
        torch.testing.assert_close(rows, teacher.states(ids).last_BTH)
        found.append(rows)
    assert not torch.allclose(*found, atol=0.1)
    # Others may train on them too.
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~_umask()}


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


@pytest.mark.parametrize("kept", [Kept(), Kept(last=False, temperature=1.0)])
def test_a_cache_that_was_cut_short_is_made_again(tmp_path: Path, kept: Kept) -> None:
    windows, teacher = TrainingWindows(tiny_windows(4, seed=1)), Teacher(tiny_model("llama"))
    cache_states(teacher, windows, tmp_path, batch_size=2, kept=kept)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    cache_states(teacher, windows, tmp_path, batch_size=2, kept=kept)
    assert path.read_bytes() == whole


def test_what_a_kill_leaves_of_the_cache_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, teacher = tiny_windows(4, seed=1), Teacher(tiny_model("llama"))
    states = Teacher.states
    written: set[Path] = set()

    def watched(self: Teacher, *args: Any) -> TeacherStates:
        written.update(tmp_path.glob(".foldgpt-partial-*"))
        return states(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "states", watched)
        cache_states(teacher, TrainingWindows(ids), tmp_path, batch_size=2, kept=Kept())
    (whole,), (partial,) = tmp_path.iterdir(), written
    whole.rename(partial)
    other = tmp_path / ".foldgpt-partial-another.states-abcd1234"
    other.touch()
    cache_states(teacher, TrainingWindows(ids), tmp_path, batch_size=2, kept=Kept())
    assert set(tmp_path.iterdir()) == {whole, other}
