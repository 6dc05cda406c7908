"""What a recovery step lowers: the losses by their definitions, on the positions and states that they are of."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from foldgpt.errors import UnsupportedModelError
from foldgpt.families import decoder_of
from foldgpt.folding import fold_, source_model_of
from foldgpt.objectives import (
    DivergenceLoss,
    Head,
    cosine_distance,
    cross_entropy,
    forward_kl,
    relative_error,
)
from foldgpt.plan import FoldPlan, Group
from foldgpt.recovery import (
    RecoverySettings,
    TrainingWindows,
    distillation,
    make_trainable_,
)
from foldgpt.recovery.common import common_blocks, first_changed
from foldgpt.recovery.distillation import IGNORED, Distillation
from foldgpt.recovery.dropout import without_dropout
from foldgpt.recovery.inputs import check_inputs
from foldgpt.recovery.recover import _checkpointing_ as checkpointing_
from foldgpt.recovery.states import Body, aligned_blocks
from foldgpt.recovery.teacher import Teacher
from foldgpt.recovery.windows import places_in_documents
from models import CONFIGS, tiny_model
from recovery_case import recovered_by, recovered_on, step_losses, tiny_pair, tiny_windows


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


def test_a_document_does_not_predict_the_next_one() -> None:
    """Its first token would be learned from the last document's end."""
    begins = torch.tensor([[0, 0, 0, 1, 0, 0, 1]], dtype=torch.uint8)
    item = TrainingWindows(torch.tensor([[7, 8, 2, 9, 5, 2, 6]]), begins_WT=begins)[0]
    assert item["positions"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert item["labels"].tolist() == [IGNORED, 8, 2, IGNORED, 5, 2, IGNORED]
