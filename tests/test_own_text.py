"""Text that a model writes itself: from its own distribution, the same each time, sampled only as far as it is read."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from foldgpt.corpus import OwnText, calibration_windows, evaluation_windows, read_documents
from foldgpt.corpus.own_text import Sampling
from foldgpt.errors import FoldGPTError, SourceError, UsageError
from foldgpt.recovery import packed_windows
from models import tiny_model
from tiny import BOS_ID, EOS_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer(80)
"""One token for each of the most common ASCII characters, so that text and ids tell each other."""


def model(**changes: Any) -> Any:
    return tiny_model("llama", vocab_size=80, bos_token_id=BOS_ID, eos_token_id=EOS_ID, **changes)


def own_text(folder: Path, writer: Any = None, fingerprint: str = "tiny") -> OwnText:
    writer = writer or model()
    return OwnText(lambda: writer, TOKENIZER, fingerprint, folder)


def first(own: OwnText, count: int, **sampling: Any) -> list[str]:
    return list(itertools.islice(own.documents(Sampling(**sampling)), count))


def test_line_separators_within_a_document_are_no_line_ends_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = ["a\u2028b", "c\u2029d\u0085e", "f\ng"]
    monkeypatch.setattr(OwnText, "_sample", lambda *_: written)
    assert first(own_text(tmp_path), 3) == written


def no_model() -> Any:
    raise AssertionError("the model is not needed")


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.6)])
def test_the_first_token_follows_the_models_distribution(tmp_path: Path, temperature: float, top_p: float) -> None:
    writer = model()
    # A model's own wishes for chats are not for this.
    writer.generation_config.update(top_k=1, min_p=0.9, suppress_tokens=[5, 6], min_new_tokens=3)
    with torch.no_grad():
        logits = writer(input_ids=torch.tensor([[BOS_ID]])).logits[0, -1]
    probability = (logits / temperature).softmax(-1)
    ordered, places = probability.sort(descending=True)
    probability[places[ordered.cumsum(0) - ordered >= top_p]] = 0
    # What decodes to nothing or to white space alone is no document.
    characters = {token: TOKENIZER.decode([token], skip_special_tokens=True) for token in range(80)}
    seen = {token: text for token, text in characters.items() if text.strip() and token != EOS_ID}
    expected = {text: float(probability[token]) for token, text in seen.items()}
    total = sum(expected.values())
    found = Counter(first(own_text(tmp_path, writer), 1500, temperature=temperature, top_p=top_p, length=1))
    assert all(expected[text] > 0 for text in found)
    distance = sum(abs(found[text] / 1500 - chance / total) for text, chance in expected.items()) / 2
    assert distance < 0.09


def test_documents_end_with_the_models_eos(tmp_path: Path) -> None:
    writer = model()
    embedding = writer.get_output_embeddings()
    with torch.no_grad():
        embedding.weight[EOS_ID] = embedding.weight[5:].mean(0) + 0.3 * embedding.weight[7]
    lengths = [len(document) for document in first(own_text(tmp_path, writer), 64, length=30)]
    assert min(lengths) < 15 and max(lengths) == 30
    writer.generation_config.eos_token_id = [EOS_ID, *range(3, 40)]  # as chat models name several
    ended = first(own_text(tmp_path / "several", writer), 64, length=30)
    assert not set("".join(ended)) & {TOKENIZER.decode([token]) for token in range(3, 40)}


def test_what_was_sampled_is_only_read_and_does_not_depend_on_how_much(tmp_path: Path) -> None:
    own = own_text(tmp_path)
    state = torch.random.get_rng_state()
    documents = first(own, 70, length=12)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(set(documents)) > 60
    assert first(OwnText(no_model, TOKENIZER, "tiny", tmp_path), 70, length=12) == documents
    assert first(own_text(tmp_path / "anew"), 10, length=12) == documents[:10]
    assert first(own_text(tmp_path), 10, length=12, seed=1) != documents[:10]
    other = own_text(tmp_path, tiny_model("llama", seed=1, vocab_size=80), "another")
    assert first(other, 10, length=12) != documents[:10]


def test_it_is_a_text_to_calibrate_and_to_train_on(tmp_path: Path) -> None:
    own = own_text(tmp_path / "own")
    windows = calibration_windows(["self:?length=40"], TOKENIZER, context=16, num_tokens=160, own=own)
    assert windows.ids.shape == (10, 16) and windows.protocol["texts"] == ["self:?length=40"]
    train, held_out = packed_windows(
        ["self:?length=40"], TOKENIZER, tmp_path / "ids", context=16, num_tokens=320, num_held_out=32, own=own
    )
    told = TOKENIZER.decode(torch.cat([held_out.ids_WT, train.ids_WT]).flatten()).split("<eos>")
    documents = list(itertools.islice(read_documents(["self:?length=40"], own=own), len(told) - 1))
    assert told[:-1] == documents
    # A shuffle buffer would have read 1,024 documents ahead.
    assert len(list((tmp_path / "own").rglob("*.jsonl"))) == 1
    with pytest.raises(UsageError, match="not to measure on"):
        evaluation_windows(["self:"], TOKENIZER, context=16)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("self:?topp=0.9", "Did you mean 'top_p'"),
        ("self:?top_p=much", "top_p must be a number, not 'much'"),
        ("self:?temperature=0", "more than 0"),
        ("self:?top_p=1.1", "at most 1"),
        ("self:?length=0", "at least 1"),
        ("self:model", "options alone"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, spec: str, message: str) -> None:
    with pytest.raises(FoldGPTError, match=message):
        next(read_documents([spec], own=own_text(tmp_path)))


def test_a_model_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    writer = model()
    writer.generation_config.eos_token_id = list(range(80))
    with pytest.raises(SourceError, match="behind <bos> the model writes nothing"):
        first(own_text(tmp_path, writer), 1, length=12)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_document_has_to_fit_the_models_positions(tmp_path: Path) -> None:
    """GPT-2 has a learned vector for each of them, and none for the next."""
    writer = tiny_model(
        "gpt2", vocab_size=80, bos_token_id=BOS_ID, eos_token_id=EOS_ID, n_positions=16, max_position_embeddings=16
    )
    assert writer.transformer.wpe.num_embeddings == 16
    assert max(len(document) for document in first(own_text(tmp_path, writer), 8, length=16)) == 16
    with pytest.raises(UsageError, match=r"documents of 17 tokens, but the model has 16 .*self:\?length=16"):
        first(own_text(tmp_path, writer), 1, length=17)
