"""What fits are expected to take in memory is what they take."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foldgpt.compensation import compensate_
from foldgpt.folding import source_model_of
from foldgpt.plan import Compensation, Fitting, FoldPlan, Group
from foldgpt.rehearsal.fits import bytes_of_fits
from foldgpt.sharing import boundaries_of, fit_sharing, sharing_replay
from models import tiny_model, token_ids

SHAPE: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 128, "intermediate_size": 384},
    "gemma3": {"hidden_size": 128, "intermediate_size": 384},
    "gpt2": {"n_embd": 128, "n_inner": 384},
}


class Peak(TorchDispatchMode):
    """The most bytes that tensors made under it hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self._known:
                self._known[key] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, key)
        return output

    def _gone(self, key: int) -> None:
        self.live -= self._known.pop(key)


def plan_of(model: Any, num_tokens: int, **changes: Any) -> FoldPlan:
    text = {"texts": ("x",), "context": 16, "num_tokens": num_tokens, "fingerprint": "x"}
    sections = {"compensation": Compensation(**text)} if changes.get("removed") else {}
    if "groups" in changes:
        sections["fitting"] = Fitting(**text)
    return FoldPlan.create(source_model_of(model, name="m"), **changes, **sections)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("removed", [[2, 3], [1, 3]])
@pytest.mark.parametrize("family", SHAPE)
def test_compensation_takes_what_is_expected(family: str, removed: list[int], dtype: torch.dtype) -> None:
    model = tiny_model(family, **SHAPE[family]).to(dtype)
    ids = token_ids(model, (512, 16))
    plan = plan_of(model, ids.numel(), removed=removed)
    with Peak() as took:
        compensate_(model, plan, ids)
    assert 0.8 <= bytes_of_fits(model, plan, ids.numel()) / took.peak <= 1.1
    # The source at all boundaries would be more than a half again.
    assert bytes_of_fits(model.to("meta"), plan, ids.numel()) == bytes_of_fits(tiny_like(model), plan, ids.numel())


def tiny_like(model: Any) -> Any:
    return type(model)(model.config).to(model.dtype)


def test_nothing_is_counted_where_nothing_is_fitted() -> None:
    model = tiny_model("llama")
    plan = FoldPlan.create(source_model_of(model, name="m"), removed=[2])
    assert bytes_of_fits(model, plan, 4096) == 0
    at_the_start = plan_of(model, 4096, removed=[0])
    assert bytes_of_fits(model, at_the_start, 4096) == 0


def test_sharing_keeps_the_states_that_its_fits_look_at_and_no_others() -> None:
    model = tiny_model("llama")
    ids = token_ids(model, (64, 16))
    groups = [Group(blocks=(3, 4), private=("norms", "scales"), ranks=2, donor="least_squares")]
    plan = plan_of(model, ids.numel(), groups=groups)
    assert boundaries_of(plan) == {0, 2, 3, 4, 5, 6}
    some, full = sharing_replay(model, ids, plan), sharing_replay(model, ids)
    assert set(some.states) == boundaries_of(plan) < set(full.states)
    least, most = (fit_sharing(model, plan, ids, replay=replay) for replay in (some, full))
    assert least.kl == most.kl and least.fits[0].weights.keys() == most.fits[0].weights.keys()
    for name, weight in least.fits[0].weights.items():
        assert torch.equal(weight, most.fits[0].weights[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("made", [{"donor": "least_squares", "ranks": 2}, {"donor": "mean"}, {"start": "zero"}])
@pytest.mark.parametrize("family", SHAPE)
def test_sharing_takes_what_is_expected(family: str, made: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny_model(family, **SHAPE[family]).to(dtype)
    ids = token_ids(model, (256, 16))
    blocks = (3, 4) if family == "gemma3" else (1, 2)
    plan = plan_of(model, ids.numel(), groups=[Group(blocks=blocks, private=("norms", "scales"), **made)])
    with Peak() as took:
        fit_sharing(model, plan, ids)
    assert 0.8 <= bytes_of_fits(model, plan, ids.numel()) / took.peak <= 1.2


def test_a_group_that_cannot_be_fitted_takes_what_is_recorded() -> None:
    model = tiny_model("mixtral")
    plan = plan_of(model, 4096, groups=[Group(blocks=(1, 2))])
    assert bytes_of_fits(model, plan, 4096) == 4096 * 32 * 4 * len(boundaries_of(plan))


@pytest.mark.parametrize("start", ["fitted", "zero"])
@pytest.mark.parametrize("blocks", [(0, 1), (1, 2, 3), (4, 5)])
def test_no_fit_of_sharing_looks_elsewhere(blocks: tuple[int, ...], start: str) -> None:
    """A state that is not recorded would be a KeyError."""
    model = tiny_model("gemma3")
    ids = token_ids(model, (64, 16))
    made: dict[str, Any] = {"donor": "least_squares"} if start == "fitted" else {"start": "zero", "norms": "owner"}
    group = Group(blocks=blocks, private=("norms", "scales"), ranks=2, **made)
    plan = plan_of(model, ids.numel(), groups=[group])
    assert fit_sharing(model, plan, ids).kl >= 0
    plan = plan_of(model, ids.numel(), groups=[group], removed=[next(b for b in range(6) if b not in blocks)])
    assert fit_sharing(model, plan, ids).kl >= 0
