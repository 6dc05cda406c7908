"""The fit at one cut: least squares, ridge, weights, parts, and norms in the way."""

from __future__ import annotations

import copy

import pytest
import torch

from compensation_case import NORMED, correction
from foldgpt.compensation import Compensator, compensate, compensator, merge_
from foldgpt.compensation.least_squares import Sums, solve
from foldgpt.compensation.scales import best_scales
from foldgpt.compensation.through_norm import error_of, fit_through_norm
from foldgpt.families.norms import effective_scale, rms_normed, weight_for
from foldgpt.folding import source_model_of
from foldgpt.plan import FoldPlan
from foldgpt.replay import Replay
from models import tiny_model, token_ids
from reference import blocks_of


@torch.no_grad()
def test_what_is_linear_in_the_mlp_output_is_recovered_wholly() -> None:
    model = tiny_model("llama-tied")  # its down_proj has a bias
    replay = Replay(model, token_ids(model, (8, 30)))
    compensator = Compensator(replay, ridge=0.0)
    output, mlp, _ = compensator.run(2, replay.split(replay.states[2]))
    wanted_map, wanted_bias = torch.randn(32, 32) * 0.2, torch.randn(32)
    target = output + mlp @ wanted_map + wanted_bias
    corrected, found = compensator.correct(2, output, mlp, target)
    torch.testing.assert_close(corrected, target, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.map_KH, wanted_map, rtol=1e-3, atol=1e-3)
    assert found.report.after < 1e-6 < found.report.before


@torch.no_grad()
def test_the_ridge_draws_the_map_to_plain_removal() -> None:
    model = tiny_model("llama")
    replay = Replay(model, token_ids(model, (8, 30)))
    sizes = []
    for ridge in (0.0, 0.1, 10.0, 1e9):
        compensator = Compensator(replay, ridge=ridge)
        output, mlp, _ = compensator.run(1, replay.split(replay.states[1]))
        corrected, found = compensator.correct(1, output, mlp, replay.states[4])
        sizes.append(float(found.map_KH.norm()))
        assert found.report.ridge == ridge
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 10 * sizes[2]
    torch.testing.assert_close(corrected, output)


@torch.no_grad()
def test_the_ridge_is_chosen_on_held_out_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    model = tiny_model("llama")
    replay = Replay(model, token_ids(model, (8, 30)))
    compensator = Compensator(replay)
    output, mlp, _ = compensator.run(1, replay.split(replay.states[1]))
    noise = output + torch.randn(output.shape, generator=generator)
    learnable = output + mlp @ torch.randn(32, 32, generator=generator)
    assert compensator.correct(1, output, mlp, noise)[1].report.ridge >= 1
    assert compensator.correct(1, output, mlp, learnable)[1].report.ridge <= 1e-3


