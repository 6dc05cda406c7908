"""Recovery as a whole, on tiny models: it helps, and keeps the best state."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import integration_utils

from foldgpt.artifacts import read_json
from foldgpt.errors import UnsupportedModelError, UsageError
from foldgpt.families import decoder_of
from foldgpt.folding import fold_, source_model_of
from foldgpt.objectives import (
    DivergenceLoss,
    Head,
    ReducedPredictions,
    cosine_distance,
    cross_entropy,
    forward_kl,
    relative_error,
)
from foldgpt.plan import FoldPlan, Group
from foldgpt.recovery import (
    DivergenceError,
    RecoverySettings,
    TrainingWindows,
    check_loggers,
    distillation,
    make_trainable_,
    merge_trained_,
    recover,
)
from foldgpt.recovery.callbacks import TimeBudget
from foldgpt.recovery.common import common_blocks, first_changed
from foldgpt.recovery.distillation import IGNORED, Distillation
from foldgpt.recovery.dropout import without_dropout
from foldgpt.recovery.inputs import check_inputs
from foldgpt.recovery.recover import _arguments as arguments_of
from foldgpt.recovery.recover import _checkpointing_ as checkpointing_
from foldgpt.recovery.states import Body, aligned_blocks
from foldgpt.recovery.teacher import Teacher, TeacherStates
from foldgpt.recovery.trainer import RecoveryTrainer
from foldgpt.recovery.windows import places_in_documents
from models import CONFIGS, tiny_model
from recovery_case import recovered_by, recovered_on, step_losses, tiny_pair, tiny_recovery, tiny_windows

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


def test_the_losses_are_those_of_their_definitions() -> None:
    """Each by itself on the scored positions, from full passes of both models."""
    student, teacher, plan = tiny_pair()
    settings = RecoverySettings(kl=0.5, lm=0.25, last_error=2.0, last_cosine=3.0, states=4.0, states_at="all")
    pairs = aligned_blocks(plan, "all")
    head, taught = Head(student), Teacher(teacher, [source for _, source in pairs])
    module = Distillation(student, settings, head, taught.head, [position for position, _ in pairs])
    ids = tiny_windows(3, seed=4)
    labels = ids.clone()
    labels[:, 5:9] = -100
    theirs, ours = taught.states(ids), Body(student, [position for position, _ in pairs])(ids)
    found = module(ids, labels, None, theirs.last_BTH, theirs.between)

    scored = labels[:, 1:] != -100
    assert int(scored.sum()) == 3 * (15 - 4)

    def rows(states: torch.Tensor) -> torch.Tensor:
        return states[:, :-1][scored].detach()

    expected = {
        "kl": forward_kl(taught.head, rows(theirs.last_BTH), rows(ours.last_BTH), student_head=head).sum(),
        "lm": cross_entropy(head, rows(ours.last_BTH), ids[:, 1:][scored]).sum(),
        "last_error": relative_error(rows(theirs.last_BTH), rows(ours.last_BTH)).sum(),
        "last_cosine": cosine_distance(rows(theirs.last_BTH), rows(ours.last_BTH)).sum(),
        "states": sum(relative_error(rows(t), rows(s)).sum() for t, s in zip(theirs.between, ours.between, strict=True))
        / len(pairs),
    }
    for name, value in expected.items():
        assert float(found[name].detach()) == pytest.approx(float(value), rel=1e-4), name
    total = sum(getattr(settings, name) * float(value) for name, value in expected.items())
    assert float(found["loss"].detach()) == pytest.approx(total, rel=1e-4)


def test_temperature_and_skew_of_the_settings_are_those_of_the_loss() -> None:
    student, teacher, _ = tiny_pair()
    heads = Head(student), Head(teacher)
    ids = tiny_windows(2, seed=4)
    ours, theirs = (Body(model)(ids).last_BTH.detach() for model in (student, teacher))
    logits = [head.logits(states[:, :-1].flatten(0, 1)) for head, states in ((heads[1], theirs), (heads[0], ours))]
    found = {}
    for name, changes in {
        "plain": {},
        "warm": {"temperature": 2.0},
        "more": {"skew": 0.3},
    }.items():
        settings = RecoverySettings(divergence="skewed", **changes)  # type: ignore[arg-type]
        module = Distillation(student, settings, *heads)
        found[name] = float(module(ids, ids, None, theirs)["kl"])
        divergence = DivergenceLoss("skewed", settings.temperature, settings.skew)
        value = divergence(*(table.detach().clone() for table in logits))[0].sum()
        assert found[name] == pytest.approx(float(value), rel=1e-4)
    assert len({round(value, 3) for value in found.values()}) == 3


def test_the_loss_of_a_step_is_the_mean_over_what_is_scored(tmp_path: Path) -> None:
    """The first token of a window follows from nothing, and is not counted."""
    train = TrainingWindows(tiny_windows(8, seed=1))
    result = recovered_on(train, tmp_path / "recovered", {"learning_rate": 1e-12})
    student, teacher, _ = tiny_pair()
    module = Distillation(student, RecoverySettings(), Head(student), Head(teacher))
    ids = train.ids_WT[:4]
    total = float(module(ids, ids, None, Teacher(teacher).states(ids).last_BTH)["loss"])
    assert step_losses(result.history)[1] == pytest.approx(total / (4 * 15), rel=1e-4)


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


def test_states_are_aligned_by_source_index() -> None:
    """Removed blocks 1 and 4 of 6: what leaves block 0 answers to what leaves 1, and 3 to 4."""
    plan = FoldPlan.create(tiny_pair()[2].source, removed=[1, 4])
    assert aligned_blocks(plan, "all") == [(0, 1), (1, 2), (2, 4), (3, 5)]
    assert aligned_blocks(plan, "cuts") == [(0, 1), (2, 4)]
    without = FoldPlan.create(plan.source, removed=[1], removed_mlp=[3])
    assert aligned_blocks(without, "cuts") == [(0, 1), (2, 3)]
    # A position that starts at zero stands where a block was removed, and answers for it.
    zero = Group(blocks=(2, 3), donor="first", start="zero", private=("norms", "scales"))
    assert aligned_blocks(FoldPlan.create(plan.source, removed=[1], groups=[zero]), "cuts") == [(0, 1), (2, 3)]


@torch.no_grad()
def test_a_recovery_compares_states_that_are_aligned(tmp_path: Path) -> None:
    teacher = tiny_model("llama")
    plan = FoldPlan.create(source_model_of(teacher), removed=[1, 4])
    with torch.enable_grad():
        settings = RecoverySettings(states=1.0, rank=2, batch_size=2)
        result = recovered_by(teacher, plan, tmp_path / "out", settings, windows=(2, 4))
    student = copy.deepcopy(teacher)
    fold_(student, plan)
    ids = tiny_windows(4, seed=2)
    theirs, ours = Body(teacher, [1, 4])(ids).between, Body(student, [0, 2])(ids).between
    pairs = zip(theirs, ours, strict=True)
    expected = torch.stack([relative_error(t[:, :-1].flatten(0, 1), s[:, :-1].flatten(0, 1)).mean() for t, s in pairs])
    assert result.before["states"] == pytest.approx(float(expected.mean()), rel=1e-5)


def test_what_folding_changed_first() -> None:
    source = tiny_pair()[2].source

    def first(**changes: Any) -> int:
        return first_changed(FoldPlan.create(source, **changes))

    assert first(removed=[3, 4]) == 2  # block 2 stands before the cut
    assert first(removed=[0]) == 0 and first(removed=[5]) == 4 and first() == 0
    assert first(removed=[4], removed_mlp=[2]) == 2 and first(removed=[1], removed_mlp=[2]) == 0
    assert first(removed=[4], groups=[Group(blocks=(1, 5))]) == 1


@pytest.mark.parametrize("family", CONFIGS)
def test_blocks_in_common_run_once_and_change_nothing(family: str) -> None:
    """Losses and gradients of the student that goes on from the teacher's stream are those of the whole student."""
    teacher = tiny_model(family)
    plan = FoldPlan.create(source_model_of(teacher), removed=[4])
    student = copy.deepcopy(teacher)
    fold_(student, plan)
    settings = RecoverySettings(train_blocks="behind", states=1.0, rank=2)
    head = Head(student)
    make_trainable_(student, plan, settings)
    common = common_blocks(student, teacher, plan)
    assert common == 3
    taught = Teacher(teacher, [4], common)
    module = Distillation(student, settings, head, taught.head, [3], common)
    ids = tiny_windows(2, seed=4)
    theirs = taught.states(ids)
    assert theirs.entry_BTH is not None and len(theirs.between) == 1
    calls = []
    skipped = decoder_of(student).blocks[1]
    handle = skipped.register_forward_hook(lambda block, *_: calls.append(vars(block).get("forward")))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    results = []
    for entry in (None, theirs.entry_BTH):
        sums = module(ids, ids, None, theirs.last_BTH, theirs.between, entry)
        results.append([sums["loss"], *torch.autograd.grad(sums["loss"], trained)])
    handle.remove()
    assert calls[0] is None and calls[1] is not None, "the second time the block was passed over"
    assert all("forward" not in vars(block) for block in decoder_of(student).blocks)
    for whole, rest in zip(*results, strict=True):
        torch.testing.assert_close(rest, whole, rtol=1e-5, atol=1e-6)


