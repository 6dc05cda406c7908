"""Chunked divergences equal the plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from foldgpt.errors import UnsupportedModelError
from foldgpt.objectives import Head, SourcePredictions, cross_entropy, divergence, forward_kl
from models import head_of, tiny_model, token_ids


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite", "gemma2"])
@pytest.mark.parametrize("biased", [False, True])
def test_predictions_once_reduced_give_the_plain_divergence(family: str, biased: bool) -> None:
    """A factor, a cap and a bias of the head included, and more tokens than are kept one by one."""
    model: Any = tiny_model(family).requires_grad_(False)
    if biased:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(128), requires_grad=False)
    torch.manual_seed(0)
    head, teacher, student = Head(model), torch.randn(10, 32), torch.randn(10, 32)
    found = SourcePredictions(head, teacher).kl(student)
    torch.testing.assert_close(found, _plain(head, teacher, student), rtol=1e-4, atol=1e-5)


def test_the_rounding_of_a_head_in_bf16_is_no_noise_in_a_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logsumexp is of rounded logits. Against Σ p z that is not rounded, a likely token's error is all there."""
    monkeypatch.setattr(divergence, "CHUNK_BYTES", 2**22)
    torch.manual_seed(0)
    weight = 0.12 * torch.randn(4096, 128)
    # Each row likes one token, as a language model does.
    teacher = (3 * torch.randn(256, 128) + weight[torch.randint(4096, (256,))] / 0.12).bfloat16()
    student = teacher + 0.1 * torch.randn(256, 128).bfloat16()
    exact, rounded = (head_of(weight.bfloat16().to(dtype)) for dtype in (torch.float32, torch.bfloat16))
    expected = forward_kl(exact, teacher.float(), student.float())
    predictions = SourcePredictions(rounded, teacher)
    assert float(predictions.kl(teacher).abs().max()) < 1e-5, "of the source itself, nothing"
    noise = (predictions.kl(student) - expected).std()
    of_both_tables = (forward_kl(rounded, teacher, student) - expected).std()
    assert float(noise) < 1.2 * float(of_both_tables)
    assert float(predictions.kl(student).min()) > -0.01 * float(expected.mean())
    # The trap: the logsumexp of rounded logits, beside a product that is not.
    log_p = exact.logits(teacher.float()).log_softmax(-1)
    mixed = (log_p.exp() * (log_p - exact.logits(student.float()))).sum(-1) + rounded.logits(student).logsumexp(-1)
    assert float((mixed - expected).std()) > 3 * float(noise)


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