@pytest.mark.parametrize("family", ["llama", "olmo2"])
@torch.no_grad()
def test_tokens_with_massive_activations_are_left_out(family: str) -> None:
    model = tiny_model(family)
    replay = Replay(model, token_ids(model, (8, 30)))
    compensator = Compensator(replay, ridge=0.1, outliers=10.0)
    output, mlp, _ = compensator.run(1, replay.split(replay.states[1]))
    target = replay.states[3].clone()
    _, clean = compensator.correct(1, output, mlp, target)
    output[0, 0, 3], target[0, 0, 3] = 4000.0, 9000.0
    _, found = compensator.correct(1, output, mlp, target)
    assert (clean.report.left_out, found.report.left_out, found.report.tokens) == (0, 1, 239)
    torch.testing.assert_close(found.map_KH, clean.map_KH, rtol=0, atol=0.1 * float(clean.map_KH.abs().max()))
    _, trusting = Compensator(replay, ridge=0.1).correct(1, output, mlp, target)
    assert trusting.report.left_out == 0


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3", "granite"])
@pytest.mark.parametrize(("windows", "parts", "made"), [(6, 2, 2), (3, 4, 3), (2, 4, 2), (1, 4, 2)])
@torch.no_grad()
def test_each_part_is_corrected_by_a_map_that_was_fitted_on_the_others(
    family: str, windows: int, parts: int, made: int
) -> None:
    model = tiny_model(family)
    replay = Replay(model, token_ids(model, (windows, 60 // windows)))
    crossed = Compensator(replay, ridge=0.1, parts=parts)
    output, mlp, _ = crossed.run(1, replay.split(replay.states[1]))
    target = replay.states[3]
    corrected, found = crossed.correct(1, output, mlp, target)
    plain = Compensator(replay, ridge=0.1)
    expected, same = plain.correct(1, output, mlp, target)
    torch.testing.assert_close(found.map_KH, same.map_KH)
    assert not torch.allclose(corrected, expected, rtol=1e-3)
    rows = [states.flatten(0, 1) for states in (output, mlp, target)]
    size = 60 // made
    for start in range(0, 60, size):
        # What a part should become has no say in its own correction: with fewer windows than parts a part is a window,
        # lest a window's correction be fitted on other tokens of the same text.
        own = torch.zeros(60, dtype=torch.bool)
        own[start : start + size] = True
        others = ~own
        changed = [part.clone() for part in rows]
        changed[2][own] = torch.randn(size, 32) * 5
        again, _ = crossed.correct(1, *(part.view(output.shape) for part in changed))
        torch.testing.assert_close(again.flatten(0, 1)[own], corrected.flatten(0, 1)[own], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(again.flatten(0, 1)[others], corrected.flatten(0, 1)[others], rtol=1e-2)


@pytest.mark.parametrize(("windows", "parts"), [(5, 4), (7, 4), (6, 4), (9, 2)])
def test_no_window_stands_in_two_parts(windows: int, parts: int) -> None:
    """It would be corrected by a map that was fitted on the rest of its own text."""
    rows = compensator._split(torch.zeros(windows, 7, 3), parts)
    assert len(rows) == parts
    assert [part.start for part in rows] == [0, *(part.stop for part in rows[:-1])] and rows[-1].stop == 7 * windows
    assert all(part.stop % 7 == 0 for part in rows)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_noise_is_not_fitted_across_parts(family: str) -> None:
    model = tiny_model(family)
    replay = Replay(model, token_ids(model, (8, 8)))
    output, mlp, _ = Compensator(replay).run(1, replay.split(replay.states[1]))
    noise = output + torch.randn(output.shape, generator=torch.Generator().manual_seed(0))

    def error(parts: int) -> float:
        corrected, _ = Compensator(replay, ridge=1e-3, parts=parts).correct(1, output, mlp, noise)
        return float((corrected - noise).square().sum() / (output - noise).square().sum())

    assert error(1) < 0.9
    assert error(4) > 1


@torch.no_grad()
def test_massive_activations_stay_what_they_are() -> None:
    model = tiny_model("llama")
    replay = Replay(model, token_ids(model, (8, 30)))
    output, mlp, _ = Compensator(replay).run(1, replay.split(replay.states[1]))
    target = replay.states[4].clone()
    massive = 1000 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    for states in (output, mlp, target):
        states[:, 0] += massive  # in each window, as the first tokens of real models have them

    def change(outliers: float) -> float:
        corrected, _ = Compensator(replay, ridge=0.1, outliers=outliers).correct(1, output, mlp, target)
        return float((corrected - output)[:, 0].norm() / output[:, 0].norm())

    assert change(float("inf")) < 0.1
    assert change(10.0) > 0.3


@torch.no_grad()
def test_few_massive_tokens_count_as_their_share_of_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in a long window would hardly be told from the others' noise, and all later blocks attend to it."""
    model = tiny_model("llama")
    replay = Replay(model, token_ids(model, (8, 250)))
    output, mlp, _ = Compensator(replay).run(1, replay.split(replay.states[1]))
    generator = torch.Generator().manual_seed(3)
    output, mlp = output.clone(), torch.randn(mlp.shape, generator=generator)
    # Massive ones want little of what they put out changed, the others all of it.
    target = output - mlp + torch.randn(mlp.shape, generator=generator)
    mlp[:, 0] *= 20
    output[:, 0] = mlp[:, 0]
    target[:, 0] = 1.1 * mlp[:, 0]

    def errors() -> tuple[float, float]:
        corrected, _ = Compensator(replay, ridge=1e-3).correct(1, output, mlp, target)
        error = (corrected - target).norm(dim=-1) / target.norm(dim=-1)
        return float(error[:, 0].mean()), float(error[:, 1:].mean())

    massive, others = errors()
    monkeypatch.setattr(compensator, "_SHARE_OF_MASSIVE", 0.0)
    massive_before, others_before = errors()
    assert massive < 0.7 * massive_before
    assert others < 1.05 * others_before


@pytest.mark.parametrize("family", NORMED)
@torch.no_grad()
def test_a_map_and_scales_in_front_of_the_stream_are_found_through_the_norm(family: str) -> None:
    model = tiny_model(family)
    # The map is fitted behind scales that differ as those of real models do, and works in front of them.
    norm = blocks_of(model)[2].post_feedforward_layernorm
    norm.weight.copy_(weight_for(norm, torch.linspace(0.3, 3, 32)))
    replay = Replay(model, token_ids(model, (16, 30)))
    other = copy.deepcopy(model)
    norm = blocks_of(other)[2].post_feedforward_layernorm
    merge_(other, {2: correction(scale_H=effective_scale(norm) * torch.linspace(0.7, 1.4, 32))})
    target = Replay(other, replay.ids_WT).states[3]
    compensator = Compensator(replay, ridge=1e-6, rounds=10)
    output, mlp, _ = compensator.run(2, replay.split(replay.states[2]))
    corrected, found = compensator.correct(2, output, mlp, target)
    assert found.report.after < 0.02 * found.report.before
    assert (corrected - target).norm() < 0.15 * (output - target).norm()


@torch.no_grad()
def test_alternating_rounds_pay_and_never_end_worse() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 16, generator=generator)
    scale = torch.linspace(0.5, 3, 16)
    wanted = 2 * scale * rms_normed(rows @ torch.randn(16, 16, generator=generator), 1e-6)
    weight = torch.ones(400)
    errors = []
    for rounds in (0, 1, 4, 8):
        fit = fit_through_norm(rows, rows, wanted, weight, scale, 1e-6, ridge=1e-4, rounds=rounds)
        errors.append(error_of(fit, rows, rows, wanted, weight, 1e-6))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


@torch.no_grad()
def test_a_round_that_makes_it_worse_is_not_kept() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(60, 16, generator=generator)
    scale = torch.linspace(0.5, 3, 16)
    # Contributions of very different size, which no norm can give.
    wanted = scale * rms_normed(rows, 1e-6) * torch.rand(60, 1, generator=generator) ** 4 * 20
    weight = torch.ones(60)
    errors = []
    for rounds in (0, 3, 6):
        fit = fit_through_norm(rows, rows, wanted, weight, scale, 1e-6, ridge=1e-3, rounds=rounds)
        errors.append(error_of(fit, rows, rows, wanted, weight, 1e-6))
    assert errors[1] == errors[2] == errors[0]


@pytest.mark.parametrize("family", NORMED)
@torch.no_grad()
def test_where_nothing_is_missing_nothing_changes_behind_a_norm(family: str) -> None:
    model = tiny_model(family)
    replay = Replay(model, token_ids(model, (8, 30)))
    compensator = Compensator(replay)
    output, mlp, _ = compensator.run(2, replay.split(replay.states[2]))
    corrected, found = compensator.correct(2, output, mlp, output)
    torch.testing.assert_close(corrected, output, rtol=1e-4, atol=1e-4)
    assert found.map_KH.abs().max() < 1e-3


def test_sums_tell_the_error_of_a_map_without_the_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, wanted = torch.randn(50, 6, generator=generator), torch.randn(50, 4, generator=generator)
    weight = torch.rand(50, generator=generator)
    weight[:5] = 0
    map_KH, bias_H = torch.randn(6, 4, generator=generator).double(), torch.randn(4, generator=generator).double()
    missed = wanted.double() - inputs.double() @ map_KH - bias_H
    expected = (weight * missed.square().sum(-1)).sum() / (weight * wanted.square().sum(-1)).sum()
    sums = Sums.of(inputs[:20], wanted[:20], weight[:20]) + Sums.of(inputs[20:], wanted[20:], weight[20:])
    assert sums.error(map_KH, bias_H) == pytest.approx(float(expected), rel=1e-5)
    assert sums.count == 45


def test_solutions_are_those_of_weighted_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, wanted = torch.randn(50, 6, generator=generator), torch.randn(50, 4, generator=generator)
    weight = torch.rand(50, generator=generator) + 0.1
    found, bias = solve(Sums.of(inputs, wanted, weight), 0.0, bias=True)
    root = weight.double().sqrt()[:, None]
    with_one = torch.cat([inputs.double(), torch.ones(50, 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(with_one * root, wanted.double() * root).solution
    torch.testing.assert_close(found, expected[:-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias, expected[-1], rtol=1e-4, atol=1e-5)


def test_the_ridge_draws_scales_to_those_there_are() -> None:
    generator = torch.Generator().manual_seed(0)
    unscaled, wanted = torch.randn(50, 4, generator=generator), torch.randn(50, 4, generator=generator)
    weight, own = torch.rand(50, generator=generator) + 0.1, torch.tensor([0.5, -2.0, 3.0, 1.0])
    free = [
        torch.linalg.lstsq(weight.sqrt()[:, None] * x[:, None], (weight.sqrt() * y)[:, None]).solution[0, 0]
        for x, y in zip(unscaled.T, wanted.T, strict=True)
    ]
    torch.testing.assert_close(best_scales(unscaled, wanted, weight, 0.0, own), torch.stack(free))
    torch.testing.assert_close(best_scales(unscaled, wanted, weight, 1e6, own), own, rtol=1e-4, atol=1e-4)


def test_a_singular_gram_matrix_has_a_solution() -> None:
    inputs = torch.ones(10, 3)
    found, _ = solve(Sums.of(inputs, 2 * torch.ones(10, 2), torch.ones(10)), 0.0, bias=False)
    torch.testing.assert_close(inputs.double() @ found, 2 * torch.ones(10, 2, dtype=torch.float64), rtol=1e-3, atol=0)
    nothing, _ = solve(Sums.of(0 * inputs, inputs, torch.ones(10)), 0.0, bias=False)
    assert not nothing.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_to_what_is_not_finite_nothing_is_fitted(bad: float) -> None:
    """No ridge makes them positive definite, so that looking for one would never end."""
    inputs = torch.randn(10, 3)
    inputs[4, 1] = bad
    for has_bias in (False, True):
        found, bias = solve(Sums.of(inputs, torch.ones(10, 2), torch.ones(10)), 0.1, bias=has_bias)
        assert torch.equal(found, torch.zeros(3, 2, dtype=torch.float64))
        assert bias is None or torch.equal(bias, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_a_nearly_silent_mlp_in_float16_is_fitted_through_its_norm(family: str) -> None:
    """Its large inner activations, divided by the small norm of what they make, are more than float16 holds."""
    model = tiny_model(family)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-5)
        model.model.layers[1].mlp.up_proj.weight.mul_(30)
    found = compensate(model.half(), FoldPlan.create(source_model_of(model), removed=[2]), token_ids(model, (4, 16)))
    assert all(bool(correction.map_KH.isfinite().all()) for correction in found.values())


def test_the_ridge_does_not_depend_on_the_size_of_the_states() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, wanted = torch.randn(50, 6, generator=generator), torch.randn(50, 4, generator=generator)
    found, _ = solve(Sums.of(inputs, wanted, torch.ones(50)), 0.3, bias=False)
    larger, _ = solve(Sums.of(8 * inputs, wanted, torch.ones(50)), 0.3, bias=False)
    torch.testing.assert_close(8 * larger, found)


@torch.no_grad()
def test_the_held_out_tokens_are_used_in_the_end() -> None:
    model = tiny_model("llama")
    replay = Replay(model, token_ids(model, (8, 30)))
    compensator = Compensator(replay, ridge=0.1, outliers=1e9)
    output, mlp, _ = compensator.run(1, replay.split(replay.states[1]))
    target = replay.states[3]
    weight = 1 / target.flatten(0, 1).square().sum(-1)
    expected, _ = solve(Sums.of(mlp.flatten(0, 1), (target - output).flatten(0, 1), weight), 0.1, bias=False)
    _, found = compensator.correct(1, output, mlp, target)
    torch.testing.assert_close(found.map_KH.double(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_tokens_that_are_spared_pass_as_they_are_and_are_not_fitted_on(family: str) -> None:
    """Behind a fit on few tokens they would change most, and all later blocks attend to them."""
    model = tiny_model(family)
    replay = Replay(model, token_ids(model, (8, 30)))
    compensator = Compensator(replay, parts=4, spared=10.0)
    output, mlp, _ = compensator.run(1, replay.split(replay.states[1]))
    output, target = output.clone(), replay.states[4].clone()
    output[:, 0], target[:, 0] = 1e3 * output[:, 0], 1e3 * target[:, 0]
    corrected, found = compensator.correct(1, output, mlp, target)
    torch.testing.assert_close(corrected[:, 0], output[:, 0])
    assert found.report.left_out == 8 and found.report.tokens == 8 * 29
    assert not torch.allclose(corrected[:, 1:], output[:, 1:], rtol=1e-2)
    target[:, 0] *= -2
    again, _ = compensator.correct(1, output, mlp, target)
    torch.testing.assert_close(again, corrected)
    # Without it they are corrected with the others.
    changed, plain = Compensator(replay, parts=4).correct(1, output, mlp, target)
    assert plain.report.left_out == 0 and not torch.allclose(changed[:, 0], output[:, 0], rtol=1e-2)