def test_the_error_of_states_is_the_mean_of_all_places_also_where_blocks_are_in_common(tmp_path: Path) -> None:
    """Behind common blocks there is no error, which counts as none and not as no place."""
    teacher = tiny_model("llama")
    plan = FoldPlan.create(source_model_of(teacher), removed=[4])
    before = [
        recovered_by(
            teacher,
            plan,
            tmp_path / which,
            RecoverySettings(train_blocks=which, states=1.0, states_at="all", rank=2),
            windows=(4, 4),
        ).before
        for which in ("all", "behind")
    ]
    assert before[0]["states"] > 0
    assert before[1] == pytest.approx(before[0], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.uint8], ids=str)
def test_ids_may_be_of_any_integer_type(tmp_path: Path, dtype: torch.dtype) -> None:
    windows = TrainingWindows(tiny_windows(8, seed=1).to(dtype))
    assert recovered_on(windows, tmp_path / "out").num_steps == 2


def test_numbers_of_numpy_are_settings_as_any_others(tmp_path: Path) -> None:
    given = RecoverySettings(rank=numpy.int64(2), learning_rate=numpy.float32(0.5), minutes=numpy.float64(3))
    assert [type(value) for value in (given.rank, given.learning_rate, given.minutes)] == [int, float, float]
    assert given == RecoverySettings(rank=2, learning_rate=0.5, minutes=3.0)
    json.dumps(given.identity())


