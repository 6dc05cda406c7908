"""Learned gates: exact budgets, estimators that learn, unbiased gradients, resume, clear errors."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from foldgpt.errors import FoldGPTError, UsageError
from foldgpt.folding import fold_, source_model_of
from foldgpt.plan import FoldPlan
from foldgpt.replay import Replay
from foldgpt.selection import RemovalCost, Request, Units, checkpoint, select
from foldgpt.selection.cost import Sample
from foldgpt.selection.gated_pass import gradient_equivalents
from foldgpt.selection.gating import hard_concrete, score_function, smoothed
from foldgpt.selection.gating.allowance import greedy_equivalents
from foldgpt.selection.gating.gates import gates_options
from foldgpt.selection.gating.hard_concrete import HardConcrete
from foldgpt.selection.gating.score_function import ScoreFunction, draw, log_probability
from foldgpt.selection.gating.smoothed import SmoothedL0
from foldgpt.selection.measured import leave_one_out
from foldgpt.selection.units import units_of
from models import tiny_hybrid, tiny_model, token_ids

NUM_BLOCKS = 10


def _request(num_remove: int, family: str = "llama", **changes: Any) -> Request:
    model = tiny_model(family, num_hidden_layers=NUM_BLOCKS)
    return Request(NUM_BLOCKS, num_remove, model=model, ids_WT=token_ids(model, (16, 32)), **changes)


def _all_costs(request: Request) -> list[tuple[float, tuple[int, ...]]]:
    cost = request.need_cost("test")
    sets = itertools.combinations(range(NUM_BLOCKS), request.num_remove)
    return sorted((cost.cost(frozenset(removed)), removed) for removed in sets)


@pytest.mark.parametrize("estimator", ["score", "concrete", "smoothed"])
@pytest.mark.parametrize("num_remove", [1, 3, 9])
def test_the_budget_is_met_exactly(estimator: str, num_remove: int) -> None:
    selection = select("gates", _request(num_remove, options={"estimator": estimator}))
    assert len(selection.removed) == num_remove
    assert selection.order[:num_remove] != () and set(selection.order[:num_remove]) == set(selection.removed)
    assert sorted(selection.order) == list(range(NUM_BLOCKS))
    assert len(selection.scores) == NUM_BLOCKS and all(0 <= score <= 1 for score in selection.scores)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_gates_find_a_set_among_the_best(family: str) -> None:
    request = _request(3, family)
    ranking = [removed for _, removed in _all_costs(request)]
    selection = select("gates", request)
    assert ranking.index(selection.removed) <= 2  # of 120
    assert selection.report["cost"] <= select("greedy", request).report["cost"] * 1.02


def test_the_search_costs_no_more_than_greedy() -> None:
    request = _request(3)
    greedy, gates = (select(method, request).report for method in ("greedy", "gates"))
    assert gates["forward_equivalents"] <= greedy["forward_equivalents"]


def test_scores_and_learning_keep_to_their_shares_of_what_may_be_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores see fewer windows, and gates that have not settled stop, so that refinement has its share."""
    model = tiny_model("llama", num_hidden_layers=NUM_BLOCKS)
    spent: list[float] = []
    allowed: list[float] = []
    step = ScoreFunction.step

    def scored(cost: RemovalCost, sample: Sample, **arguments: Any) -> list[float]:
        allowed.append(greedy_equivalents(cost))
        before = cost.forward_equivalents
        found = leave_one_out(cost, sample, **arguments)
        assert 0 < cost.forward_equivalents - before <= 0.3 * allowed[0]
        return found

    def stepped(self: ScoreFunction) -> float:
        value = step(self)
        spent.append(self._cost.forward_equivalents)
        return value

    monkeypatch.setattr("foldgpt.selection.gating.gates.leave_one_out", scored)
    monkeypatch.setattr(ScoreFunction, "step", stepped)
    monkeypatch.setattr(ScoreFunction, "has_settled", lambda self: False)
    ids = token_ids(model, (64, 32))
    options = {"effort": 1.0, "refine": False, "steps": 10_000}
    report = select("gates", Request(NUM_BLOCKS, 1, model=model, ids_WT=ids, options=options)).report
    assert len(spent) == report["steps"] > 2
    assert 0.45 * allowed[0] < spent[-1] <= 0.54 * allowed[0]


