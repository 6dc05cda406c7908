"""Compensation: what cannot be corrected is refused by name, before anything is changed."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from compensation_case import correction
from foldgpt.compensation import Compensator, compensate, compensate_, merge_
from foldgpt.errors import PlanError, UnsupportedModelError, UsageError
from foldgpt.folding import fold_, source_model_of
from foldgpt.plan import FoldPlan, Group
from foldgpt.replay import Replay
from models import tiny_model, token_ids
from reference import blocks_of


def test_families_without_known_sublayers_are_refused_by_name() -> None:
    model = tiny_model("opt", do_layer_norm_before=False)
    with pytest.raises(UnsupportedModelError, match="'opt'"):
        compensate(model, [2], token_ids(model))


def test_a_sublayer_whose_output_is_not_simply_added_is_refused() -> None:
    model = tiny_model("granite")
    model.config.residual_multiplier = 0.7  # the blocks were built with 0.5
    with pytest.raises(UnsupportedModelError, match="not simply added"):
        compensate(model, [2], token_ids(model))


@torch.no_grad()
def test_a_matrix_that_does_not_end_the_sublayer_is_refused_before_anything_is_written() -> None:
    model = tiny_model("llama")
    mlp = blocks_of(model)[3].mlp
    forward = type(mlp).forward

    class Squashed(type(mlp)):  # type: ignore[misc]
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return forward(self, rows).tanh()

    mlp.__class__ = Squashed
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="block 3"):
        merge_(model, {2: correction(), 3: correction(block=3)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_block_that_shares_its_mlp_carries_nothing_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    ids = token_ids(model, (4, 20))
    source = source_model_of(model)
    plan = FoldPlan.create(source, removed=[1, 4], groups=[Group(blocks=(2, 3))])
    assert list(compensate(model, plan, ids)) == [0]
    assert "block 3 shares its mlp" in capsys.readouterr().err
    elsewhere = FoldPlan.create(source, removed=[3], groups=[Group(blocks=(2, 4), sublayers=("attention",))])
    assert list(compensate(model, elsewhere, ids)) == [2]
    assert not capsys.readouterr().err


@pytest.mark.parametrize("lost", ["block", "attention"])
def test_behind_a_cut_that_nothing_makes_up_for_corrections_are_fitted_on_the_stream_that_is_there(
    lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    ids = token_ids(model, (4, 20))
    source, group = source_model_of(model), Group(blocks=(0, 1))
    if lost == "block":
        plan = FoldPlan.create(source, removed=[2, 5], groups=[group])
    else:
        group = group.model_copy(update={"sublayers": ("mlp",)})
        plan = FoldPlan.create(source, removed=[5], removed_attention=[1], groups=[group])
    given: dict[int, torch.Tensor] = {}
    run = Compensator.run

    def recorded(self: Compensator, index: int, stream: Sequence[torch.Tensor], **kwargs: Any) -> Any:
        given[index] = torch.cat(list(stream))
        return run(self, index, stream, **kwargs)

    monkeypatch.setattr(Compensator, "run", recorded)
    assert list(compensate(model, plan, ids)) == [4]
    replay = Replay(model, ids)
    with torch.no_grad():
        expected = torch.cat(
            [
                replay.run(replay.run(replay.states[0][rows], [0, 1]), [3])
                if lost == "block"
                else replay.run(replay.block(1, replay.states[1][rows], without="attention"), [2, 3])
                for rows in replay.batches()
            ]
        )
    torch.testing.assert_close(given[4], expected)


def test_a_correction_of_another_model_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(UsageError, match=r"\[16, 16\]"):
        merge_(model, {2: correction(size=16)})
    with pytest.raises(UsageError, match="block 9"):
        merge_(model, {9: correction(block=9)})
    with pytest.raises(UsageError, match="norm"):
        merge_(model, {2: correction(scale_H=torch.ones(32))})


def test_a_folded_model_is_refused() -> None:
    model = tiny_model("llama")
    plan = FoldPlan.create(source_model_of(model), groups=[Group(blocks=(1, 2))])
    fold_(model, plan)
    with pytest.raises(UsageError, match="folded already"):
        merge_(model, {4: correction(block=4)})


def test_a_model_that_is_folded_already_is_refused() -> None:
    model = tiny_model("llama")
    plan = FoldPlan.create(source_model_of(model), removed=[1, 2])
    ids = token_ids(model, (4, 16))
    compensate_(model, plan, ids)
    fold_(model, plan)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PlanError, match="the plan is for a model of 6 blocks"):
        compensate_(model, plan, ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_was_compensated_is_not_compensated_again_before_it_is_folded() -> None:
    model = tiny_model("llama")
    plan, ids = FoldPlan.create(source_model_of(model), removed=[3]), token_ids(model, (64, 24), seed=3)
    assert compensate_(model, plan, ids).kept
    values = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError, match="compensated already: fold it, or load the source again"):
        compensate_(model, plan, ids)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    fold_(model, plan)
    # What is folded is a source of its own.
    compensate_(model, FoldPlan.create(source_model_of(model), removed=[1]), ids)


def test_numbers_that_make_no_sense_are_refused() -> None:
    model = tiny_model("llama")
    replay = Replay(model, token_ids(model))
    with pytest.raises(UsageError, match="ridge"):
        Compensator(replay, ridge=-1.0)
    with pytest.raises(UsageError, match="outliers"):
        Compensator(replay, outliers=1.0)
    with pytest.raises(UsageError, match="1 part or more, not 0"):
        Compensator(replay, parts=0)
    with pytest.raises(UsageError, match="0 rounds or more, not -1"):
        Compensator(replay, rounds=-1)
    wrong: dict[str, Any]
    for wrong, message in (
        ({"features": "iner"}, "unknown features 'iner' for a compensation. Did you mean 'inner'?"),
        ({"where": "behid"}, "unknown where 'behid' for a compensation. Did you mean 'behind'?"),
        ({"rounds": -2}, "0 rounds or more, not -2"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            compensate(model, [1], token_ids(model), **wrong)
    compensator = Compensator(replay)
    output, mlp, _ = compensator.run(1, replay.split(replay.states[1]))
    with pytest.raises(UsageError, match=r"\[2, 19, 32\]"):
        compensator.correct(1, output, mlp, replay.states[3][:, 1:])
    output[0, 0, 0] = float("nan")
    with pytest.raises(UsageError, match="block 1"):
        compensator.correct(1, output, mlp, replay.states[3])
