"""Corrections fitted on the source's own states of further text, as a start for fits on few tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch

from foldgpt.byte_cache import ByteCache
from foldgpt.compensation import Compensator, Priors, Start
from foldgpt.families.norms import effective_scale
from foldgpt.rehearsal.fits import bytes_of_priors
from foldgpt.replay import Replay
from foldgpt.selection import Request
from foldgpt.selection.further_windows import held_windows
from models import tiny_model, token_ids

#: Plain, with a bias, with a multiple of the sublayer's output, with a norm behind it.
FAMILIES = ("llama", "llama-tied", "granite", "gemma3")


def _request(model: Any, windows: int = 24, tokens: int = 16, searched: int = 4, **changes: Any) -> Request:
    ids = token_ids(model, (windows, tokens))
    request = Request(
        6, 2, model=model, ids_WT=ids[:searched], further_ids_WT=ids[searched:], compensate=True, copies=0
    )
    return replace(request, **changes)


def _started(model: Any, num_fitted: int, num_prior: int = 8) -> tuple[Replay, Any, Any, Start]:
    """The source on some windows, block 1 on them, and a start for a cut from there to 3 that others were fitted on."""
    ids = token_ids(model, (num_fitted + num_prior, 20))
    prior = Priors(Replay(model, ids[num_fitted:])).of(1, 3)
    replay = Replay(model, ids[:num_fitted])
    inner = prior.features == "inner"
    output, mlp, inner_RI = Compensator(replay).run(1, replay.split(replay.states[1]), inner=inner)
    return replay, output, mlp, Start(prior, mlp.flatten(0, 1) if inner_RI is None else inner_RI)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_ridge_draws_a_fit_to_its_start(family: str, parts: int) -> None:
    model = tiny_model(family)
    replay, output, mlp, start = _started(model, 4)
    assert start.correction.features == ("output" if family == "gemma3" else "inner")
    firm, loose = (Compensator(replay, ridge=ridge, parts=parts, rounds=0) for ridge in (1e9, 1e-3))
    corrected, found = firm.correct(1, output, mlp, replay.states[3], start=start)
    assert found.features == "output" and float(found.map_KH.abs().max()) < 1e-5
    assert not torch.allclose(corrected, output, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(loose.correct(1, output, mlp, replay.states[3], start=start)[0], corrected)
    if family == "gemma3":
        torch.testing.assert_close(found.scale_H, start.correction.scale_H)
        own = effective_scale(model.model.layers[1].post_feedforward_layernorm)
        assert not torch.allclose(start.correction.scale_H, own)
    if family in ("llama", "granite"):  # a bias is not drawn anywhere
        multiplier = 0.5 if family == "granite" else 1.0
        expected = output + multiplier * start.change(torch.float32).view(output.shape)
        torch.testing.assert_close(corrected, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "granite"])
@torch.no_grad()
def test_with_text_enough_and_the_same_features_the_start_does_not_matter(family: str) -> None:
    model = tiny_model(family)
    replay, output, mlp, start = _started(model, 20, 4)
    compensator, target = Compensator(replay, ridge=0.0), replay.states[3]
    options = {"inner_RI": start.features_RK}
    plain, without = compensator.correct(1, output, mlp, target, **options)
    begun, beyond = compensator.correct(1, output, mlp, target, start=start, **options)
    torch.testing.assert_close(begun, plain, rtol=1e-3, atol=1e-3)
    # What is found is what is fitted beyond the start.
    torch.testing.assert_close(beyond.map_KH + start.correction.map_KH, without.map_KH, rtol=1e-2, atol=1e-2)
    assert beyond.report.before < without.report.before


@pytest.mark.parametrize("absent", [None, "attention", "mlp"])
@torch.no_grad()
def test_a_prior_is_the_fit_at_that_cut_of_the_source(absent: Any) -> None:
    model = tiny_model("llama")
    replay = Replay(model, token_ids(model, (12, 20)))
    carrier = "attention" if absent == "mlp" else "mlp"
    compensator, stream = Compensator(replay), replay.split(replay.states[2])
    output, carried, inner = compensator.run(2, stream, sublayer=carrier, absent=absent, inner=True)
    _, expected = compensator.correct(2, output, carried, replay.states[4], sublayer=carrier, inner_RI=inner)
    priors = Priors(replay)
    found = priors.of(2, 4, absent)
    torch.testing.assert_close(found.map_KH, expected.map_KH)
    assert (found.sublayer, found.features) == (carrier, "inner")
    # Made once, and another cut behind the same block passes no block again.
    passed = priors.forward_tokens
    assert priors.of(2, 4, absent) is found and priors.of(2, 5, absent) is not found
    assert priors.forward_tokens == passed
    priors.forget_outputs()
    assert priors.of(2, 4, absent) is found
    priors.of(2, 6, absent)
    assert priors.forward_tokens == pytest.approx(passed + priors.num_tokens / 6)


@pytest.mark.parametrize("family", ["gpt2", "opt", "falcon", "gpt_neox", "mixtral", "olmo2", "gemma2"])
@pytest.mark.parametrize("sublayers", [False, True])
def test_searches_begin_at_priors_in_families_of_other_shapes(family: str, sublayers: bool) -> None:
    """Matrices the other way round, biases, outputs that are added to in place, experts, norms behind."""
    model = tiny_model(family)
    request = _request(model, sublayers=sublayers)
    cost = request.need_cost("test")
    removed = frozenset([2, 3, 5, 8]) if sublayers else frozenset([2, 3])
    assert math.isfinite(cost.cost(removed))
    assert cost._priors is not None
    inner = family not in ("mixtral", "olmo2", "gemma2")
    for found in cost._priors._corrections.values():
        # The attention of a mixture has one output matrix.
        one_matrix = inner or (family == "mixtral" and found.sublayer == "attention")
        assert found.features == ("inner" if one_matrix else "output")


def test_a_search_begins_at_priors_of_text_that_it_does_not_see_and_finals_do_not_measure() -> None:
    model = tiny_model("llama")
    for windows in (8, 24, 40):
        request = _request(model, windows)
        cost = request.need_cost("test")
        further = windows - 4
        held = held_windows(4, further)
        assert cost._priors is not None
        fitted = cost._priors._replay.ids_WT
        assert torch.equal(fitted, request.further_ids_WT[: min(12, further - held)])
    assert _request(model, 5).need_cost("test")._priors is None, "the one window is held out"
    assert _request(model, 24, compensate=False).need_cost("test")._priors is None
    assert _request(model, 24, further_ids_WT=None).need_cost("test")._priors is None


@pytest.mark.parametrize("family", FAMILIES)
def test_fits_on_few_tokens_are_better_for_it(family: str) -> None:
    """And so is what a search says of sets, behind fits on 64 tokens each."""
    model = tiny_model(family)
    request = _request(model, 32)
    sets = [frozenset(removed) for removed in ([1, 2], [2, 3], [2, 4], [3, 4])]
    costs = [
        fmean(asked.need_cost("test").cost(removed) for removed in sets)
        for asked in (request, replace(request, further_ids_WT=None))
    ]
    assert costs[0] < costs[1]


def test_what_priors_take_is_counted_and_granted() -> None:
    model = tiny_model("llama")
    request = _request(model)
    cost, without = (asked.need_cost("test") for asked in (request, replace(request, further_ids_WT=None)))
    assert cost.set_up_equivalents - without.set_up_equivalents == 3, "12 windows are recorded for 4"
    assert cost.prior_equivalents == request.prior_passes == 6
    for measure in (cost, without):
        measure.cost(frozenset([2, 3]))
    # One block passes the 12 windows once more.
    assert cost.forward_equivalents - without.forward_equivalents == pytest.approx(3 + 3 / 6)
    for block in range(5):
        cost.cost(frozenset([block + 1]))
    assert cost.set_up_again([(0, 1)]) == cost.set_up_again([]) + 4


def test_no_more_is_kept_than_is_said() -> None:
    model = tiny_model("llama")
    replay = Replay(model, token_ids(model, (12, 20)))
    priors = Priors(replay)
    for block in range(6):
        for after in range(block + 1, 7):
            priors.of(block, after)
    kept = sum(found.map_KH.nbytes for found in priors._corrections.values())
    kept += sum(outputs.nbytes for outputs in priors._outputs.values())
    assert kept == bytes_of_priors(model, 240)


def test_what_was_not_asked_for_the_longest_goes_first() -> None:
    cache: ByteCache[str, bytes] = ByteCache(10, len)
    for name in "abc":
        cache.put(name, 3 * name.encode())
    assert cache.get("a") == b"aaa"
    cache.put("d", b"dddd")
    assert [cache.get(name) for name in "abcd"] == [b"aaa", None, b"ccc", b"dddd"]
    cache.put("e", 11 * b"e")
    assert cache.get("e") is None and len(cache.values()) == 3, "what has no room alone drives nothing out"
    cache.put("a", b"other")
    assert cache.get("a") == b"aaa"
    cache.clear()
    cache.put("f", 10 * b"f")
    assert cache.get("f") == 10 * b"f" and cache.get("a") is None
