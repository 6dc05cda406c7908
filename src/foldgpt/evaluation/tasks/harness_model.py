"""A loaded model as the harness sees it. Import it late: the harness takes seconds, and may not be installed."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from foldgpt.evaluation.errors import MeasurementError
from foldgpt.families import input_device
from foldgpt.free_memory import free_memory
from foldgpt.progress import bar

#: What the logits of one batch may take in fp32, in bytes. A single input may take more: it cannot be split.
_LOGIT_BYTES = 256 * 2**20
#: Enough tokens to keep the matrix products busy; more only costs memory, and padding of shorter inputs.
_BATCH_TOKENS = 2048
#: An accelerator takes so many times as much of both before it is busy.
_ON_ACCELERATORS = 8

#: Characters of an answer that a message shows.
_SHOWN = 80

_Request = tuple[tuple[str, str], list[int], list[int]]


@dataclass(frozen=True)
class _Input:
    """Tokens to run, and the requests that their logits answer: (index of the request, its continuation)."""

    tokens: tuple[int, ...]
    answers: list[tuple[int, list[int]]]

    @property
    def num_logits(self) -> int:
        """How many of the last positions are needed."""
        return max(len(continuation) for _, continuation in self.answers)


class LoadedModel(HFLM):
    """The harness's own class for Hugging Face models, with another way to run the model.

    Requests, their tokens, their truncation from the left and what a log-likelihood is are the harness's. Only how
    they are computed differs: log-likelihoods are taken in fp32 whatever the model computes in, inputs that are equal
    run once, batches hold inputs of like length up to a fixed size, and logits are made for the continuations alone.

    Attributes:
        doing: what the progress bar says.
        num_truncated: requests so far that were longer than the model's positions.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Wrap a model; neither it nor its tokenizer is changed."""
        # The harness gives a tokenizer without padding a token for it; the caller's stays as it is.
        tokenizer = copy.deepcopy(tokenizer)
        # What the harness would put before an empty prompt. No task has one, but it decodes that of every tokenizer.
        nothing_special = tokenizer.bos_token_id is None and tokenizer.eos_token_id is None
        prefix = {"prefix_token_id": 0} if nothing_special else {}
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, **prefix)
        self._device = input_device(model)
        self.doing = "Scoring"
        self.num_truncated = 0
        self._vocab_size = int(model.config.get_text_config(decoder=True).vocab_size)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As the harness's, without its bars."""
        results: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return results

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each (texts, context, continuation): log-likelihood in nats, and whether each token is the likeliest.

        Raises:
            MeasurementError: an answer has no tokens, or more than the model has positions; or the model's output is
                not finite, and the harness would take it for an answer.
        """
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        inputs = self._inputs(requests)
        with bar(self.doing, len(inputs)) as progress:
            for batch in self._batches(inputs):
                asked, terms, likeliest = [], [], []
                for item, logits_KV in zip(batch, self._logits(batch), strict=True):
                    for index, continuation in item.answers:
                        nll_T, is_likeliest_T = _scored(logits_KV[-len(continuation) :], continuation)
                        asked.append((index, len(continuation)))
                        terms.append(nll_T)
                        likeliest.append(is_likeliest_T)
                # The device is waited for once a batch. Summed on the CPU: not every accelerator knows fp64.
                lengths = [length for _, length in asked]
                summed = [nll_T.double().sum().item() for nll_T in torch.cat(terms).cpu().split(lengths)]
                exact = [bool(found_T.all()) for found_T in torch.cat(likeliest).cpu().split(lengths)]
                for (index, _), nll, is_exact in zip(asked, summed, exact, strict=True):
                    results[index] = (-nll, is_exact)
                progress.advance(len(batch))
        num_bad = sum(not math.isfinite(value) for value, _ in results)
        if num_bad:
            raise MeasurementError(
                f"{num_bad} of {len(results)} log-likelihoods are not finite; an accuracy would mean nothing. Load the "
                "model in float32 (--dtype), or check its weights."
            )
        return results

    def _inputs(self, requests: list[_Request]) -> list[_Input]:
        """What has to be run, longest first; equal inputs once, as for choices of one token after one prompt."""
        found: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for index, (texts, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise MeasurementError(
                    f"an answer of {len(continuation):,} tokens cannot be scored by a model with {self.max_length:,} "
                    f"positions: {_shortened(texts[1])}"
                )
            whole = context + continuation
            self.num_truncated += len(whole) > self.max_length + 1
            tokens = tuple(whole[-(self.max_length + 1) : -1])
            found.setdefault(tokens, []).append((index, continuation))
        inputs = [_Input(tokens, answers) for tokens, answers in found.items()]
        return sorted(inputs, key=lambda item: -len(item.tokens))

    def _batches(self, inputs: list[_Input]) -> Iterator[list[_Input]]:
        times = 1 if self.device.type == "cpu" else _ON_ACCELERATORS
        most_tokens, most_logits = times * _BATCH_TOKENS, times * _LOGIT_BYTES // (4 * self._vocab_size)
        if self.device.type == "cuda":
            most_logits = min(most_logits, max(free_memory(self.device) // 8, _LOGIT_BYTES) // (4 * self._vocab_size))
        batch: list[_Input] = []
        num_logits = 0
        for item in inputs:
            # The first is the longest; a shorter one needs logits from as far back as its continuation begins.
            length = len((batch or [item])[0].tokens)
            needed = max(num_logits, length - len(item.tokens) + item.num_logits) if self._keeps_logits else length
            rows = len(batch) + 1
            if batch and (rows * length > most_tokens or rows * needed > most_logits):
                yield batch
                batch, needed = [], item.num_logits if self._keeps_logits else len(item.tokens)
            batch.append(item)
            num_logits = needed
        if batch:
            yield batch

    def _logits(self, batch: list[_Input]) -> Iterator[Tensor]:
        """Logits [num_logits, V] at the last positions of each input."""
        length = len(batch[0].tokens)
        # Padded on the right, where causal attention never looks.
        ids_BT = torch.zeros(len(batch), length, dtype=torch.long)
        for row, item in enumerate(batch):
            ids_BT[row, : len(item.tokens)] = torch.tensor(item.tokens)
        keep = max(length - len(item.tokens) + item.num_logits for item in batch)
        options = {"logits_to_keep": keep} if self._keeps_logits else {}
        logits_BKV = self.model(input_ids=ids_BT.to(self.device), use_cache=False, **options).logits[:, -keep:]
        for logits_KV, item in zip(logits_BKV, batch, strict=True):
            end = keep - (length - len(item.tokens))
            yield logits_KV[end - item.num_logits : end]


def _shortened(text: str) -> str:
    """The beginning of a text, as a message can hold it."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …")


def _scored(logits_TV: Tensor, continuation: list[int]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each token, fp32 [T], and whether it is the likeliest, bool [T]."""
    targets_T = torch.tensor(continuation, device=logits_TV.device)
    nll_T = torch.nn.functional.cross_entropy(logits_TV.float(), targets_T, reduction="none")
    return nll_T, logits_TV.argmax(-1) == targets_T
