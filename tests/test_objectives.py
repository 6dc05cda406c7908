"""Chunked divergences equal the plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from foldgpt.errors import UnsupportedModelError
from foldgpt.objectives import Head, cross_entropy, divergence, forward_kl, forward_kl_loss
from models import tiny_model, token_ids


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "CHUNK_BYTES", 4 * 128 * 3)  # three rows, so that the last chunk is ragged


def _hidden(rows: int = 10) -> tuple[Head, torch.Tensor, torch.Tensor]:
    model = tiny_model("llama").requires_grad_(False)
    torch.manual_seed(0)
    return Head(model), torch.randn(rows, 32), torch.randn(rows, 32)


def _plain(head: Head, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    target, own = (functional.log_softmax(head.logits(h), -1) for h in (teacher, student))
    return functional.kl_div(own, target, log_target=True, reduction="none").sum(-1)


def test_forward_kl_equals_the_plain_one() -> None:
    head, teacher, student = _hidden()
    torch.testing.assert_close(forward_kl(head, teacher, student), _plain(head, teacher, student))
    assert forward_kl(head, teacher, teacher).abs().max() < 1e-5


def test_loss_and_gradient_equal_the_plain_ones() -> None:
    head, teacher, student = _hidden()
    student.requires_grad_()
    plain = _plain(head, teacher, student).mean()
    (expected,) = torch.autograd.grad(plain, student)
    loss = forward_kl_loss(head, teacher, student)
    (2 * loss).backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(student.grad, 2 * expected)


def test_cross_entropy_equals_the_plain_one() -> None:
    head, hidden, _ = _hidden()
    targets = torch.arange(10)
    expected = functional.cross_entropy(head.logits(hidden), targets, reduction="none")
    torch.testing.assert_close(cross_entropy(head, hidden, targets), expected)


@pytest.mark.parametrize("family", ["llama-tied", "gemma2", "gemma3", "granite", "gpt2", "opt", "falcon"])
@torch.no_grad()
def test_head_makes_the_models_own_logits(family: str) -> None:
    model: Any = tiny_model(family)
    ids = token_ids(model)
    hidden = model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(Head(model).logits(hidden), model(input_ids=ids).logits.float())


def test_an_unknown_head_is_refused() -> None:
    model: Any = tiny_model("granite")
    Head(model)
    model.config.logits_scaling = 1.0
    head_of_another = model.forward
    model.forward = lambda **kwargs: _scaled(head_of_another(**kwargs))
    with pytest.raises(UnsupportedModelError, match="does something to its logits"):
        Head(model)


def _scaled(output: Any) -> Any:
    output.logits = output.logits * 3
    return output
