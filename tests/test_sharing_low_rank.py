"""Donors and low-rank terms where the right answer is known."""

from __future__ import annotations

import itertools

import pytest
import torch

from foldgpt.sharing.covariance import Moments
from foldgpt.sharing.donors import least_squares, relative_error
from foldgpt.sharing.low_rank import spectrum, spread


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def second_moments(size: int, seed: int, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rank or 4 * size, size, dtype=torch.float64, generator=generator)
    inputs = inputs * torch.logspace(0, 2, size, dtype=torch.float64)
    return inputs.T @ inputs / len(inputs)


def error(difference: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.trace(difference @ second @ difference.T))


@pytest.mark.parametrize(("outputs", "inputs"), [(12, 20), (20, 12), (9, 9)])
@pytest.mark.parametrize("rank", [0, 1, 5, 9])
def test_no_matrix_of_that_rank_is_better(outputs: int, inputs: int, rank: int) -> None:
    """Against the textbook: the SVD of D C^½, cut and taken back with C^−½."""
    matrix, second = torch.randn(outputs, inputs, dtype=torch.float64), second_moments(inputs, 1)
    found = spectrum(matrix, second)
    term = found.truncated(rank)
    values, vectors = torch.linalg.eigh(second)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    u, s, v = torch.linalg.svd(matrix @ root, full_matrices=False)
    best = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank] @ torch.linalg.inv(root)
    product = term.up_OR.double() @ term.down_RI.double()
    torch.testing.assert_close(product, best, rtol=1e-4, atol=1e-4 * float(best.abs().max() if rank else 1))
    torch.testing.assert_close(found.energies_K, s.square(), rtol=1e-6, atol=1e-6)
    left = error(matrix - product, second)
    assert left == pytest.approx(float(found.energies_K[rank:].sum()), rel=1e-4, abs=1e-4)
    assert term.rank == rank


@pytest.mark.parametrize("seed", range(8))
def test_a_rank_that_is_not_there_is_harmless(seed: int) -> None:
    """Directions without energy are rounding errors; divided by their size they would be without bound."""
    torch.manual_seed(seed)
    matrix = torch.randn(20, 3, dtype=torch.float64) @ torch.randn(3, 8, dtype=torch.float64)
    term = spectrum(matrix, torch.eye(8)).truncated(8)
    assert float(term.up_OR.abs().max()) < 2
    torch.testing.assert_close(term.up_OR.double() @ term.down_RI.double(), matrix, rtol=1e-4, atol=1e-4)


def test_the_metric_matters() -> None:
    """A plain SVD is worse by far where inputs are not alike in all directions."""
    matrix, second = torch.randn(20, 30, dtype=torch.float64), second_moments(30, 2)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    plain = u[:, :5] @ torch.diag(s[:5]) @ v[:5]
    term = spectrum(matrix, second).truncated(5)
    ours = term.up_OR.double() @ term.down_RI.double()
    assert error(matrix - ours, second) < 0.5 * error(matrix - plain, second)


def test_inputs_that_do_not_occur_cost_nothing() -> None:
    """A singular C, as with fewer tokens than channels, gives finite terms that are exact where it counts."""
    for outputs in (10, 40):
        matrix, second = torch.randn(outputs, 20, dtype=torch.float64), second_moments(20, 3, rank=6)
        term = spectrum(matrix, second).truncated(6)
        assert bool(term.up_OR.isfinite().all() and term.down_RI.isfinite().all())
        left = matrix - term.up_OR.double() @ term.down_RI.double()
        assert error(left, second) < 1e-9 * error(matrix, second)


def test_least_squares_is_the_minimum() -> None:
    weights = [torch.randn(6, 8, dtype=torch.float64) for _ in range(3)]
    seconds = [
        second_moments(8, seed).roll((3 * seed, 3 * seed), (0, 1)) for seed in range(3)
    ]  # each with channels of its own
    found = least_squares(weights, seconds)

    def total(weight: torch.Tensor) -> float:
        return sum(error(weight - own, second) for own, second in zip(weights, seconds, strict=True))

    for _ in range(20):
        assert total(found) <= total(found + 1e-2 * torch.randn_like(found))
    assert total(found) < 0.9 * total(torch.stack(weights).mean(0))


def test_least_squares_of_equal_inputs_is_the_mean_and_each_member_rules_its_own_directions() -> None:
    weights = [torch.randn(6, 8, dtype=torch.float64) for _ in range(2)]
    same = second_moments(8, 5)
    torch.testing.assert_close(least_squares(weights, [same, same]), (weights[0] + weights[1]) / 2)
    halves = [torch.diag(torch.tensor([1.0] * 4 + [0.0] * 4)), torch.diag(torch.tensor([0.0] * 4 + [1.0] * 4))]
    expected = torch.cat([weights[0][:, :4], weights[1][:, 4:]], dim=1)
    torch.testing.assert_close(least_squares(weights, halves), expected, rtol=1e-3, atol=1e-3)


def test_relative_error_is_0_for_the_own_weights_and_1_for_none() -> None:
    own = torch.randn(6, 8)
    moments = Moments(second_moments(8, 6).float(), 32)
    assert relative_error(own, own, moments) == 0
    assert relative_error(torch.zeros_like(own), own, moments) == pytest.approx(1)


def test_spread_buys_the_most_energy() -> None:
    """Against all ways to spend the budget."""
    generator = torch.Generator().manual_seed(0)
    energies = {
        name: torch.rand(4, generator=generator, dtype=torch.float64).sort(descending=True).values for name in "abc"
    }
    prices = {"a": 1.0, "b": 1.0, "c": 1.0}

    def bought(ranks: dict[str, int]) -> float:
        return sum(float(energies[name][:rank].sum()) for name, rank in ranks.items())

    for budget in range(13):
        found = spread(energies, prices, budget)
        ways = [dict(zip("abc", way, strict=True)) for way in itertools.product(range(5), repeat=3)]
        best = max(bought(way) for way in ways if sum(way.values()) <= budget)
        assert sum(found.values()) <= budget
        assert bought(found) == pytest.approx(best)


def test_spread_looks_at_the_price() -> None:
    energies = {"dear": torch.tensor([3.0, 3.0]), "cheap": torch.tensor([2.0, 2.0])}
    assert spread(energies, {"dear": 10.0, "cheap": 1.0}, 12.0) == {"dear": 1, "cheap": 2}
    assert spread(energies, {"dear": 10.0, "cheap": 1.0}, 9.0) == {"dear": 0, "cheap": 2}
