"""What is searched on ends in copies: who loses the ability to copy from the context costs more."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from foldgpt.compensation import Compensator, compensate
from foldgpt.errors import UsageError
from foldgpt.folding import fold_, source_model_of
from foldgpt.plan import FoldPlan
from foldgpt.recipe import Recipe
from foldgpt.replay import Replay
from foldgpt.selection import Request, select
from foldgpt.selection import folded_cost as folded_cost_module
from foldgpt.selection.copies import COPIES, with_copies
from foldgpt.selection.folded_cost import FoldedCost
from models import NUM_BLOCKS, tiny_model, token_ids


def test_the_last_part_of_a_window_is_its_first() -> None:
    ids = torch.arange(3 * 32).view(3, 32)
    repeated, copied = with_copies(ids, 0.25)
    assert torch.equal(repeated[:, :24], ids[:, :24]) and torch.equal(repeated[:, 24:], ids[:, :8])
    assert copied.sum() == 3 * 8 and copied[:, 24:].all()
    assert torch.equal(ids, torch.arange(3 * 32).view(3, 32))  # the caller's are as they were


def test_bos_is_not_copied() -> None:
    ids = torch.arange(3 * 33).view(3, 33)
    ids[:, 0] = 1
    repeated, copied = with_copies(ids, 0.25)
    assert torch.equal(repeated[:, :25], ids[:, :25]) and torch.equal(repeated[:, 25:], ids[:, 1:9])
    assert copied.sum() == 3 * 8


def test_without_a_share_nothing_is_copied() -> None:
    ids = torch.arange(64).view(2, 32)
    for share in (0.0, 0.03):  # less than a token
        repeated, copied = with_copies(ids, share)
        assert torch.equal(repeated, ids) and not copied.any()
    for share in (-0.1, 0.51, float("nan")):
        with pytest.raises(UsageError, match=r"0 to 0\.5, not"):
            with_copies(ids, share)


def test_the_shares_that_are_usual_are_one() -> None:
    assert Recipe.from_dict({"model": "m"}).select.copies == COPIES == Request(6, 1).copies


def test_a_set_costs_what_it_does_on_windows_with_copies() -> None:
    model = tiny_model("llama")
    ids = token_ids(model, (8, 32))
    cost = Request(NUM_BLOCKS, 2, model=model, ids_WT=ids, copies=0.25).need_cost("test")
    rows = cost.everything.rows_R
    repeated, copied = with_copies(ids, 0.25)
    folded = copy.deepcopy(model)
    fold_(folded, FoldPlan.create(source_model_of(model), removed=[2, 3]))
    with torch.no_grad():
        source, left = (log_softmax(m(repeated).logits.float(), -1).flatten(0, 1)[rows] for m in (model, folded))
    by_hand = kl_div(left, source, log_target=True, reduction="batchmean")
    assert cost.cost(frozenset({2, 3})) == pytest.approx(float(by_hand), rel=1e-3)
    assert torch.equal(cost.copied_R, copied.flatten()[rows]) and cost.copied_R.any()


def test_the_report_says_how_many_positions_are_copies() -> None:
    model = tiny_model("llama")
    request = Request(NUM_BLOCKS, 2, model=model, ids_WT=token_ids(model, (8, 32)))
    positions = {copies: select("loo", replace(request, copies=copies)).report["num_copied"] for copies in (0.0, 0.25)}
    assert positions[0.0] == 0 < positions[0.25]


@torch.no_grad()
def test_what_is_left_out_of_a_fit_is_corrected_all_the_same() -> None:
    model = tiny_model("llama")
    replay = Replay(model, token_ids(model, (8, 30)))
    compensator = Compensator(replay, ridge=0.1)
    output, mlp, _ = compensator.run(1, replay.split(replay.states[1]))
    target = replay.states[4].clone()
    left_out = torch.zeros(8, 30, dtype=torch.bool)
    left_out[:, 20:] = True
    corrected, found = compensator.correct(1, output, mlp, target, left_out_WT=left_out)
    target[:, 20:] = 5.0
    again, same = compensator.correct(1, output, mlp, target, left_out_WT=left_out)
    torch.testing.assert_close(found.map_KH, same.map_KH)
    torch.testing.assert_close(corrected, again)
    assert found.report.left_out == 8 * 10 and found.report.tokens == 8 * 20
    assert (corrected[:, 20:] - output[:, 20:]).abs().max() > 0
    other, _ = compensator.correct(1, output, mlp, target)
    assert not torch.allclose(other, corrected, rtol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_compensated_search_fits_on_what_is_no_copy(family: str) -> None:
    model = tiny_model(family)
    request = Request(NUM_BLOCKS, 2, model=model, ids_WT=token_ids(model, (8, 32)), copies=0.25, compensate=True)
    cost = request.need_cost("test")
    assert cost._compensator is not None
    seen = []
    correct = cost._compensator.correct

    def watched(*args, **kwargs):  # type: ignore[no-untyped-def]
        corrected, found = correct(*args, **kwargs)
        seen.append((found.report.left_out, len(corrected)))
        return corrected, found

    cost._compensator.correct = watched  # type: ignore[method-assign]
    cost.cost(frozenset({2, 3}))
    cost.cost(frozenset({2, 3}), cost.sample(2, 6))
    assert seen == [(8 * windows, windows) for windows in (8, 4)]


def test_finals_fit_as_folding_does_and_measure_on_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ids = token_ids(model, (24, 32))
    fitted, held = ids[:18], ids[18:]
    request = Request(NUM_BLOCKS, 2, model=model, compensate=True, copies=0.25)
    cost = FoldedCost(request, fitted, held)
    given = []

    def watched(model, plan, ids_WT, **kwargs):  # type: ignore[no-untyped-def]
        given.append(ids_WT)
        return compensate(model, plan, ids_WT, **kwargs)

    monkeypatch.setattr(folded_cost_module, "compensate", watched)
    cost.cost(frozenset({2, 3}))
    assert torch.equal(given[0], fitted)
    assert torch.equal(cost._held.replay.ids_WT, with_copies(held, 0.25)[0])
