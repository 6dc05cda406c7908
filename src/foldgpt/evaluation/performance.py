"""How fast models run, measured side by side so that the machine's moods cancel."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foldgpt.errors import UsageError
from foldgpt.families import decode, num_positions
from foldgpt.formats import dtype_name
from foldgpt.progress import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Rate:
    """Tokens per second over the repeats.

    Attributes:
        median, minimum, maximum: tokens per second.
        ratio: median over repeats of this model's rate divided by the first model's in the same repeat
            (above 1: faster). Pairs are neighbours in time, so slow drifts of the machine cancel.
    """

    median: float
    minimum: float
    maximum: float
    ratio: float


@dataclass(frozen=True)
class Speed:
    """Speed of one model.

    Attributes:
        prefill: tokens of the prompt per second, all in one forward pass.
        decode: new tokens per second, one at a time on the KV cache. The tokens are given, not chosen, so
            that every model does the same work.
        protocol: prompt_tokens, decode_tokens, batch_size, repeats, seed, device, dtype, num_threads.
    """

    prefill: Rate
    decode: Rate
    protocol: dict[str, Any]


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    *,
    prompt_tokens: int = 128,
    decode_tokens: int = 32,
    repeats: int = 5,
    batch_size: int = 1,
    seed: int = 0,
) -> dict[str, Speed]:
    """Measure prefill and decode speed of models that take turns (A B A B …) after one warm-up each.

    Args:
        models: name → model; the first is what ratios refer to.
        prompt_tokens: length of the random prompt; less where a model has fewer positions, see `tokens_that_fit`.
        decode_tokens: number of steps on the KV cache after the prompt; likewise.
        repeats: timed turns per model.
        batch_size: sequences at once; rates count the tokens of all.
        seed: of the random tokens.

    Returns:
        name → speed, in the order given.

    Raises:
        UsageError: a number below 1, no model, or one without positions for a prompt and a step.
    """
    numbers = {
        "prompt_tokens": prompt_tokens,
        "decode_tokens": decode_tokens,
        "repeats": repeats,
        "batch_size": batch_size,
    }
    for name, number in numbers.items():
        if number < 1:
            raise UsageError(f"{name} is {number}; it must be at least 1.")
    if not models:
        raise UsageError("no model to measure the speed of.")
    prompt_tokens, decode_tokens = tokens_that_fit(models, prompt_tokens, decode_tokens)
    ids_BT = random_tokens(models, batch_size, prompt_tokens + decode_tokens, seed)

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with bar("Speed", (repeats + 1) * len(models)) as progress:
        for repeat in range(repeats + 1):
            for name, model in models.items():
                seconds = prefill_and_decode(model, ids_BT, prompt_tokens)
                if repeat > 0:  # the first turn warms up caches and allocators
                    times[name].append(seconds)
                progress.advance()

    first = next(iter(times.values()))
    return {
        name: Speed(
            prefill=_rate(batch_size * prompt_tokens, [t[0] for t in times[name]], [t[0] for t in first]),
            decode=_rate(batch_size * decode_tokens, [t[1] for t in times[name]], [t[1] for t in first]),
            protocol=numbers
            | {
                "prompt_tokens": prompt_tokens,
                "decode_tokens": decode_tokens,
                "seed": seed,
                "device": model.device.type,
                "dtype": dtype_name(model.dtype),
                "num_threads": torch.get_num_threads(),
            },
        )
        for name, model in models.items()
    }


def tokens_that_fit(models: Mapping[str, PreTrainedModel], prompt_tokens: int, decode_tokens: int) -> tuple[int, int]:
    """Both numbers, shortened, the prompt first, where one of the models has fewer positions.

    Raises:
        UsageError: a model has no positions for a prompt of one token and one decode step.
    """
    for name, model in models.items():
        positions = num_positions(model.config)
        if positions is None:
            continue
        if positions < 2:
            raise UsageError(
                f"{name} has {positions} position(s), and a prompt and one decode step take 2: leave out speed and "
                "peak memory (--no-speed, --no-memory; in a recipe evaluate.speed: false, evaluate.memory: false)."
            )
        decode_tokens = min(decode_tokens, positions - 1)
        prompt_tokens = min(prompt_tokens, positions - decode_tokens)
    return prompt_tokens, decode_tokens


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def random_tokens(models: Mapping[str, PreTrainedModel], batch_size: int, num_tokens: int, seed: int) -> Tensor:
    """The same random ids [batch_size, num_tokens] for all models, inside every vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = min(_text_config(model).vocab_size for model in models.values())
    return torch.randint(vocab_size, (batch_size, num_tokens), generator=generator)


@torch.inference_mode()
def prefill_and_decode(model: PreTrainedModel, ids_BT: Tensor, prompt_tokens: int) -> tuple[float, float]:
    """Seconds of one prefill and of all decode steps after it."""
    ids_BT = ids_BT.to(model.device)
    # As `generate` does: only the last position's logits are needed, and the head is much of a small model.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    was_training = model.training
    model.eval()
    try:
        _synchronize(model.device)
        start = time.perf_counter()
        _, cache = decode(model, ids_BT[:, :prompt_tokens], **last_only)
        _synchronize(model.device)
        prefilled = time.perf_counter()
        for position in range(prompt_tokens, ids_BT.shape[1]):
            _, cache = decode(model, ids_BT[:, position : position + 1], cache)
        _synchronize(model.device)
        return prefilled - start, time.perf_counter() - prefilled
    finally:
        model.train(was_training)


def _synchronize(device: torch.device) -> None:
    """Wait for the device: accelerators return before the work is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _rate(num_tokens: int, seconds: Sequence[float], first_seconds: Sequence[float]) -> Rate:
    rates = [num_tokens / second for second in seconds]
    ratios = [first / own for first, own in zip(first_seconds, seconds, strict=True)]
    return Rate(statistics.median(rates), min(rates), max(rates), statistics.median(ratios))
