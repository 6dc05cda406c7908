"""Leave-one-out, greedy and Taylor: what they measure, what they remove, what they report. Budgets by target."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foldgpt.analysis import analyze
from foldgpt.errors import UsageError
from foldgpt.folding import fold_, source_model_of
from foldgpt.plan import FoldPlan
from foldgpt.selection import (
    ANALYSIS_FREE,
    MEASURED,
    SELECTORS,
    RemovalCost,
    Request,
    Selection,
    budget,
    flops_of,
    number_for_target,
    number_to_remove,
    parameters_of,
    search_passes,
    seconds_of,
    select,
)
from foldgpt.selection.budget import Share
from foldgpt.selection.gated_pass import gradient_equivalents, gradient_of_gates
from models import NUM_BLOCKS, tiny_model, token_ids


def _request(num_remove: int = 2, family: str = "llama", **changes: Any) -> Request:
    model = tiny_model(family)
    return Request(NUM_BLOCKS, num_remove, model=model, ids_WT=token_ids(model, (8, 24)), **changes)


@pytest.mark.parametrize("method", sorted(MEASURED))
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_every_measured_selector_answers_and_reports(method: str, family: str) -> None:
    request = _request(2, family)
    before = {name: value.clone() for name, value in request.model.state_dict().items()}
    selection = select(method, request)
    assert len(selection.removed) == 2 and set(selection.order[:2]) == set(selection.removed)
    assert selection.method == method and len(selection.scores) == NUM_BLOCKS
    json.dumps(selection.report, allow_nan=False)
    assert selection.report["seconds"] > 0 and selection.report["forward_equivalents"] > 1
    cost = request.need_cost("test")
    if method != "taylor":  # it measures another loss
        assert selection.report["cost"] == pytest.approx(cost.cost(frozenset(selection.removed)), rel=1e-4)
    after = request.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in request.model.parameters())


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("method", sorted(SELECTORS.keys() - MEASURED))
def test_what_others_chose_is_measured_alike_where_there_are_windows(method: str, compensate: bool) -> None:
    request = _request(2, compensate=compensate)
    options = {"blocks": "1,3"} if method == "blocks" else {}
    request = replace(request, analysis=analyze(request.model, request.ids_WT), options=options)
    unmeasured = select(method, replace(request, ids_WT=None))
    selection = select(method, request)
    assert unmeasured.report == {} and replace(selection, report={}) == unmeasured
    measured = select("loo", replace(request, options={})).report
    assert selection.report.keys() == measured.keys()
    same = ("objective", "compensated", "num_windows", "num_tokens", "num_positions")
    assert [selection.report[name] for name in same] == [measured[name] for name in same]
    cost = request.need_cost("test").cost(frozenset(selection.removed))
    assert selection.report["cost"] == pytest.approx(cost, rel=1e-4) and cost > 0
    assert 1 < selection.report["forward_equivalents"] <= search_passes(method, request, head=5.0)


def test_a_removal_that_cannot_be_measured_is_said_and_stands(capsys: pytest.CaptureFixture[str]) -> None:
    request = _request(2)
    with torch.no_grad():  # what follows the blocks overflows
        request.model.model.norm.weight.fill_(3e38)
    selection = select("last", request)
    assert selection.removed == (NUM_BLOCKS - 2, NUM_BLOCKS - 1) and selection.report == {}
    assert (
        "what this removal costs was not measured: the model's own predictions are not finite"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("error", [MemoryError("x"), RuntimeError("can't allocate memory: you tried to allocate")])
def test_full_memory_costs_the_measure_and_not_the_choice(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any, **named: Any) -> float:
        raise error

    monkeypatch.setattr(RemovalCost, "cost", full)
    assert select("last", _request(2)).report == {}
    assert "what this removal costs was not measured" in capsys.readouterr().err
    error = RuntimeError("a mistake")
    with pytest.raises(RuntimeError, match="a mistake"):
        select("last", _request(2))


@pytest.mark.parametrize("method", sorted(MEASURED))
def test_nothing_to_remove_is_an_answer(method: str) -> None:
    assert select(method, _request(0)).removed == ()


@pytest.mark.parametrize("method", sorted(MEASURED))
def test_all_but_one_block_can_go(method: str) -> None:
    assert len(select(method, _request(NUM_BLOCKS - 1)).removed) == NUM_BLOCKS - 1


def test_greedy_removes_the_cheapest_block_at_every_step() -> None:
    request = _request(3)
    cost = request.need_cost("test")
    removed: frozenset[int] = frozenset()
    for _ in range(3):
        removed = min((removed | {b} for b in range(NUM_BLOCKS) if b not in removed), key=cost.cost)
    selection = select("greedy", request)
    assert set(selection.removed) == removed
    assert [step["removed"] for step in selection.report["trace"]] == list(selection.order)


def test_greedy_runs_each_candidate_from_where_it_differs() -> None:
    report = select("greedy", _request(2)).report
    # Alone: 5 + 4 + 3 + 2 + 1 + 0 block calls, a walk, and at most as much again for the second removal.
    from_the_start = 1 + (6 * 5 + 5 * 4) / 6
    head = report["forward_equivalents"] - 1
    assert head < from_the_start


def test_leave_one_out_removes_the_cheapest_blocks() -> None:
    request = _request(2)
    selection = select("loo", request)
    cost = request.need_cost("test")
    assert list(selection.scores) == pytest.approx([cost.cost(frozenset({b})) for b in range(NUM_BLOCKS)], rel=1e-5)


def _stopped_after(number: int, monkeypatch: pytest.MonkeyPatch) -> list[frozenset[int]]:
    """Stop the search at the cost of one set more than a number; returns what is measured, from now on."""
    measured: list[frozenset[int]] = []
    cost = RemovalCost.cost

    def counted(self: RemovalCost, removed: frozenset[int], *arguments: Any, **named: Any) -> float:
        if len(measured) == number:
            raise KeyboardInterrupt
        measured.append(removed)
        return cost(self, removed, *arguments, **named)

    monkeypatch.setattr(RemovalCost, "cost", counted)
    return measured


def _found(selection: Selection) -> tuple[Any, ...]:
    """All that a search finds, without what it took."""
    steps = selection.report.get("trace", [])
    trace = [{k: v for k, v in step.items() if k not in ("seconds", "forward_equivalents")} for step in steps]
    return selection.scores, selection.order, selection.removed, selection.report["cost"], trace


@pytest.mark.parametrize("changes", [{}, {"sublayers": True}, {"compensate": True}], ids=str)
@pytest.mark.parametrize(("method", "stage"), [("greedy", "first"), ("greedy", "second"), ("loo", "first")])
def test_a_search_that_was_stopped_finds_what_it_would_have_found(
    method: str, stage: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foldgpt.selection.checkpoint._SECONDS_BETWEEN", 0.0)
    whole = select(method, _request(3, **changes))
    request = _request(3, checkpoint=tmp_path / "search.json", **changes)
    with monkeypatch.context() as patch:
        before = _stopped_after(4 if stage == "first" else request.num_units + 2, patch)
        with pytest.raises(KeyboardInterrupt):
            select(method, request)
    with monkeypatch.context() as patch:
        behind = _stopped_after(10**6, patch)
        resumed = select(method, request)
    assert _found(resumed) == _found(whole)
    # Of greedy a removal that was decided is not measured again, of leave-one-out nothing is.
    decided = {"loo": set(before), "greedy": {found for found in before if len(found) == 1}}[method]
    nothing_yet = (method, stage) == ("greedy", "first")
    assert decided.isdisjoint(behind) or nothing_yet
    # The recording is made twice, and all that was measured until it was last saved is paid for.
    spent, at_once = (selection.report["forward_equivalents"] for selection in (resumed, whole))
    assert spent == pytest.approx(at_once) if nothing_yet else spent >= at_once + 1
    with monkeypatch.context() as patch:
        finished = _stopped_after(1, patch)
        assert _found(select(method, request)) == _found(whole)
        assert all(len(found) > 1 for found in finished), "no more than what was removed, as a whole"


def test_a_search_does_not_go_on_from_that_of_another_method(tmp_path: Path) -> None:
    checkpoint = tmp_path / "search.json"
    for method in ("greedy", "loo", "gates", "greedy"):
        assert _found(select(method, _request(2, checkpoint=checkpoint))) == _found(select(method, _request(2)))


@pytest.mark.parametrize("objective", ["lm", "kl"])
def test_logits_of_a_pass_with_gradients_are_counted(objective: Any) -> None:
    """There and back, and with the KL those of the source."""
    model = tiny_model("llama", vocab_size=2048)
    cost = Request(NUM_BLOCKS, 2, model=model, ids_WT=token_ids(model, (8, 24)), objective=objective).need_cost("test")
    sample = cost.sample(2, 5)
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    head = len(sample.rows_R) * model.lm_head.weight.numel() / blocks / (8 * 24)
    before = cost.forward_equivalents
    gradient_of_gates(cost, sample, torch.ones(NUM_BLOCKS, dtype=torch.float64))
    took = cost.forward_equivalents - before
    assert head > 0.1
    assert took == pytest.approx(3 * 3 / 8 + {"lm": 2, "kl": 3}[objective] * head)
    assert took == pytest.approx(gradient_equivalents(cost, sample))


@pytest.mark.parametrize("shape", [(8, 24), (16, 512)], ids=["few", "more positions than a set is measured at"])
def test_taylor_takes_as_much_of_the_head_as_expected(shape: tuple[int, int]) -> None:
    model = tiny_model("llama", vocab_size=2048, max_position_embeddings=512)
    request = Request(NUM_BLOCKS, 2, model=model, ids_WT=token_ids(model, shape))
    cost = replace(request, objective="lm").need_cost("test")
    head = cost.predicted_equivalents(1, cost.everything, share_run=0)
    assert head > 0.2
    selection = select("taylor", request)
    # For the cost of what is removed half of the blocks are expected to run.
    run = (NUM_BLOCKS - selection.removed[0] - 2) / NUM_BLOCKS
    took = selection.report["forward_equivalents"] - run + 0.5
    assert search_passes("taylor", request, head=head) == pytest.approx(took, abs=0.01)


@pytest.mark.parametrize("objective", ["lm", "kl"])
def test_the_gradient_of_the_gates_is_that_of_finite_differences(objective: Any) -> None:
    request = _request(objective=objective)
    cost = request.need_cost("test")
    gates = torch.full((NUM_BLOCKS,), 0.8, dtype=torch.float64)
    _, gradient = gradient_of_gates(cost, cost.everything, gates)
    for block in (0, 3, 5):
        step = torch.zeros_like(gates)
        step[block] = 1e-2
        up, down = (gradient_of_gates(cost, cost.everything, gates + sign * step)[0] for sign in (1, -1))
        assert float(gradient[block]) == pytest.approx((up - down) / 2e-2, rel=0.05, abs=1e-3)


def test_a_gate_at_zero_is_a_removed_block() -> None:
    cost = _request().need_cost("test")
    gates = torch.ones(NUM_BLOCKS, dtype=torch.float64)
    gates[2] = 0
    value, _ = gradient_of_gates(cost, cost.everything, gates)
    assert value == pytest.approx(cost.cost(frozenset({2})), rel=1e-3)


def test_taylor_says_that_it_cannot_take_sublayers_apart() -> None:
    with pytest.raises(UsageError, match=r"taylor.*whole blocks"):
        select("taylor", _request(sublayers=True))


@pytest.mark.parametrize("method", ["loo", "greedy"])
def test_sublayers_can_be_removed_apart_and_folded(method: str) -> None:
    request = _request(1, "gemma3", sublayers=True)
    selection = select(method, request)
    plan = FoldPlan.create(
        source_model_of(request.model),
        removed=selection.removed,
        removed_attention=selection.removed_attention,
        removed_mlp=selection.removed_mlp,
    )
    before = sum(p.numel() for p in request.model.parameters())
    per_block = parameters_of(request.model).per_block[0]
    fold_(request.model, plan)
    assert before - sum(p.numel() for p in request.model.parameters()) >= 0.95 * per_block


def test_measured_selectors_say_what_they_need() -> None:
    for method in MEASURED:
        with pytest.raises(UsageError, match="calibration windows"):
            select(method, Request(NUM_BLOCKS, 2))
    assert MEASURED < ANALYSIS_FREE < set(SELECTORS)


def test_options_of_other_selectors_are_refused() -> None:
    with pytest.raises(UsageError, match="no option 'steps'"):
        select("greedy", _request(options={"steps": 3}))


# ------------------------------------------------------------------------------------------------- budgets


def test_a_target_for_parameters_is_met_with_as_few_blocks_as_possible() -> None:
    model = tiny_model("llama")
    share = parameters_of(model)
    assert share.total == sum(p.numel() for p in model.parameters())
    assert number_for_target(share, share.total) == 0
    assert number_for_target(share, share.total - 1) == 1
    assert number_for_target(share, share.total - 2 * share.per_block[0]) == 2
    with pytest.raises(UsageError, match="one must stay"):
        number_for_target(share, share.total - sum(share.per_block))


def test_a_target_is_met_whichever_blocks_go() -> None:
    """With the largest block one would do, but the search may remove the smallest ones."""
    share = Share("parameters", 100, (10, 30, 20))
    assert [number_for_target(share, target) for target in (90, 85, 70)] == [1, 2, 2]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_flops_of_the_blocks_are_those_that_removal_saves(family: str) -> None:
    model = tiny_model(family)
    ids = token_ids(model, (1, 16))
    before = flops_of(model, ids)
    fold_(model, FoldPlan.create(source_model_of(model), removed=[2]))
    assert flops_of(model, ids).total == pytest.approx(before.total - before.per_block[2])
    assert before.per_block[2] > 0


def test_seconds_of_the_blocks_are_part_of_the_whole() -> None:
    model = tiny_model("llama")
    share = seconds_of(model, token_ids(model, (1, 16)), repeats=2)
    assert sum(share.per_block) > 0
    assert len(share.per_block) == NUM_BLOCKS and share.what == "seconds"
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.model.layers)


def test_the_pass_that_warms_up_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock whose every look takes as long as the pass says: before and behind the model and each block."""
    model = tiny_model("llama")
    looks = 2 * NUM_BLOCKS + 2
    times = itertools.accumulate(seconds for seconds in (100.0, 2.0, 4.0) for _ in range(looks))
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    share = seconds_of(model, token_ids(model, (1, 16)), repeats=2)
    assert next(times, None) is None
    assert share.per_block == (3.0,) * NUM_BLOCKS
    assert share.total == pytest.approx(3.0 * (looks - 1))


def test_counts_and_ratios() -> None:
    assert number_to_remove(30, remove=6, ratio=None) == 6
    assert number_to_remove(30, remove=None, ratio=0.2) == 6
    assert number_to_remove(18, remove=None, ratio=0.1) == 2
    assert number_to_remove(18, remove=None, ratio=None) == 0


def test_flops_of_experts_do_not_depend_on_the_kernel() -> None:
    """torch's own count leaves out the product of all experts at once. Eager runs an expert on its own rows."""
    found = []
    for kernel in ("grouped_mm", "eager"):
        model = tiny_model("mixtral")
        model.set_experts_implementation(kernel)
        found.append(flops_of(model, token_ids(model, (2, 64))).total)
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_flops_of_attention_do_not_depend_on_the_kernel(family: str) -> None:
    """torch's own count leaves out the fused kernel of CPUs."""
    found = []
    for kernel in ("sdpa", "eager"):
        model = tiny_model(family)
        model.set_attn_implementation(kernel)
        found.append(flops_of(model, token_ids(model, (2, 64))))
    assert found[0] == found[1]
