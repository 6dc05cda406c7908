"""The last word of a passage: what a model has to produce, where multiple choice only has it choose.

Multiple choice can hide that a model has lost the ability to write: it has but to rank a few given answers. Here it
has to find one word among all, as in LAMBADA, but on any text.
"""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch

from foldgpt.artifacts import hash_of
from foldgpt.evaluation.errors import MeasurementError
from foldgpt.evaluation.perplexity import exp_of_mean
from foldgpt.families import input_device
from foldgpt.formats import dtype_name
from foldgpt.progress import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from foldgpt.corpus import Windows

#: A whole word of letters, with white space before it and something other than a letter after it.
_WORD = re.compile(r"(?<=\s)[^\W\d_]+(?=[\W\d_])")
#: A passage shorter than this says too little about its last word.
_MIN_CONTEXT_TOKENS = 8


@dataclass(frozen=True)
class LastWord:
    """How well a model finds the last whole word of each passage.

    Attributes:
        accuracy: fraction of passages whose word is the likeliest, token by token.
        accuracy_error: standard error of the accuracy over passages; None for a single passage.
        perplexity: exp of the mean negative log-likelihood per word (not per token).
        mean_nll: that mean, in nats per word.
        nll_error: standard error of it over passages; None for a single passage.
        num_passages: how many passages there were.
        dtype: what the model computed in.
        fingerprint: of contexts and words; two results compare only if it is the same.
        protocol: how the passages were made.
    """

    accuracy: float
    accuracy_error: float | None
    perplexity: float
    mean_nll: float
    nll_error: float | None
    num_passages: int
    dtype: str
    fingerprint: str
    protocol: dict[str, Any]


@torch.inference_mode()
def last_word(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Windows) -> LastWord:
    """Measure how well a model finds the last whole word of each window of text, given all that stands before it.

    Args:
        model: a causal language model, on any device. Its training flag is as before when this returns.
        tokenizer: the one that the windows were made with.
        windows: token ids [num_windows, context]. Each is decoded to text, cut after its last whole word of letters
            and encoded again, so that the word is split as the tokenizer splits it there.

    Raises:
        MeasurementError: no window holds a word, or the model's output is not finite.
    """
    prefix = windows.ids[0, :1].tolist() if windows.protocol.get("bos") else []
    passages = [
        passage for ids_T in windows.ids if (passage := _passage(tokenizer, ids_T.tolist(), prefix)) is not None
    ]
    if not passages:
        raise MeasurementError(f"none of {len(windows.ids)} windows holds a word that could be predicted.")
    keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
    nlls: list[float] = []
    hits: list[bool] = []
    was_training = model.training
    model.eval()
    try:
        with bar("Last words", len(passages)) as progress:
            for context, word in passages:
                options = {"logits_to_keep": len(word)} if keeps_logits else {}
                ids_BT = torch.tensor([[*context, *word[:-1]]], device=input_device(model))
                logits_TV = model(input_ids=ids_BT, use_cache=False, **options).logits[0, -len(word) :].float()
                targets_T = torch.tensor(word, device=logits_TV.device)
                nlls.append(torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="sum").item())
                hits.append(bool((logits_TV.argmax(-1) == targets_T).all()))
                progress.advance()
    finally:
        model.train(was_training)
    mean_nll = fmean(nlls)
    if not math.isfinite(mean_nll):
        raise MeasurementError("the log-likelihoods of last words are not finite; they would mean nothing.")
    several = len(nlls) > 1
    return LastWord(
        accuracy=fmean(hits),
        accuracy_error=stdev(map(float, hits)) / math.sqrt(len(hits)) if several else None,
        perplexity=exp_of_mean(mean_nll, "word"),
        mean_nll=mean_nll,
        nll_error=stdev(nlls) / math.sqrt(len(nlls)) if several else None,
        num_passages=len(nlls),
        dtype=dtype_name(model.dtype),
        fingerprint=hash_of(passages),
        protocol={
            "texts": windows.protocol.get("texts"),
            "windows": len(windows.ids),
            "context": windows.ids.shape[1],
            "bos": bool(prefix),
            "word": "the last run of letters between white space and something else",
        },
    )


def _passage(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], prefix: list[int]
) -> tuple[list[int], list[int]] | None:
    """Tokens of a window's text up to its last whole word, and of that word; None if there is too little of either."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    words = list(_WORD.finditer(text))
    if not words:
        return None
    word = words[-1]
    context = _encode(tokenizer, text[: word.start()].rstrip())
    whole = _encode(tokenizer, text[: word.end()])
    # White space belongs to the word, as tokenizers have it; where it merges with the text before, this is no split.
    if len(context) < _MIN_CONTEXT_TOKENS or whole[: len(context)] != context:
        return None
    return [*prefix, *context], whole[len(context) :]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
