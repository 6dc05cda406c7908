"""Perplexity equals the naive formula, says how it was measured, and refuses what would mean nothing."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from foldgpt.corpus import Windows
from foldgpt.errors import UsageError
from foldgpt.evaluation import MeasurementError, perplexity

#: The module; the package holds the function under the same name.
MODULE = importlib.import_module("foldgpt.evaluation.perplexity")

VOCAB = 61
CONTEXT = 16


def llama(**fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        **fields,
    )
    model = LlamaForCausalLM(config).eval()
    # The default start is so small that every prediction is nearly uniform: sharpen it.
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return model


def windows(num_windows: int = 5, context: int = CONTEXT, score_from: list[int] | None = None) -> Windows:
    ids = torch.randint(VOCAB, (num_windows, context), generator=torch.Generator().manual_seed(1))
    protocol = {"context": context, "stride": context, "bos": False, "vocabulary_size": VOCAB}
    return Windows(ids, torch.tensor(score_from or [1] * num_windows), protocol)


def naive_nll(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every target [num_windows, context - 1], by the plainest means."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.double().view(len(ids), -1)


@pytest.mark.parametrize("batch_size", ["auto", 1, 2, 5])
def test_equals_naive_cross_entropy(batch_size: Any) -> None:
    model, text = llama(), windows()
    measured = perplexity(model, text, batch_size=batch_size)
    expected = naive_nll(model, text.ids)
    assert measured.mean_nll == pytest.approx(expected.mean().item(), rel=1e-6)
    assert measured.value == pytest.approx(math.exp(expected.mean().item()), rel=1e-6)
    assert measured.window_nlls == pytest.approx(expected.sum(1).tolist(), rel=1e-5)
    assert measured.window_tokens == [CONTEXT - 1] * len(text.ids)
    assert measured.standard_error == pytest.approx(expected.mean(1).std().item() / math.sqrt(5), rel=1e-5)
    assert (measured.num_tokens_scored, measured.num_windows) == (5 * (CONTEXT - 1), 5)


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = llama(), windows()
    whole = perplexity(model, text)
    monkeypatch.setattr(MODULE, "_CHUNK_BYTES", 4 * VOCAB * 4)
    assert perplexity(model, text).mean_nll == pytest.approx(whole.mean_nll, rel=1e-12)


def test_auto_batch_bounds_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = llama(), windows()
    monkeypatch.setattr(MODULE, "_LOGIT_BYTES", 2 * CONTEXT * VOCAB * 4)
    seen: list[int] = []
    model.register_forward_hook(lambda _module, _arguments, output: seen.append(output.logits.shape[0]))
    perplexity(model, text)
    assert seen == [2, 2, 1]


def test_scores_only_from_the_given_targets() -> None:
    model = llama()
    first = [1, 12, 12, 12, 15]
    text = windows(score_from=first)
    measured = perplexity(model, text)
    losses = naive_nll(model, text.ids)
    scored = torch.cat([row[index - 1 :] for row, index in zip(losses, first, strict=True)])
    assert measured.num_tokens_scored == len(scored) == 28
    assert measured.mean_nll == pytest.approx(scored.mean().item(), rel=1e-6)


def test_single_window_has_no_standard_error() -> None:
    assert perplexity(llama(), windows(1)).standard_error is None


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    measured = perplexity(model, windows())
    assert measured.value == pytest.approx(VOCAB, rel=1e-6)
    assert measured.standard_error == pytest.approx(0, abs=1e-6)


def test_low_precision_logits_are_scored_in_fp32() -> None:
    model, text = llama().to(torch.bfloat16), windows()
    measured = perplexity(model, text)
    assert measured.dtype == "bfloat16"
    assert measured.mean_nll == pytest.approx(naive_nll(model, text.ids).mean().item(), rel=1e-6)


def test_carries_protocol_and_fingerprint() -> None:
    """Field note M5: no perplexity without how it was measured."""
    text = windows()
    measured = perplexity(llama(), text)
    assert measured.protocol == text.protocol
    assert measured.fingerprint == text.fingerprint


def test_training_flag_is_restored_and_dropout_is_off() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.5)
    ).train()
    text = windows()
    assert perplexity(model, text).value == perplexity(model, text).value
    assert model.training


def test_non_finite_output_is_an_error_that_names_the_window() -> None:
    model, text = llama(), windows()
    text.ids[text.ids == 7] = 8
    text.ids[3, 2] = 7
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    with pytest.raises(MeasurementError, match=r"not finite in 1 of 5 windows .*window 3"):
        perplexity(model, text)


def test_perplexity_beyond_a_float_is_an_error() -> None:
    model, text = llama(), windows()
    torch.nn.init.normal_(model.lm_head.weight, std=1e4)
    with pytest.raises(MeasurementError, match="too large"):
        perplexity(model, text)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    text = windows()
    text.ids[0, 0] = VOCAB
    with pytest.raises(UsageError, match=f"token id {VOCAB}.*vocabulary has {VOCAB}"):
        perplexity(llama(), text)


def test_windows_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(UsageError, match="16 tokens, but the model has 8 positions"):
        perplexity(llama(max_position_embeddings=8), windows())


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(MeasurementError, match="no token to score"):
        perplexity(llama(), windows(3, 1))


def test_batch_size_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="batch_size is 0"):
        perplexity(llama(), windows(), batch_size=0)
