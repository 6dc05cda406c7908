"""Last words and generations are what the plainest code gives, and are taken from text as it stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foldgpt.corpus import Windows
from foldgpt.evaluation import MeasurementError, generations, last_word
from models import tiny_model
from multiple_choice import log_likelihood
from tiny import BOS_ID, tiny_tokenizer

VOCABULARY = 300


def windows(tokenizer: Any, texts: list[str], bos: bool = False) -> Windows:
    rows = [[BOS_ID] * bos + tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    length = min(map(len, rows))
    protocol = {"texts": ["x"], "context": length, "stride": length, "bos": bos, "vocabulary_size": VOCABULARY}
    ids = torch.tensor([row[:length] for row in rows])
    return Windows(ids, torch.ones(len(rows), dtype=torch.int64), protocol)


@pytest.mark.parametrize("bos", [False, True])
def test_equals_a_plain_scorer(bos: bool) -> None:
    tokenizer = tiny_tokenizer(VOCABULARY, bos=bos)
    model = tiny_model("llama", vocab_size=VOCABULARY)
    # Windows of 28 letters: the word cut by the end is not a whole one, nor is one with a digit or a line of it.
    texts = ["the stream passes every blockade", "it is the sum of residuals, 12 of", "and much of it changes. A"]
    ended = [("the stream passes", " every"), ("it is the sum of", " residuals"), ("and much of it", " changes")]
    ended[1] = ("it is the sum", " of")  # "residuals" is cut
    measured = last_word(model, tokenizer, windows(tokenizer, texts, bos))
    expected = [log_likelihood(model, tokenizer, *pair) for pair in ended]
    assert measured.num_passages == 3
    assert measured.mean_nll == pytest.approx(-sum(expected) / 3, rel=1e-5)
    assert measured.perplexity == pytest.approx(torch.tensor(-sum(expected) / 3).exp().item(), rel=1e-4)
    assert measured.nll_error == pytest.approx(float(torch.tensor(expected).std()) / 3**0.5, rel=1e-4)
    assert measured.protocol["bos"] is bos


def test_accuracy_needs_every_token_of_the_word() -> None:
    tokenizer = tiny_tokenizer(VOCABULARY)
    model = tiny_model("llama", vocab_size=VOCABULARY)
    text = windows(tokenizer, ["some words before the end, then"])
    (context, word) = "some words before the", " end"
    ids = tokenizer(context, add_special_tokens=False)["input_ids"]
    targets = tokenizer(word, add_special_tokens=False)["input_ids"]
    assert last_word(model, tokenizer, text).accuracy == 0
    # A head that always answers with the token that follows in this text makes the whole word right.
    for number_right, expected in ((len(targets), 1.0), (len(targets) - 1, 0.0)):
        forced = tiny_model("llama", vocab_size=VOCABULARY)
        forward = forced.forward

        def answer(input_ids: torch.Tensor, forward: Any = forward, right: int = number_right, **options: Any) -> Any:
            output = forward(input_ids=input_ids, **options)
            for offset, target in enumerate(targets[:right]):
                output.logits[0, output.logits.shape[1] - len(targets) + offset, target] += 1000
            return output

        forced.forward = answer  # type: ignore[method-assign]
        assert last_word(forced, tokenizer, text).accuracy == expected
    assert len(ids) > 8


def test_a_perplexity_beyond_floats_is_one_clear_error() -> None:
    tokenizer = tiny_tokenizer(VOCABULARY)
    model = tiny_model("llama", vocab_size=VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    with pytest.raises(MeasurementError, match="nats per word: its perplexity is too large for a float"):
        last_word(model, tokenizer, windows(tokenizer, ["some words before the end, then"]))


def test_text_without_words_is_refused() -> None:
    tokenizer = tiny_tokenizer(VOCABULARY)
    with pytest.raises(MeasurementError, match="none of 1 windows holds a word"):
        last_word(tiny_model("llama", vocab_size=VOCABULARY), tokenizer, windows(tokenizer, ["12 34 56 78 90 12 34"]))


def test_generations_are_greedy() -> None:
    tokenizer = tiny_tokenizer(VOCABULARY)
    model = tiny_model("llama", vocab_size=VOCABULARY)
    text = windows(tokenizer, ["the residual stream passes every block and few of them change it much", "b" * 70])
    written = generations(model, tokenizer, text, num=5)
    assert len(written) == 2
    assert written[0].prompt == "the residual stream passes every"
    ids = text.ids[:1, :32]
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False, eos_token_id=1, pad_token_id=0
    )
    assert written[0].text == tokenizer.decode(expected[0, 32:], skip_special_tokens=True)
