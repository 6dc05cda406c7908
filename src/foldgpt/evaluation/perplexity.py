"""Perplexity over fixed windows of text, with the protocol that makes the number comparable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from foldgpt.errors import UsageError
from foldgpt.evaluation.errors import MeasurementError
from foldgpt.families import input_device, num_positions
from foldgpt.formats import dtype_name
from foldgpt.progress import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from foldgpt.corpus import Windows

#: What the logits of one batch may take, in bytes. A single window may take more: it cannot be split.
_LOGIT_BYTES = 256 * 2**20
#: Enough rows to keep the matrix products busy; more only costs memory.
_BATCH_TOKENS = 4096
#: An accelerator takes so many times as much of both before it is busy.
_ON_ACCELERATORS = 4
#: What the fp32 copy of a chunk of logits may take, in bytes.
_CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one model on one set of windows.

    Attributes:
        value: exp(mean_nll).
        mean_nll: mean negative log-likelihood of the scored tokens, in nats per token.
        standard_error: standard error of `mean_nll` over windows, in nats; None with a single window.
        num_tokens_scored: how many tokens were predicted.
        num_windows: how many windows they came from.
        dtype: what the model computed in, e.g. "bfloat16".
        fingerprint: of the windows; two perplexities compare only if it is the same.
        protocol: how text became windows (tokens, context, stride, BOS, join rule, split).
        window_nlls: summed negative log-likelihood of each window's scored tokens, in nats: two models on the same
            windows compare window by window. None in results of earlier versions.
        window_tokens: how many tokens of each window were scored; likewise.
    """

    value: float
    mean_nll: float
    standard_error: float | None
    num_tokens_scored: int
    num_windows: int
    dtype: str
    fingerprint: str
    protocol: dict[str, Any]
    window_nlls: list[float] | None = None
    window_tokens: list[int] | None = None


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: Windows, *, batch_size: int | Literal["auto"] = "auto") -> Perplexity:
    """Measure the perplexity of a causal language model.

    The log-likelihoods are taken in fp32 whatever the model computes in, and summed in fp64.

    Args:
        model: the model, on any device. Its training flag is as before when this returns.
        windows: token ids [num_windows, context]; each window is predicted on its own. Tokens from
            `score_from` of each window on are scored.
        batch_size: windows per forward pass; "auto" keeps the logits of a batch below 256 MiB, on an accelerator
            below 1 GiB.

    Raises:
        UsageError: windows longer than the model's positions, or with ids outside its vocabulary.
        MeasurementError: the model's output is not finite, or no token is scored.
    """
    config: Any = model.config.get_text_config(decoder=True)
    num_windows, context = windows.ids.shape
    _check_fits(windows.ids, config)
    first_targets = _first_targets(windows, context)
    if batch_size == "auto":
        logit_bytes = context * config.vocab_size * model.dtype.itemsize
        times = 1 if input_device(model).type == "cpu" else _ON_ACCELERATORS
        step = max(1, min(times * _LOGIT_BYTES // logit_bytes, times * _BATCH_TOKENS // context))
    elif batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it must be at least 1, or 'auto'.")
    else:
        step = batch_size

    nll_N = torch.empty(num_windows, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        with bar("Perplexity", num_windows) as progress:
            for start in range(0, num_windows, step):
                ids_BT = windows.ids[start : start + step].to(input_device(model))
                logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
                for row, (logits_TV, ids_T) in enumerate(zip(logits_BTV, ids_BT, strict=True)):
                    first = first_targets[start + row]
                    nll_N[start + row] = _nll(logits_TV[first - 1 : -1], ids_T[first:].to(logits_TV.device))
                progress.advance(len(ids_BT))
    finally:
        model.train(was_training)
    return _summary(nll_N, first_targets, context, model, windows)


def exp_of_mean(mean_nll: float, unit: str) -> float:
    """The perplexity to a mean negative log-likelihood in nats per unit.

    Raises:
        MeasurementError: it is larger than a float can be.
    """
    try:
        return math.exp(mean_nll)
    except OverflowError:
        raise MeasurementError(
            f"the mean negative log-likelihood is {mean_nll:.4g} nats per {unit}: its perplexity is too "
            "large for a float."
        ) from None


def _check_fits(ids: Tensor, config: Any) -> None:
    """Refuse windows that would make an embedding raise an index error, or mean nothing."""
    context = ids.shape[1]
    positions = num_positions(config)
    if positions is not None and context > positions:
        raise UsageError(f"the windows hold {context} tokens, but the model has {positions} positions.")
    if ids.numel() and int(ids.max()) >= config.vocab_size:
        raise UsageError(
            f"the windows hold token id {int(ids.max())}, but the model's vocabulary has {config.vocab_size} "
            "entries. Were they made with the tokenizer of another model?"
        )


def _first_targets(windows: Windows, context: int) -> list[int]:
    """Index of the first scored token in each window; `context` where a window scores none."""
    first_targets: list[int] = windows.score_from.clamp(max=context).tolist()
    if all(first == context for first in first_targets):
        raise MeasurementError(f"no token to score in {len(first_targets)} windows of {context} tokens.")
    return first_targets


def _nll(logits_TV: Tensor, targets_T: Tensor) -> float:
    """Sum of the negative log-likelihoods of `targets_T`, in nats: fp32 terms, fp64 sum.

    Rows are cast in chunks, so that no fp32 copy of all logits exists.
    """
    rows = max(1, _CHUNK_BYTES // (4 * logits_TV.shape[-1]))
    total = 0.0
    for logits_RV, targets_R in zip(logits_TV.split(rows), targets_T.split(rows), strict=True):
        terms_R = torch.nn.functional.cross_entropy(logits_RV.float(), targets_R, reduction="none")
        # Summed on the CPU: not every accelerator knows fp64.
        total += terms_R.cpu().double().sum().item()
    return total


def _summary(
    nll_N: Tensor, first_targets: Sequence[int], context: int, model: PreTrainedModel, windows: Windows
) -> Perplexity:
    dtype = dtype_name(model.dtype)
    finite_N = torch.isfinite(nll_N)
    if not finite_N.all():
        bad = (~finite_N).nonzero().flatten().tolist()
        advice = "" if dtype == "float32" else f" {dtype} may overflow here: try float32."
        raise MeasurementError(
            f"the model's log-likelihoods are not finite in {len(bad)} of {len(nll_N)} windows "
            f"(the first is window {bad[0]}); a perplexity would mean nothing.{advice}"
        )
    counts_N = torch.tensor([context - first for first in first_targets], dtype=torch.float64)
    num_windows, num_tokens = len(nll_N), int(counts_N.sum())
    mean_nll = nll_N.sum().item() / num_tokens
    standard_error = None
    if num_windows > 1:
        # Ratio estimator, since windows may score different numbers of tokens; with equal numbers it is the
        # standard error of the windows' means.
        residuals_N = nll_N - mean_nll * counts_N
        variance = num_windows / (num_windows - 1) * residuals_N.square().sum().item()
        standard_error = math.sqrt(variance) / num_tokens
    return Perplexity(
        value=exp_of_mean(mean_nll, "token"),
        mean_nll=mean_nll,
        standard_error=standard_error,
        num_tokens_scored=num_tokens,
        num_windows=num_windows,
        dtype=dtype,
        fingerprint=windows.fingerprint,
        protocol=dict(windows.protocol),
        window_nlls=nll_N.tolist(),
        window_tokens=[int(count) for count in counts_N.tolist()],
    )