def test_blocks_that_are_trained_or_differ_are_not_in_common() -> None:
    teacher = tiny_model("llama")
    plan = FoldPlan.create(source_model_of(teacher), removed=[4])

    def common(settings: RecoverySettings, change: str = "") -> int:
        student = copy.deepcopy(teacher)
        fold_(student, plan)
        with torch.no_grad():
            dict(student.named_parameters()).get(change, torch.zeros(1)).add_(1e-3)
        make_trainable_(student, plan, settings)
        return common_blocks(student, teacher, plan)

    behind = RecoverySettings(train_blocks="behind")
    assert common(behind) == 3 and common(RecoverySettings()) == 0
    assert common(RecoverySettings(rank=0, norms=False, train_fully="cuts")) == 3
    assert common(behind, "model.layers.1.mlp.up_proj.weight") == 1
    assert common(behind, "model.embed_tokens.weight") == 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("family", "drops"),
    [
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
        ("llama", {"attention_dropout": 0.5}),
        ("falcon", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
    ],
)
def test_a_student_is_trained_as_it_is_measured(
    family: str, drops: dict[str, float], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the dropout of its source's pre-training: the teacher, too, runs without."""
    student, teacher, plan = tiny_pair(family, shared=False, **drops)
    settings = RecoverySettings(rank=2)
    head = Head(student)
    make_trainable_(student, plan, settings)
    if checkpointing:
        checkpointing_(student, True)
    taught, ids = Teacher(teacher), tiny_windows(4, seed=4)
    module = Distillation(student, settings, head, taught.head)
    theirs = taught.states(ids).last_BTH
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]

    def found() -> list[torch.Tensor]:
        loss = module(ids, ids, None, theirs)["loss"]
        return [loss, *torch.autograd.grad(loss, trained)]

    module.eval()
    measured = found()
    blocks = decoder_of(student).blocks
    for own_code in (False, True):
        # Code of its own may be without gradients when it is not in training.
        monkeypatch.setattr(distillation, "brings_own_code", lambda _, own_code=own_code: own_code)
        module.train()
        assert module.training and all(block.training == (checkpointing or own_code) for block in blocks)
        assert next(blocks[0].children()).training == own_code
        with without_dropout(student):
            for _ in range(2):
                torch.testing.assert_close(found(), measured, rtol=1e-5, atol=1e-6)
        assert {name: getattr(student.config, name) for name in drops} == drops
    with torch.no_grad():
        assert not torch.equal(module(ids, ids, None, theirs)["loss"], measured[0]), "there is dropout again"