@pytest.mark.parametrize("num_windows", [16, 64])
def test_where_sets_are_compensated_learning_leaves_more_to_what_comes_after_it(
    num_windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finals behind the fit of folding may take a quarter of the allowance, and refinement has to have some as well."""
    spent, step = [], ScoreFunction.step
    costs: list[RemovalCost] = []

    def stepped(self: ScoreFunction) -> float:
        value = step(self)
        costs.append(self._cost)
        spent.append(self._cost.forward_equivalents)
        return value

    monkeypatch.setattr(ScoreFunction, "step", stepped)
    monkeypatch.setattr(ScoreFunction, "has_settled", lambda self: False)
    request = _request(2, compensate=True, options={"steps": 10_000})
    ids = token_ids(request.model, (num_windows, 32))
    select("gates", replace(request, ids_WT=ids))
    allowed = greedy_equivalents(costs[0])
    one = costs[0].predicted_equivalents(score_function.SAMPLES, costs[0].sample(0, 4 * costs[0].num_batches // 16))
    assert 0.4 * allowed - one - 0.5 < spent[-1] <= 0.4 * allowed


@pytest.mark.parametrize(
    ("changes", "windows"),
    [({}, 2), ({"compensate": True}, 4), ({"compensate": True, "options": {"estimator": "smoothed"}}, 2)],
    ids=["plain", "compensated", "by gradients"],
)
def test_compensated_sets_are_learned_from_on_windows_enough_for_a_fit(
    changes: dict[str, Any], windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a window or two each is fitted on as many, and those that need a good fit look bad. Gradients see no fit."""
    seen: list[int] = []
    for estimator in (ScoreFunction, SmoothedL0):
        begin = estimator.__init__

        def noted(self: Any, cost: Any, samples: Any, *args: Any, begin: Any = begin, **more: Any) -> None:
            seen.extend(sample.windows.stop - sample.windows.start for sample in samples)
            begin(self, cost, samples, *args, **more)

        monkeypatch.setattr(estimator, "__init__", noted)
    select("gates", _request(2, **changes))
    assert sum(seen) == 16 and set(seen) == {windows}


def test_the_report_is_json_and_traces_every_gate() -> None:
    report = select("gates", _request(3)).report
    json.dumps(report, allow_nan=False)
    assert report["steps"] == len(report["trace"]) > 0
    assert all(len(step["keep"]) == NUM_BLOCKS for step in report["trace"])
    # Gates start undecided and end nearer to a decision.
    doubt = [sum(min(p, 1 - p) for p in step["keep"]) for step in report["trace"]]
    assert doubt[-1] < doubt[0]


def test_the_same_seed_gives_the_same_answer() -> None:
    first, second = (select("gates", _request(3, seed=5)) for _ in range(2))
    assert first.removed == second.removed and first.report["trace"] == second.report["trace"]


@pytest.mark.parametrize("estimator", ["score", "concrete"])
def test_another_seed_draws_other_sets(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the positions are at which they are measured, which the seed decides as well."""
    need_cost = Request.need_cost
    monkeypatch.setattr(Request, "need_cost", lambda self, *a, **k: need_cost(replace(self, seed=0), *a, **k))
    options = {"estimator": estimator, "steps": 2, "refine": False}
    first, other = (select("gates", _request(3, seed=seed, options=options)).report for seed in (5, 6))
    assert first["leave_one_out"] == other["leave_one_out"]
    assert first["trace"] != other["trace"]


def test_sublayers_meet_the_parameter_budget_and_can_be_folded() -> None:
    request = _request(2, sublayers=True)
    selection = select("gates", request)
    units = request.need_cost("test").units
    removed = {unit for block in selection.removed for unit in (2 * block, 2 * block + 1)}
    removed |= {2 * block for block in selection.removed_attention} | {2 * block + 1 for block in selection.removed_mlp}
    assert units.missing(removed) <= 0
    assert all(units.missing(removed - {unit}) > 0 for unit in removed), "nothing more than needed"
    plan = FoldPlan.create(
        source_model_of(request.model),
        removed=selection.removed,
        removed_attention=selection.removed_attention,
        removed_mlp=selection.removed_mlp,
    )
    fold_(request.model, plan)


def test_language_modelling_loss_can_be_the_objective() -> None:
    selection = select("gates", _request(2, objective="lm"))
    assert selection.report["objective"] == "lm" and selection.report["cost"] > 1


def test_sets_are_judged_as_they_will_be_folded() -> None:
    plain, compensated = (select("gates", _request(3, compensate=flag)).report for flag in (False, True))
    assert compensated["cost"] < plain["cost"]


@pytest.mark.parametrize("kind", [ScoreFunction, HardConcrete, SmoothedL0])
def test_a_stopped_search_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    names = {ScoreFunction: "score", HardConcrete: "concrete", SmoothedL0: "smoothed"}
    # Enough to be stopped in; not so much that leaving out the recording, which is paid for again, changes the end.
    options = {"estimator": names[kind], "effort": 4.0}
    whole = select("gates", _request(3, options=options))
    checkpoint = tmp_path / "progress.json"
    steps = 0
    step = kind.step

    def stopped_at_four(self: Any) -> float:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr("foldgpt.selection.checkpoint._SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(kind, "step", stopped_at_four)
    with pytest.raises(KeyboardInterrupt):
        select("gates", _request(3, checkpoint=checkpoint, options=options))
    assert len(json.loads(checkpoint.read_text())["trace"]) == 3
    monkeypatch.setattr(kind, "step", step)
    resumed = select("gates", _request(3, checkpoint=checkpoint, options=options))
    # States kept for sets that begin alike are made anew, so the end may come earlier; the recording is not counted.
    assert resumed.report["forward_equivalents"] > whole.report["forward_equivalents"] * 0.8
    together = min(len(resumed.report["trace"]), len(whole.report["trace"]))
    assert together > 3
    assert resumed.report["trace"][:together] == whole.report["trace"][:together]
    assert resumed.removed == whole.removed
    # What comes after the search may fail: until its result is saved, it need not be done again.
    monkeypatch.setattr(kind, "step", lambda self: pytest.fail("a finished search goes on"))
    again = select("gates", _request(3, checkpoint=checkpoint, options=options))
    assert again.removed == resumed.removed and again.report["cost"] == resumed.report["cost"]
    assert again.report["refined"] == resumed.report["refined"]


@pytest.mark.parametrize(("estimator", "after"), [("score", 6), ("concrete", 6), ("score", 10)])
def test_a_search_stopped_at_its_first_scores_goes_on_and_finds_the_same(
    estimator: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is large: what is set up behind the interruption has to be taken from the allowance, as without one."""
    model = tiny_model("llama", num_hidden_layers=NUM_BLOCKS, vocab_size=4096)
    request = Request(NUM_BLOCKS, 3, model=model, ids_WT=token_ids(model, (16, 32)), options={"estimator": estimator})
    stopped = replace(request, checkpoint=tmp_path / "progress.json")
    monkeypatch.setattr("foldgpt.selection.checkpoint._SECONDS_BETWEEN", 0.0)
    whole = select("gates", request)
    measure, measured = RemovalCost.cost, []

    def counted(self: RemovalCost, removed: frozenset[int], *arguments: Any, **named: Any) -> float:
        if len(measured) == after:
            raise KeyboardInterrupt
        measured.append(removed)
        return measure(self, removed, *arguments, **named)

    monkeypatch.setattr(RemovalCost, "cost", counted)
    with pytest.raises(KeyboardInterrupt):
        select("gates", stopped)
    again: list[frozenset[int]] = []
    monkeypatch.setattr(RemovalCost, "cost", lambda self, s, *a, **k: again.append(s) or measure(self, s, *a, **k))
    resumed = select("gates", stopped)
    assert again[: NUM_BLOCKS - after] == [frozenset({block}) for block in range(after, NUM_BLOCKS)]
    assert (resumed.removed, resumed.order, resumed.scores) == (whole.removed, whole.order, whole.scores)
    taken = ("seconds", "forward_equivalents")
    assert {k: v for k, v in resumed.report.items() if k not in taken} == {
        k: v for k, v in whole.report.items() if k not in taken
    }
    # What is set up a second time is paid for, and is no part of the allowance.
    assert resumed.report["forward_equivalents"] > whole.report["forward_equivalents"] + 1


@pytest.mark.parametrize("estimator", ["concrete", "smoothed"])
def test_the_steps_with_gradients_that_are_planned_are_those_that_are_paid_for(
    estimator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head of a small model takes as much as its blocks. Schedules run over all planned steps, so all are taken."""
    model = tiny_model("llama", num_hidden_layers=NUM_BLOCKS, vocab_size=8192)
    options = {"estimator": estimator, "steps": 1000, "refine": False, "effort": 2.0}
    monkeypatch.setattr("foldgpt.selection.checkpoint._SECONDS_BETWEEN", 0.0)
    checkpoint = tmp_path / "progress.json"
    request = Request(NUM_BLOCKS, 3, model=model, ids_WT=token_ids(model, (16, 32)), options=options)
    cost = request.need_cost("test")
    step = gradient_equivalents(cost, cost.sample(0, 1))
    assert step > 1.5 * 3 / 8, "the head is no small part"
    report = select("gates", replace(request, checkpoint=checkpoint)).report
    assert report["steps"] == json.loads(checkpoint.read_text())["num_steps"] > 5
    judged = cost.predicted_equivalents(1, cost.everything, share_run=1)
    learned = 0.54 * 2.0 * greedy_equivalents(cost)
    assert learned - step <= report["forward_equivalents"] <= learned + judged


@pytest.mark.parametrize("estimator", ["score", "concrete", "smoothed"])
def test_the_only_block_that_attends_is_kept(estimator: str) -> None:
    """It cannot go alone, so that its score is infinite."""
    model = tiny_hybrid(3, num_hidden_layers=6)
    request = Request(6, 2, model=model, ids_WT=token_ids(model, (8, 24)), options={"estimator": estimator})
    selection = select("gates", request)
    assert len(selection.removed) == 2 and 3 not in selection.removed
    assert all(math.isfinite(score) for score in selection.scores)
    fold_(model, FoldPlan.create(source_model_of(model), removed=selection.removed))


@pytest.mark.parametrize("content", ["{", '{"format": "other"}', "[]"])
def test_a_foreign_checkpoint_is_ignored(tmp_path: Path, content: str) -> None:
    checkpoint = tmp_path / "progress.json"
    checkpoint.write_text(content)
    assert select("gates", _request(2, checkpoint=checkpoint)).removed == select("gates", _request(2)).removed


def test_a_checkpoint_of_another_request_is_ignored(tmp_path: Path) -> None:
    checkpoint = tmp_path / "progress.json"
    select("gates", _request(2, checkpoint=checkpoint))
    assert len(select("gates", _request(3, checkpoint=checkpoint)).removed) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"further_ids_WT": None},
        {"further_ids_WT": torch.ones(4, 32, dtype=torch.int64)},
        {"objective": "lm"},
        {"compensate": True},
        {"options": {"effort": 2.0}},
    ],
    ids=["seed", "no further text", "other further text", "objective", "compensated", "options"],
)
def test_a_search_goes_on_from_no_other_one(changes: dict[str, Any]) -> None:
    request = _request(2, further_ids_WT=torch.zeros(4, 32, dtype=torch.int64))
    identity = checkpoint._identity("gates", request)
    assert checkpoint._identity("gates", replace(request, checkpoint=Path("elsewhere"))) == identity
    assert checkpoint._identity("gates", replace(request, **changes)) != identity


def test_an_unknown_estimator_or_option_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="Did you mean 'smoothed'"):
        select("gates", _request(2, options={"estimator": "smooth"}))
    with pytest.raises(UsageError, match=r"no option 'step'.*'steps'"):
        select("gates", _request(2, options={"step": 3}))


@pytest.mark.parametrize(
    ("request_", "effort"),
    [
        (Request(30, 3), 0.5),
        (Request(18, 2), 0.5),
        (Request(30, 4), 0.45),
        (Request(30, 6), 0.45),
        (Request(30, 3, compensate=True), 1.0),
        (Request(30, 6, sublayers=True), 0.28),
        (Request(30, 6, options={"effort": 2.0}), 2.0),
    ],
)
def test_how_much_a_search_may_spend_depends_on_what_is_asked(request_: Request, effort: float) -> None:
    assert gates_options(request_)["effort"] == effort


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": "100"}, "steps must be a whole number from 1 on, not '100'"),
        ({"steps": 0}, "not 0"),
        ({"effort": -1}, "effort must be a number above 0 and at most 1,000,000, not -1"),
        ({"effort": float("nan")}, "not nan"),
        ({"effort": 1e308}, "at most 1,000,000, not 1e+308"),
        ({"refine": "no"}, "true or false, not 'no'"),
        ({"estimator": 3}, "unknown gate estimator 3"),
    ],
    ids=str,
)
def test_values_of_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        select("gates", _request(2, options=options))


@pytest.mark.parametrize("estimator", ["concrete", "smoothed"])
def test_relaxed_gates_of_sublayers_are_refused(estimator: str) -> None:
    request = replace(_request(2, sublayers=True, options={"estimator": estimator}), model=None)
    # Before anything is measured.
    with pytest.raises(UsageError, match=r"whole blocks.*'score'"):
        select("gates", request)


def test_a_model_whose_predictions_are_not_finite_is_refused() -> None:
    request = _request(2)
    with torch.no_grad():
        request.model.lm_head.weight[3] = float("nan")
    with pytest.raises(FoldGPTError, match="not finite"):
        select("gates", request)


def test_greedy_ends_where_nothing_more_can_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Units, "is_allowed", lambda self, removed: len(set(removed)) < 3)
    with pytest.raises(UsageError, match="cannot be met"):
        select("greedy", _request(3))


def test_a_budget_that_no_set_meets_is_refused() -> None:
    units = Units(2, 2, (10, 30, 10, 30), 75, ("attention",) * 2)
    with pytest.raises(UsageError, match="cannot be met"):
        units.fill([0, 1, 2, 3])


def test_what_the_budget_does_not_need_is_put_back_from_the_end_of_the_order() -> None:
    units = Units(4, 2, (30, 80, 30, 80, 30, 80, 30, 80), 110, ("attention",) * 4)
    # Attentions of blocks 2 and 1, then the MLP of block 3: one of the attentions is enough, and 4 comes first.
    assert units.fill([4, 2, 7]) == {4, 7}


# ------------------------------------------------------------------------------------------- the estimator


#: Of the blocks below those that hardly do anything.
_IDLE = (2, 5, 7)


def _estimator_of(kind: str, num_steps: int, seed: int) -> tuple[Any, RemovalCost]:
    """An estimator on a model in which three blocks are idle, told nothing about which."""
    model = tiny_model("llama", num_hidden_layers=NUM_BLOCKS)
    with torch.no_grad():
        for index in _IDLE:
            block = model.model.layers[index]
            block.self_attn.o_proj.weight.mul_(0.02)
            block.mlp.down_proj.weight.mul_(0.02)
    request = Request(NUM_BLOCKS, len(_IDLE), model=model, ids_WT=token_ids(model, (16, 32)), seed=seed)
    cost = request.need_cost("test")
    samples = [cost.sample(k, k + 1) for k in range(cost.num_batches)]
    scores = [0.3] * NUM_BLOCKS
    if kind == "score":
        return ScoreFunction(cost, samples, scores, seed=seed), cost
    if kind == "concrete":
        return HardConcrete(cost, samples, scores, num_steps=num_steps, seed=seed), cost
    return SmoothedL0(cost, samples, scores, num_steps=num_steps), cost


@pytest.mark.parametrize(("kind", "num_steps"), [("score", 40), ("concrete", 150), ("smoothed", 150)])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_estimator_learns_by_itself_which_blocks_are_idle(kind: str, num_steps: int, seed: int) -> None:
    """Without refinement, which would find them whatever the gates say."""
    estimator, cost = _estimator_of(kind, num_steps, seed)

    def closed() -> frozenset[int]:
        keep = estimator.keep_probabilities().tolist()
        return cost.units.fill(sorted(range(NUM_BLOCKS), key=keep.__getitem__))

    assert closed() != set(_IDLE)
    for _ in range(num_steps):
        estimator.step()
    assert closed() == set(_IDLE)
    keep = estimator.keep_probabilities()
    # Polarised, not only in the right order.
    assert max(keep[list(_IDLE)]) < 0.3 < 0.6 < min(keep[[i for i in range(NUM_BLOCKS) if i not in _IDLE]])


@pytest.mark.parametrize("kind", ["score", "concrete", "smoothed"])
def test_gates_that_are_no_number_any_more_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator, cost = _estimator_of(kind, 10, 0)
    for module in (hard_concrete, smoothed):
        monkeypatch.setattr(module, "gradient_of_gates", lambda *_: (1.0, torch.full((NUM_BLOCKS,), math.nan)))
    monkeypatch.setattr(cost, "cost", lambda *_, **__: math.nan)
    with pytest.raises(FoldGPTError, match="not finite"):
        for _ in range(3):
            estimator.step()


def test_plackett_luce_probabilities_sum_to_one_and_match_the_draws() -> None:
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64)
    orders = [list(order) for order in itertools.permutations(range(4), 2)]
    probabilities = log_probability(logits, orders).exp()
    assert float(probabilities.sum()) == pytest.approx(1)
    drawn = [found.order for found in draw(logits, Units.blocks(4, 2), 20_000, torch.Generator().manual_seed(0))]
    for order, probability in zip(orders, probabilities.tolist(), strict=True):
        assert drawn.count(order) / 20_000 == pytest.approx(probability, abs=0.01)


def test_the_gradient_is_unbiased_whatever_the_surrogate_says() -> None:
    units = Units.blocks(6, 2)
    logits = torch.tensor([0.2, -0.3, 0.5, 0.0, 0.1, -0.2], dtype=torch.float64, requires_grad=True)
    orders = [list(order) for order in itertools.permutations(range(6))]
    sets = [units.fill(order) for order in orders]
    value = {s: 1 + 0.3 * min(s) + max(s) * (1 in s) for s in sorted(set(sets), key=sorted)}
    values = torch.tensor([value[s] for s in sets], dtype=torch.float64)
    (exact,) = torch.autograd.grad((log_probability(logits, orders).exp() * values).sum(), logits)

    wrong = {s: -v for v, s in zip(value.values(), reversed(value), strict=True)}
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(6, dtype=torch.float64)
    rounds = 300
    for _ in range(rounds):
        drawn, free = draw(logits, units, 8, generator), draw(logits, units, 256, generator)
        measured = torch.tensor([value[d.removed] - wrong[d.removed] for d in drawn], dtype=torch.float64)
        predicted = torch.tensor([wrong[d.removed] for d in free], dtype=torch.float64)
        loss = score_function._surprise(logits, drawn, measured) + score_function._surprise(logits, free, predicted)
        (gradient,) = torch.autograd.grad(loss, logits)
        total += gradient / rounds
    torch.testing.assert_close(total, exact, atol=0.05, rtol=0)


def test_what_is_scored_is_the_probability_of_what_was_drawn() -> None:
    """Of sublayers some may not go and some are put back, so that a draw is more than the set that came of it."""
    units = Units(3, 2, (2, 3, 2, 3, 2, 3), 5, ("attention",) * 3)
    logits = torch.tensor([0.9, -0.6, 0.5, 0.0, 0.1, -0.8], dtype=torch.float64, requires_grad=True)
    orders = [list(order) for order in itertools.permutations(range(6))]
    filled = [units.filled(order) for order in orders]
    assert any(set(order[:seen]) != removed for order, (removed, seen) in zip(orders, filled, strict=True))
    values = torch.tensor([2.0 ** min(removed) + 5 * len(removed) for removed, _ in filled], dtype=torch.float64)
    probabilities = log_probability(logits, orders).exp()
    (exact,) = torch.autograd.grad((probabilities * values).sum(), logits, retain_graph=True)
    scored = log_probability(logits, [order[:seen] for order, (_, seen) in zip(orders, filled, strict=True)])
    (expected,) = torch.autograd.grad((probabilities.detach() * values * scored).sum(), logits)
    torch.testing.assert_close(expected, exact)
    drawn = draw(logits, units, 500, torch.Generator().manual_seed(0))
    known = {tuple(order[:seen]): removed for order, (removed, seen) in zip(orders, filled, strict=True)}
    assert all(known[tuple(found.order)] == found.removed for found in drawn)


def test_leave_one_out_is_the_cost_of_each_block_alone() -> None:
    model = tiny_model("llama")
    cost = RemovalCost(Replay(model, token_ids(model)))
    assert leave_one_out(cost)[2] == cost.cost(frozenset({2}))


@pytest.mark.parametrize("removed", [{2, 5}, {4, 5, 7}, {4, 5, 10, 11}], ids=["parts", "both", "whole blocks alone"])
def test_what_is_removed_has_the_numbers_of_the_search(removed: set[int]) -> None:
    units = Units(6, 2, (1,) * 12, len(removed), ("attention",) * 6)
    lacking = units.lacking(removed)
    parts = [[block for block, part in lacking.items() if part == which] for which in ("attention", "mlp")]
    assert units_of(units.whole_blocks(removed), *parts, 2) == sorted(removed)
    assert units_of([4, 1], [], [], 1) == [1, 4]
