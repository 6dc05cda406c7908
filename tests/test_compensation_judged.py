"""Compensation as folding does it: kept where held-out predictions come nearer to the source's, else left out."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from foldgpt.compensation import Compensator, compensate, compensate_, judge
from foldgpt.errors import UsageError
from foldgpt.folding import fold_, save_folded, source_model_of
from foldgpt.plan import FoldPlan, Group
from foldgpt.replay import Replay
from foldgpt.report.fits import was_compensated
from models import tiny_model, token_ids
from reference import blocks_of
from report_inputs import compensation


def _ids(model: Any, windows: int = 16) -> torch.Tensor:
    return token_ids(model, (windows, 24), seed=3)


def test_folding_keeps_a_compensation_that_helps() -> None:
    model = tiny_model("llama")
    plan = FoldPlan.create(source_model_of(model), removed=[3])
    before = {name: p.clone() for name, p in model.named_parameters()}
    done = compensate_(model, plan, _ids(model, 64))
    assert done.kept and done.kl_after < done.kl_before
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["model.layers.2.mlp.down_proj.weight"]
    # What is reported is the KL of the merged and folded model on the windows that were held out.
    source = tiny_model("llama")
    fold_(model, plan)
    held = _ids(model, 64)[-8:]
    with torch.no_grad():
        log_p, log_q = (m(input_ids=held).logits.log_softmax(-1) for m in (source, model))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert done.kl_after == pytest.approx(float(kl), rel=1e-3)
    assert done.num_held_out == 8 * 24 and done.num_tokens == 56 * 24


def test_positions_that_start_at_zero_are_compensated_as_removed() -> None:
    zero = {"start": "zero", "private": ("norms", "scales")}
    done = {}
    for name in ("removed", "at zero"):
        model = tiny_model("llama")
        groups = [] if name == "removed" else [Group(blocks=(1, 3), **zero)]
        plan = FoldPlan.create(source_model_of(model), removed=[3] if name == "removed" else [], groups=groups)
        done[name] = (
            compensate_(model, plan, _ids(model, 64)),
            model.get_parameter("model.layers.2.mlp.down_proj.weight"),
        )
    assert done["at zero"][0].kept and done["at zero"][0].kl_before > 0
    assert done["at zero"][0].to_json_dict() == done["removed"][0].to_json_dict()
    torch.testing.assert_close(done["at zero"][1], done["removed"][1])
    model = tiny_model("llama")
    assert list(compensate(model, FoldPlan.create(source_model_of(model), groups=groups), _ids(model))) == [2]


def test_a_model_in_fp64_is_compensated() -> None:
    model = tiny_model("llama").double()
    done = compensate_(model, FoldPlan.create(source_model_of(model), removed=[3]), _ids(model, 64))
    assert done.kept and done.kl_after < done.kl_before


def test_folding_drops_a_compensation_that_hurts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    plan = FoldPlan.create(source_model_of(model), removed=[3])
    before = {name: p.clone() for name, p in model.named_parameters()}
    fit = judge.compensate

    def worse(*args: Any, **kwargs: Any) -> Any:
        return {
            index: dataclasses.replace(correction, map_KH=-50 * correction.map_KH)
            for index, correction in fit(*args, **kwargs).items()
        }

    monkeypatch.setattr(judge, "compensate", worse)
    done = compensate_(model, plan, _ids(model))
    assert not done.kept and done.kl_after > done.kl_before
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def _half_with_a_silent_mlp(block: int) -> Any:
    """A model in float16, and an MLP so quiet that float16 does not hold a map on what its matrix is given."""
    model = tiny_model("llama").half()
    with torch.no_grad():
        blocks_of(model)[block].mlp.up_proj.weight.mul_(3e-6)
    return model


def test_a_map_beyond_float16_is_left_out_and_the_other_cuts_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    model = _half_with_a_silent_mlp(2)
    with torch.no_grad():
        exact = copy.deepcopy(model).float()
        assert compensate(exact, [3], _ids(model))[2].map_KH.abs().max() > torch.finfo(torch.float16).max
    corrections = compensate(model, [3, 5], _ids(model))
    assert list(corrections) == [4]
    assert (
        "block 2 makes up for nothing that is removed: with the map for its mlp it would put out more than float16"
        in capsys.readouterr().err
    )
    # The cut behind it is fitted on the stream that is there, with nothing made up for yet.
    replay = Replay(model, _ids(model))
    with torch.no_grad():
        stream = torch.cat([replay.block(2, part) for part in replay.split(replay.states[2])])
    compensator = Compensator(replay)
    output, mlp, inner = compensator.run(4, replay.split(stream), inner=True)
    expected = compensator.correct(4, output, mlp, replay.states[6], inner_RI=inner)[1]
    torch.testing.assert_close(corrections[4].map_KH, expected.map_KH)
    before = copy.deepcopy(model.state_dict())
    done = compensate_(model, FoldPlan.create(source_model_of(model), removed=[3, 5]), _ids(model))
    assert done.kept and done.kl_after < done.kl_before
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"model.layers.4.mlp.down_proj.weight"}


def test_a_compensation_without_which_the_model_overflows_is_kept() -> None:
    """Nothing is less than a KL that is no number."""
    model = tiny_model("llama", mlp_bias=True).half()
    with torch.no_grad():
        for index, value in {1: 4e4, 2: -4e4, 4: 4e4, 5: -4e4}.items():
            blocks_of(model)[index].mlp.down_proj.bias[0] = value
    done = compensate_(model, FoldPlan.create(source_model_of(model), removed=[2]), _ids(model))
    assert not math.isfinite(done.kl_before) and math.isfinite(done.kl_after)
    assert done.kept


def test_weights_beyond_float16_are_left_out_and_the_folded_model_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama").half()
    plan = FoldPlan.create(source_model_of(model), removed=[3])
    before = copy.deepcopy(model.state_dict())
    fit = judge.compensate

    def beyond(*args: Any, **kwargs: Any) -> Any:
        return {
            index: dataclasses.replace(
                correction,
                map_KH=1e6 * correction.map_KH,
                report=dataclasses.replace(correction.report, after=math.inf),
            )
            for index, correction in fit(*args, **kwargs).items()
        }

    monkeypatch.setattr(judge, "compensate", beyond)
    done = compensate_(model, plan, _ids(model))
    assert not done.kept and not math.isfinite(done.kl_after)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fold_(model, plan)
    save_folded(model, plan, tmp_path / "folded", notes={"compensation.json": done.to_json_dict()})
    record = json.loads((tmp_path / "folded" / "compensation.json").read_text())
    assert record["kl_after"] is None and record["kl_before"] == done.kl_before
    assert record["cuts"][0]["after"] is None and record["cuts"][0]["before"] > 0
    assert not was_compensated(tmp_path / "folded", plan.model_copy(update={"compensation": compensation()}))


def test_one_window_is_too_few_to_judge() -> None:
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="at least 2 calibration windows, got 1"):
        compensate_(model, FoldPlan.create(source_model_of(model), removed=[3]), _ids(model, 1))
