"""Private terms of output layers, where the answer was planted."""

from __future__ import annotations

import pytest
import torch

from foldgpt.folding.fitted import LowRank
from foldgpt.sharing.output_fit import OutputFit, Wanted, fit_output

ROWS, INPUTS, OUTPUTS = 1200, 24, 16


def case(*, epsilon: float | None, rank: int, scale: torch.Tensor, start: float, noise: float = 0.0) -> Wanted:
    """Rows made by known private terms."""
    torch.manual_seed(0)
    inputs = torch.randn(ROWS, INPUTS) * torch.logspace(0, 1, INPUTS)
    shared = inputs @ torch.randn(INPUTS, OUTPUTS)
    planted = LowRank(torch.randn(OUTPUTS, max(rank, 1)), torch.randn(max(rank, 1), INPUTS))
    fit = OutputFit(scale, planted if rank else None, 1.0, 1.0)
    wanted = Wanted(
        inputs, shared, torch.zeros(ROWS, OUTPUTS), torch.rand(ROWS) + 0.5, 0.7, epsilon, torch.full((OUTPUTS,), start)
    )
    contribution = fit.contribution(wanted)
    contribution = contribution + noise * contribution.std() * torch.randn_like(contribution)
    return Wanted(
        inputs, shared, contribution, wanted.weight_R, wanted.multiplier, epsilon, torch.full((OUTPUTS,), start)
    )


@pytest.mark.parametrize("epsilon", [None, 1e-6])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_planted_scales_are_found(epsilon: float | None, start: float) -> None:
    scale = torch.linspace(-1, 2, OUTPUTS)
    found = fit_output(case(epsilon=epsilon, rank=0, scale=scale, start=start), rank=0, scales=True, first_held=900)
    assert found.low_rank is None
    torch.testing.assert_close(found.scale_H, scale, rtol=0.05, atol=0.05)
    assert found.after < 1e-3 < found.before


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_planted_map_is_found(start: float) -> None:
    wanted = case(epsilon=None, rank=3, scale=torch.full((OUTPUTS,), start), start=start)
    found = fit_output(wanted, rank=3, scales=False, first_held=900)
    assert found.after < 0.01 * found.before
    assert fit_output(wanted, rank=1, scales=False, first_held=900).after > 5 * found.after
    assert found.low_rank is not None and found.low_rank.rank == 3
    assert torch.equal(found.scale_H, wanted.start_H)


def test_a_map_through_a_norm_helps() -> None:
    wanted = case(epsilon=1e-6, rank=3, scale=torch.linspace(0.5, 2, OUTPUTS), start=1.0)
    with_map = fit_output(wanted, rank=3, scales=True, first_held=900)
    assert with_map.after < 0.5 * fit_output(wanted, rank=0, scales=True, first_held=900).after


def test_the_map_is_the_best_of_its_rank() -> None:
    """Against the textbook: with plenty of rows and next to no ridge, the SVD of the fitted values of ordinary
    least squares, cut."""
    wanted = case(epsilon=None, rank=8, scale=torch.zeros(OUTPUTS), start=0.0, noise=0.1)
    found = fit_output(wanted, rank=2, scales=False, first_held=900)
    root = wanted.weight_R.sqrt()[:, None].double()
    inputs, aim = wanted.inputs_RK.double() * root, wanted.contribution_RH.double() * root
    fitted = inputs @ torch.linalg.lstsq(inputs, aim).solution
    u, s, v = torch.linalg.svd(fitted, full_matrices=False)
    best = float((aim - u[:, :2] @ torch.diag(s[:2]) @ v[:2]).square().sum())
    ours = float((aim - found.contribution(wanted).double() * root).square().sum())
    assert best <= ours < 1.02 * best


@pytest.mark.parametrize("epsilon", [None, 1e-6])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_where_there_is_nothing_to_learn_it_stays_where_it_began(epsilon: float | None, start: float) -> None:
    """Contributions that have nothing to do with the inputs: held-out rows ask for the strongest ridge."""
    wanted = case(epsilon=epsilon, rank=0, scale=torch.full((OUTPUTS,), start), start=start)
    noise = torch.randn(ROWS, OUTPUTS)
    wanted = Wanted(
        wanted.inputs_RK,
        wanted.shared_RH,
        wanted.contribution_RH + noise,
        wanted.weight_R,
        0.7,
        epsilon,
        wanted.start_H,
    )
    found = fit_output(wanted, rank=4, scales=True, first_held=900)
    assert found.after < 1.02 * found.before
    assert float((found.scale_H - start).abs().max()) < 0.3
