"""FoldedCost: what a set costs behind the fit that folding makes."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from foldgpt.compensation import compensate, merge_
from foldgpt.errors import NotFiniteError
from foldgpt.folding import fold_, source_model_of
from foldgpt.plan import Compensation, FoldPlan
from foldgpt.selection import Request
from foldgpt.selection.folded_cost import FoldedCost, fit_tokens
from models import tiny_model, token_ids


def _request(family: str, **changes: Any) -> tuple[Request, torch.Tensor, torch.Tensor]:
    model = tiny_model(family)
    ids = token_ids(model, (24, 16))
    return Request(6, 2, model=model, compensate=True, copies=0.0, **changes), ids[:18], ids[18:]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral"])
@pytest.mark.parametrize(
    ("sublayers", "removed"),
    [(False, {2, 3}), (False, {1, 4}), (False, {0, 1}), (False, {4, 5}), (True, {2, 3, 5, 8})],
)
def test_it_is_the_cost_of_the_folded_model(family: str, sublayers: bool, removed: set[int]) -> None:
    request, fitted, held = _request(family, sublayers=sublayers)
    cost = FoldedCost(request, fitted, held)
    found = cost.cost(frozenset(removed))

    blocks, attentions, mlps = cost._held.units.parts(removed)
    plan = FoldPlan.create(
        source_model_of(request.model), removed=blocks, removed_attention=attentions, removed_mlp=mlps
    )
    folded = copy.deepcopy(request.model)
    merge_(folded, compensate(folded, plan, fitted))
    fold_(folded, plan)
    with torch.no_grad():
        source, left = (log_softmax(model(held).logits.float(), -1).flatten(0, 1) for model in (request.model, folded))
    rows = cost._held.everything.rows_R
    by_hand = kl_div(left[rows], source[rows], log_target=True, reduction="batchmean")
    assert found == pytest.approx(float(by_hand), rel=2e-3)
    assert cost.source_cost() == 0.0


def test_by_the_loss_it_is_that_of_the_folded_model() -> None:
    request, fitted, held = _request("llama", objective="lm")
    cost = FoldedCost(request, fitted, held)
    plan = FoldPlan.create(source_model_of(request.model), removed=[2, 3])
    folded = copy.deepcopy(request.model)
    merge_(folded, compensate(folded, plan, fitted))
    fold_(folded, plan)
    rows = cost._held.everything.rows_R
    values = []
    for model in (folded, request.model):
        with torch.no_grad():
            logits = model(held).logits.flatten(0, 1)
        values.append(float(cross_entropy(logits[rows], held.flatten()[rows + 1])))
    assert [cost.cost(frozenset({2, 3})), cost.source_cost()] == pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_the_weights_are_what_they_were(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    request, fitted, held = _request("llama")
    before = copy.deepcopy(request.model.state_dict())
    cost = FoldedCost(request, fitted, held)
    seen: list[bool] = []

    def costs(*args: Any, **kwargs: Any) -> torch.Tensor:
        now = request.model.state_dict()
        seen.append(all(torch.equal(now[name], value) for name, value in before.items()))
        if fails:
            raise KeyboardInterrupt
        return torch.ones(3)

    monkeypatch.setattr(cost._held, "costs", costs)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            cost.cost(frozenset({2, 3}))
    else:
        cost.cost(frozenset({2, 3}))
    after = request.model.state_dict()
    assert seen == [False], "measured with merged corrections"
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_order_of_the_sets_does_not_matter() -> None:
    request, fitted, held = _request("llama")
    sets = [frozenset(removed) for removed in ({2, 3}, {2, 4}, {1, 2})]
    cost = FoldedCost(request, fitted, held)
    there = {removed: cost.cost(removed) for removed in sets}
    other = FoldedCost(request, fitted, held)
    back = {removed: other.cost(removed) for removed in sets[::-1]}
    assert there == back


def test_a_compensation_that_spoils_the_predictions_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    request, fitted, held = _request("llama")
    cost = FoldedCost(request, fitted, held)
    costs = cost._held.costs

    def spoilt(*args: Any, changed_from: int | None = None, **kwargs: Any) -> torch.Tensor:
        values_R = costs(*args, changed_from=changed_from, **kwargs)
        return values_R * (float("nan") if changed_from is not None else 1.0)

    monkeypatch.setattr(cost._held, "costs", spoilt)
    plain = replace(request, compensate=False, ids_WT=held).need_cost("test").cost(frozenset({2, 3}))
    assert cost.cost(frozenset({2, 3})) == pytest.approx(plain)


@pytest.mark.parametrize("by", ["fit", "predictions"])
def test_predictions_that_are_not_finite_cost_infinitely(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request, fitted, held = _request("llama")
    cost = FoldedCost(request, fitted, held)
    plain = replace(request, compensate=False, ids_WT=held).need_cost("test").cost(frozenset({2, 3}))

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise NotFiniteError("the states of block 1 hold values that are not finite")

    if by == "fit":
        monkeypatch.setattr("foldgpt.selection.folded_cost.compensate", refused)
        assert cost.cost(frozenset({2, 3})) == pytest.approx(plain)
    else:
        monkeypatch.setattr(cost._held, "costs", lambda *args, **kwargs: torch.tensor([float("nan")]))
        assert cost.cost(frozenset({2, 3})) == float("inf")


def test_what_it_will_take_is_no_less_than_what_it_takes() -> None:
    request, fitted, held = _request("llama")
    search = replace(request, ids_WT=held).need_cost("test")
    sets = [frozenset(removed) for removed in ({0, 1}, {2, 3}, {1, 4}, {4, 5})]
    cost = FoldedCost(request, fitted, held)
    for removed in sets:
        cost.cost(removed)
    expected = fit_tokens(sets, search.units, fitted.numel())
    expected += search.further_equivalents(sets, held) * held.numel()
    assert cost.forward_tokens <= expected <= 1.5 * cost.forward_tokens
    assert cost.seconds > 0


def test_the_fit_is_the_one_that_a_plan_asks_for() -> None:
    """FoldedCost fits with the defaults of `compensate`, folding with those of a plan."""
    defaults = {name: value.default for name, value in inspect.signature(compensate).parameters.items()}
    plan = {name: field.default for name, field in Compensation.model_fields.items()}
    assert {name: defaults[name] for name in ("features", "ridge", "rounds")} == {
        name: plan[name] for name in ("features", "ridge", "rounds")
    }
