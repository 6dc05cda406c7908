"""A recovery from its first step to its last, and what is kept of it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from foldgpt.artifacts import read_json
from foldgpt.families import decoder_of
from foldgpt.folding import source_model_of
from foldgpt.objectives import (
    Head,
    ReducedPredictions,
    forward_kl,
)
from foldgpt.plan import FoldPlan, Group
from foldgpt.recovery import (
    DivergenceError,
    RecoverySettings,
    TrainingWindows,
    merge_trained_,
)
from foldgpt.recovery.callbacks import TimeBudget
from foldgpt.recovery.recover import _arguments as arguments_of
from foldgpt.recovery.states import Body
from foldgpt.recovery.teacher import TeacherStates
from foldgpt.recovery.trainer import RecoveryTrainer
from models import tiny_model
from recovery_case import recovered_by, step_losses, tiny_pair, tiny_recovery, tiny_windows

#: The module, whose name in the package is that of its function.
RECOVER = importlib.import_module("foldgpt.recovery.recover")


def test_recovery_brings_the_student_nearer_and_saves_what_it_measured(tmp_path: Path) -> None:
    result = tiny_recovery(tmp_path, windows=96)
    assert result.after["loss"] < 0.97 * result.before["loss"]
    assert result.num_steps == 24 and result.num_tokens == 96 * 16 and result.ended == "tokens"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "recovered")
    student, teacher, _ = tiny_pair()
    assert sum(p.numel() for p in saved.parameters()) == sum(p.numel() for p in student.parameters())
    ids = tiny_windows(8, seed=2)
    head = Head(teacher)
    hidden = [Body(model)(ids).last_BTH[:, :-1].flatten(0, 1).detach() for model in (teacher, saved)]
    kl = float(forward_kl(head, *hidden).mean())
    assert kl == pytest.approx(result.after["kl"], rel=1e-4)
    assert read_json(tmp_path / "recovered" / "recovery.json") == result.to_json_dict()
    assert [entry.name for entry in tmp_path.iterdir()] == ["recovered"]


def test_the_settings_of_the_optimiser_reach_it(tmp_path: Path) -> None:
    settings = RecoverySettings(
        batch_size=2, warmup_ratio=0.25, weight_decay=0.1, max_grad_norm=0.3, learning_rate=2e-3, seed=7
    )
    train = TrainingWindows(tiny_windows(40, seed=1))
    args, _ = arguments_of(settings, train, tmp_path, cpu=True, report_to=[])
    found = (args.max_steps, args.warmup_steps, args.weight_decay, args.max_grad_norm, args.learning_rate, args.seed)
    assert found == (20, 5, 0.1, 0.3, 2e-3, 7)


def test_minutes_are_minutes() -> None:
    clock = TimeBudget(None)
    clock.spent = 59
    assert not clock.has_spent(1)
    clock.spent = 61
    assert clock.has_spent(1)


def test_the_last_step_is_measured_wherever_it_falls(tmp_path: Path) -> None:
    result = tiny_recovery(tmp_path, windows=44, evaluate_every=3)
    assert result.num_steps == 11
    assert [int(row["step"]) for row in result.history if "eval_loss" in row] == [3, 6, 9, 11]


def test_nan_stops_with_the_last_good_state_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = RecoveryTrainer.compute_loss

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 7 else loss

    monkeypatch.setattr(RecoveryTrainer, "compute_loss", broken)
    with pytest.raises(DivergenceError, match=r"not finite in step 8; the best state so far .* is kept in") as caught:
        tiny_recovery(tmp_path)
    kept = Path(str(caught.value).partition("kept in ")[2].partition(". A lower")[0])
    assert (kept / "model.safetensors").is_file()
    assert not (tmp_path / "recovered").exists()


def test_divergence_stops_it(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match="held-out loss is"):
        tiny_recovery(tmp_path, learning_rate=3.0, warmup_ratio=0.0, evaluate_every=1)


def test_a_position_that_starts_at_zero_grows_and_its_scales_have_a_rate_of_their_own(tmp_path: Path) -> None:
    zero = Group(blocks=(2, 3), donor="last", start="zero", private=("norms", "scales"), ranks=2)
    sizes = []
    for rate in (1.0, 10.0):
        teacher = tiny_model("llama")
        plan = FoldPlan.create(source_model_of(teacher), groups=[zero])
        settings = RecoverySettings(batch_size=4, evaluate_every=3, rank=4, learning_rate=3e-3, scale_rate=rate)
        result = recovered_by(teacher, plan, tmp_path / f"recovered-{rate}", settings, windows=(48, 8))
        assert result.after["loss"] < result.before["loss"]
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"recovered-{rate}")
        terms = saved.model.layers[2].mlp.down_proj
        assert terms.up.abs().max() > 0
        sizes.append(float(terms.scale.abs().mean().detach()))
    # Adam's first steps are as long as the learning rate.
    assert 0 < 4 * sizes[0] < sizes[1]


def test_what_makes_nothing_better_leaves_the_student_as_it_was(tmp_path: Path) -> None:
    result = tiny_recovery(tmp_path, learning_rate=0.2, warmup_ratio=0.0, windows=8, evaluate_every=1)
    student, _, _ = tiny_pair()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "recovered")
    assert result.best_step == 0 and result.after == pytest.approx(result.before)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), saved.parameters(), strict=True))


def test_the_best_state_is_kept_and_patience_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([1.0, 0.5, 0.7, 0.8, 0.9, 0.55])  # the start, four measurements, and the merged model
    weights: list[torch.Tensor] = []

    def trained(model: torch.nn.Module) -> torch.Tensor:
        found = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
        return torch.cat([torch.zeros(1), *found])  # nothing is, once it is merged

    def measure(self: Any) -> dict[str, float]:
        weights.append(trained(self.model))
        return {"loss": next(measured)}

    def merge_(student: torch.nn.Module) -> None:
        weights.append(trained(student))
        merge_trained_(student)

    monkeypatch.setattr(RecoveryTrainer, "measure", measure)
    monkeypatch.setattr(RECOVER, "merge_trained_", merge_)
    result = tiny_recovery(tmp_path, patience=2, windows=96)
    assert result.best_step == 3 and result.num_steps == 9 and result.ended == "patience"
    _, at_3, at_6, at_9, saved, _ = weights
    assert torch.equal(saved, at_3) and not torch.equal(at_3, at_6) and not torch.equal(at_3, at_9)


def test_the_time_ends_it_and_what_was_reached_is_saved(tmp_path: Path) -> None:
    result = tiny_recovery(tmp_path, minutes=1e-6)
    assert result.ended == "time" and result.num_steps == 1
    assert (tmp_path / "recovered" / "config.json").is_file()


def test_what_is_only_measured_by_does_not_stay_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's states on the held-out windows lie in the machine's memory between measurements."""
    moved: list[str] = []

    def to(self: TeacherStates, device: torch.device | str) -> TeacherStates:
        moved.append(f"to {device}" if isinstance(device, str) else "back")
        return self

    monkeypatch.setattr(TeacherStates, "to", to)
    tiny_recovery(tmp_path)
    # 8 held-out windows, two at a time, and six measurements.
    assert moved[:8] == ["to cpu", "back"] * 4 and moved[8:] == ["back"] * 20
    monkeypatch.undo()
    predictions = ReducedPredictions(*torch.zeros(4, 1))
    states = TeacherStates(torch.zeros(1), (torch.zeros(2),), torch.zeros(3), predictions).to("meta")
    tensors = [states.last_BTH, *states.between, states.entry_BTH, *states.predictions.tensors]
    assert [tensor.device.type for tensor in tensors] == ["meta"] * 7  # type: ignore[union-attr]