def test_a_student_that_lost_nothing_has_no_loss(tmp_path: Path) -> None:
    student = tiny_model("llama")
    plan = FoldPlan.create(tiny_pair()[2].source)
    teacher = tiny_model("llama")
    taught = Teacher(teacher, [source for _, source in aligned_blocks(plan, "all")])
    settings = RecoverySettings(last_error=1.0, states=1.0, states_at="all")
    module = Distillation(student, settings, Head(student), taught.head, range(6))
    ids = tiny_windows(2, seed=0)
    theirs = taught.states(ids)
    assert abs(float(module(ids, ids, None, theirs.last_BTH, theirs.between)["loss"].detach())) < 1e-5


def test_micro_batches_do_not_change_the_step_even_where_masks_differ(tmp_path: Path) -> None:
    """The mean is over the scored tokens of the step, not over micro-batches."""
    scored = torch.ones(8, 16, dtype=torch.bool)
    scored[0, 2:] = False
    scored[3, 8:] = False
    losses = []
    for size in (1, 4):
        windows = TrainingWindows(tiny_windows(8, seed=1), scored)
        result = recovered_on(windows, tmp_path / str(size), {"micro_batch_size": size})
        losses.append(list(step_losses(result.history).values()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_step_with_nothing_to_score_changes_nothing(tmp_path: Path) -> None:
    """Chats whose replies lie beyond the context: no gradient, no NaN in the history, and it can be saved."""
    scored = torch.ones(12, 16, dtype=torch.bool)
    scored[4:8] = False
    result = recovered_on(TrainingWindows(tiny_windows(12, seed=1), scored), tmp_path / "out")
    losses = list(step_losses(result.history).values())
    assert losses[1] == 0 and losses[0] > 0 and losses[2] > 0
    assert (tmp_path / "out" / "recovery.json").is_file()


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


@pytest.mark.parametrize("family", CONFIGS)
def test_documents_are_kept_apart_or_the_model_is_refused(family: str) -> None:
    """In bf16 as well, where the same states of other shapes are not the same to the bit."""
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(family).to(dtype)
        plan = FoldPlan.create(source_model_of(model))
        settings = RecoverySettings(kl=0, lm=1)
        ids = tiny_windows(1, seed=1)
        windows = TrainingWindows(ids, begins_WT=torch.zeros_like(ids, dtype=torch.bool))
        mixed = TrainingWindows(tiny_windows(1, seed=1))
        check_inputs(model, None, plan, settings, mixed, mixed)
        if family == "opt":
            with pytest.raises(UnsupportedModelError, match="OPTForCausalLM does not keep the documents"):
                check_inputs(model, None, plan, settings, windows, windows)
        else:
            check_inputs(model, None, plan, settings, windows, windows)


def test_documents_are_kept_apart_where_asked(tmp_path: Path) -> None:
    ids = tiny_windows(2, seed=3)
    begins = torch.zeros_like(ids, dtype=torch.bool)
    begins[:, 7] = True
    places = places_in_documents(begins)
    assert places[0].tolist() == [*range(7), *range(9)]
    body = Body(tiny_model("llama"))
    apart = body(ids, places).last_BTH
    alone = body(ids[:, 7:]).last_BTH
    torch.testing.assert_close(apart[:, 7:], alone, rtol=1e-4, atol=1e-4)
    mixed = body(ids).last_BTH
    assert float((mixed[:, 7:] - alone).abs().max().detach()) > 0.05


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


def test_without_a_compiler_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldgpt.recovery.compiled._BACKEND", "nonsense")
    with pytest.raises(UsageError, match=r"torch\.compile does not work on cpu here; train without.*nonsense"):
        tiny_recovery(tmp_path, compile=True)
    assert not list(tmp_path.iterdir())


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


def test_a_document_does_not_predict_the_next_one() -> None:
    """Its first token would be learned from the last document's end."""
    begins = torch.tensor([[0, 0, 0, 1, 0, 0, 1]], dtype=torch.uint8)
    item = TrainingWindows(torch.tensor([[7, 8, 2, 9, 5, 2, 6]]), begins_WT=begins)[0]
    assert item["positions"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert item["labels"].tolist() == [IGNORED, 8, 2, IGNORED, 5, 2, IGNORED]


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
