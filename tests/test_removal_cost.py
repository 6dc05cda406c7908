"""RemovalCost gives what a folded model gives, however much it reuses."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from foldgpt.compensation import compensate, merge_
from foldgpt.errors import FoldGPTError
from foldgpt.families import decoder_of
from foldgpt.folding import fold_, source_model_of
from foldgpt.plan import FoldPlan
from foldgpt.replay import Replay
from foldgpt.selection import cost as cost_module
from foldgpt.selection.cost import RemovalCost
from foldgpt.selection.units import Units
from models import CONFIGS, tiny_model, token_ids

FAMILIES_WITH_SUBLAYERS = [family for family in CONFIGS if decoder_of(tiny_model(family)).sublayers is not None]


def _plain_kl(model: Any, ids: torch.Tensor, rows: torch.Tensor, **removed: Any) -> float:
    folded = copy.deepcopy(model)
    fold_(folded, FoldPlan.create(source_model_of(model), **removed))
    return _kl(model, folded, ids, rows)


@torch.no_grad()
def _kl(model: Any, folded: Any, ids: torch.Tensor, rows: torch.Tensor) -> float:
    target, own = (
        functional.log_softmax(m(input_ids=ids, use_cache=False).logits.float(), -1).flatten(0, 1)[rows]
        for m in (model, folded)
    )
    return float(functional.kl_div(own, target, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("family", CONFIGS)
def test_cost_is_the_kl_of_the_folded_model(family: str) -> None:
    model = tiny_model(family)
    ids = token_ids(model, (3, 20))
    cost = RemovalCost(Replay(model, ids, batch_size=2))
    for removed in ([2], [0, 4], [3, 4, 5]):
        expected = _plain_kl(model, ids, cost.everything.rows_R, removed=removed)
        assert cost.cost(frozenset(removed)) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert cost.cost(frozenset()) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES_WITH_SUBLAYERS)
def test_removed_sublayers_cost_what_they_cost_in_the_folded_model(family: str) -> None:
    model = tiny_model(family)
    ids = token_ids(model, (3, 20))
    before = copy.deepcopy(model.state_dict())
    replay = Replay(model, ids, batch_size=2)
    cost = RemovalCost(replay, units=Units.sublayers(replay.decoder, 1))
    # Block 1 goes whole, block 2 loses its MLP, block 4 its attention.
    got = cost.cost(frozenset({2, 3, 5, 8}))
    expected = _plain_kl(model, ids, cost.everything.rows_R, removed=[1], removed_mlp=[2], removed_attention=[4])
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert list(model.state_dict()) == list(before), "the model is as it was"


def test_reused_states_change_nothing_and_save_work() -> None:
    model = tiny_model("qwen3")
    ids = token_ids(model, (4, 20))
    sets = [frozenset(s) for s in ({1}, {1, 4}, {1, 3}, {1, 4, 5}, {0, 3}, {1, 4})]
    with_cache = RemovalCost(Replay(model, ids, batch_size=2))
    without = RemovalCost(Replay(model, ids, batch_size=2), cache_bytes=0)
    assert [with_cache.cost(s) for s in sets] == [without.cost(s) for s in sets]
    assert with_cache.forward_equivalents < without.forward_equivalents


def test_a_walk_makes_the_next_removals_cheap() -> None:
    model = tiny_model("llama")
    replay = Replay(model, token_ids(model))
    cost = RemovalCost(replay)
    cost.walk(frozenset({1}))
    before = replay.num_block_calls
    cost.cost(frozenset({1, 4}))
    assert replay.num_block_calls - before == 1  # block 5 alone


def test_a_sample_is_part_of_everything() -> None:
    model = tiny_model("llama")
    replay = Replay(model, token_ids(model, (6, 20)), batch_size=2)
    cost = RemovalCost(replay)
    sample = cost.sample(1, 2)
    assert sample.windows == slice(2, 4)
    expected = _plain_kl(model, replay.ids_WT[2:4], sample.rows_R, removed=[2])
    assert cost.cost(frozenset({2}), sample) == pytest.approx(expected, rel=1e-3)
    assert replay.num_block_calls == pytest.approx(3 / 3)  # blocks 3, 4, 5 on a third of the windows


def test_language_modelling_loss_is_that_of_the_folded_model() -> None:
    model = tiny_model("gemma2")
    ids = token_ids(model, (2, 20))
    cost = RemovalCost(Replay(model, ids), objective="lm")
    folded = copy.deepcopy(model)
    fold_(folded, FoldPlan.create(source_model_of(model), removed=[3]))
    with torch.no_grad():
        logits = folded(input_ids=ids, use_cache=False).logits.float()
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    padded = torch.cat([losses.view(2, -1), torch.zeros(2, 1)], 1).flatten()
    assert cost.cost(frozenset({3})) == pytest.approx(float(padded[cost.everything.rows_R].mean()), rel=1e-4)


def test_the_seed_alone_decides_the_positions() -> None:
    model = tiny_model("llama")
    replay = Replay(model, token_ids(model, (4, 60)))
    first, again, other = (RemovalCost(replay, seed=seed, most_positions=50).everything.rows_R for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert len(first) == 50 and not torch.equal(first, other)


@pytest.mark.parametrize("family", FAMILIES_WITH_SUBLAYERS)
def test_a_compensated_set_costs_what_it_costs_merged_and_folded(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole blocks, and blocks that lose one sublayer; fitted and measured on the same tokens, so as to compare."""
    monkeypatch.setattr(cost_module, "PARTS", 1)
    model = tiny_model(family)
    ids = token_ids(model, (6, 20))
    replay = Replay(model, ids, batch_size=2)
    cost = RemovalCost(replay, units=Units.sublayers(replay.decoder, 1), compensate=True)
    # Block 2 loses its MLP, block 3 goes whole, block 5 loses its attention.
    got = cost.cost(frozenset({5, 6, 7, 10}))
    assert cost.cost(frozenset({5, 6, 7, 10})) == pytest.approx(got, rel=1e-5), "with states kept from before"
    plan = FoldPlan.create(source_model_of(model), removed=[3], removed_mlp=[2], removed_attention=[5])
    corrections = compensate(model, plan, ids, features="output")
    assert {block: found.sublayer for block, found in corrections.items()} == {2: "attention", 5: "mlp"}
    compensated = copy.deepcopy(model)
    merge_(compensated, corrections)
    fold_(compensated, plan)
    expected = _kl(model, compensated, ids, cost.everything.rows_R)
    assert got == pytest.approx(expected, rel=2e-3, abs=1e-4)
    plain = RemovalCost(replay, units=Units.sublayers(replay.decoder, 1)).cost(frozenset({5, 6, 7, 10}))
    assert abs(got - plain) > 0.01 * plain