def test_gradient_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    plain = tiny_recovery(tmp_path / "plain", windows=8)
    saving = tiny_recovery(tmp_path / "saving", windows=8, gradient_checkpointing=True)
    assert list(step_losses(saving.history).values()) == pytest.approx(list(step_losses(plain.history).values()))


def test_compiled_blocks_change_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[int] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:  # needs no C++ compiler
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr("foldgpt.recovery.compiled._BACKEND", backend)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    torch._dynamo.reset()
    plain = tiny_recovery(tmp_path / "plain", windows=12, train_fully="cuts", lm=0.5)
    calls: list[nn.Module] = []
    compile_ = nn.Module.compile

    def seen(self: nn.Module, **options: Any) -> None:
        calls.append(self)
        compile_(self, **options)

    monkeypatch.setattr(nn.Module, "compile", seen)
    compiled = tiny_recovery(tmp_path / "compiled", windows=12, train_fully="cuts", lm=0.5, compile=True)
    assert list(step_losses(compiled.history).values()) == pytest.approx(list(step_losses(plain.history).values()))
    assert compiled.after == pytest.approx(plain.after)
    student, teacher, _ = tiny_pair()
    assert len(calls) == len(decoder_of(student).blocks) + len(decoder_of(teacher).blocks)
    assert all(block._compiled_call_impl is None for block in calls)
    assert sum(nodes > 20 for nodes in graphs) >= 2, "whole blocks, with and without gradients"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_decay_leaves_private_scales_and_norms_alone(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decayed: set[str] = set()
    names = RecoveryTrainer.get_decay_parameter_names

    def watched(self: RecoveryTrainer, model: Any) -> list[str]:
        found = names(self, model)
        decayed.update(found)
        return found

    monkeypatch.setattr(RecoveryTrainer, "get_decay_parameter_names", watched)
    teacher = tiny_model("llama").to(dtype)
    group = Group(blocks=(1, 2), donor="mean", private=("norms", "scales"), ranks=2)
    plan = FoldPlan.create(source_model_of(teacher), groups=[group])
    recovered_by(teacher, plan, tmp_path / "out", RecoverySettings(weight_decay=0.1, rank=2), windows=(4, 4))
    assert any("up" in name.split(".") for name in decayed)
    assert not [name for name in decayed if "scale" in name.split(".") or "norm" in name]


def test_a_single_step_trains(tmp_path: Path) -> None:
    teacher = tiny_model("llama")
    plan = FoldPlan.create(source_model_of(teacher), removed=[2])
    result = recovered_by(teacher, plan, tmp_path / "out", RecoverySettings(), windows=(2, 4))
    assert [entry["learning_rate"] for entry in result.history if "learning_rate" in entry] == [1e-3]


def test_what_overflowed_on_the_way_is_no_number_of_the_record() -> None:
    """JSON has none for it, so the model that was trained could not be saved."""
    assert RECOVER._finite({"step": 1, "grad_norm": float("inf"), "loss": 2.0}) == {"step": 1, "loss": 2.0}