def test_a_cut_that_goes_on_is_compensated_as_one_afresh() -> None:
    """What is kept of the shorter cut is corrected for a target that the longer one removes."""
    model = tiny_model("llama")
    replay = Replay(model, token_ids(model, (8, 20)), batch_size=2)
    cost = RemovalCost(replay, compensate=True)
    cost.cost(frozenset({2}))
    afresh, plain = (RemovalCost(replay, compensate=flag).cost(frozenset({2, 3})) for flag in (True, False))
    assert cost.cost(frozenset({2, 3})) == pytest.approx(afresh, rel=1e-5)
    assert abs(afresh - plain) > 0.01 * plain


@torch.no_grad()
def test_each_part_of_what_is_searched_on_is_corrected_by_a_fit_on_the_others() -> None:
    """Measured on the tokens that they are fitted on, sets with many cuts would pass for good ones."""
    model = tiny_model("llama")
    replay = Replay(model, token_ids(model, (8, 20)), batch_size=2)
    cost = RemovalCost(replay, compensate=True)
    assert cost._compensator is not None
    cost._compensator.ridge = 0.1  # chosen, it would depend on all parts

    def corrected() -> torch.Tensor:
        return torch.cat(cost._compensated(1, 4, replay.split(replay.states[1]), cost.everything, None))

    before = corrected()
    replay.states[4][:2] = 5 * torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))
    after = corrected()
    torch.testing.assert_close(after[:2], before[:2])
    assert not torch.allclose(after[2:], before[2:], rtol=1e-2)


@pytest.mark.parametrize(("objective", "passes"), [("kl", 2), ("lm", 0)])
def test_the_source_is_counted_by_its_recording_and_its_predictions(objective: Any, passes: int) -> None:
    """By the KL the head's matrix is passed twice: for logits, and for what it makes of the likelihoods."""
    model = tiny_model("llama", vocab_size=2048)
    cost = RemovalCost(Replay(model, token_ids(model, (6, 20)), batch_size=2), objective=objective)
    assert cost.set_up_equivalents == 1
    rows = len(cost.sample(0, 1).rows_R) + len(cost.sample(1, 3).rows_R)
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    head = rows * model.lm_head.weight.numel() / blocks / (6 * 20)
    assert head > 0.1
    assert cost.set_up_equivalents == pytest.approx(1 + passes * head)
    assert cost.forward_equivalents == cost.set_up_equivalents


@pytest.mark.parametrize("ask", ["cost", "walk"])
def test_a_sample_that_is_made_on_the_way_is_timed_once(ask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    made, run = RemovalCost._make_sample, RemovalCost._run

    def tick(seconds: float, method: Any) -> Any:
        def ticking(*arguments: Any, **named: Any) -> Any:
            nonlocal now
            now += seconds
            return method(*arguments, **named)

        return ticking

    monkeypatch.setattr(cost_module, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(RemovalCost, "_make_sample", tick(100, made))
    monkeypatch.setattr(RemovalCost, "_run", tick(1, run))
    model = tiny_model("llama")
    cost = RemovalCost(Replay(model, token_ids(model)))
    getattr(cost, ask)(frozenset({2}))
    assert cost.seconds == 101


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        ({2, 3, 5, 8}, r"blocks \[1\], the attention of blocks \[4\], the MLP of blocks \[2\]"),
        ({5}, r"the MLP of blocks \[2\]"),
    ],
)
def test_what_is_not_finite_is_said_in_blocks_and_not_in_units(removed: set[int], words: str) -> None:
    model = tiny_model("llama")
    replay = Replay(model, token_ids(model))
    cost = RemovalCost(replay, units=Units.sublayers(replay.decoder, 1))
    replay.finish = lambda hidden: hidden * float("nan")  # type: ignore[method-assign]
    with pytest.raises(FoldGPTError, match=f"without {words} the model's predictions are not finite"):
        cost.cost(frozenset(removed))
