"""One pass over the calibration windows that measures everything at once."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import LongTensor, Tensor, nn

import foldgpt
from foldgpt.analysis.moments import Moments
from foldgpt.analysis.result import Analysis, CalibrationIdentity, SourceIdentity, SublayerMeasures
from foldgpt.errors import FoldGPTError, UsageError
from foldgpt.families import Decoder, decoder_of, input_device
from foldgpt.fingerprints import weights_fingerprint
from foldgpt.formats import dtype_name
from foldgpt.progress import bar
from foldgpt.progress_file import ProgressFile

_CHECKPOINT_FORMAT = "foldgpt.analysis-checkpoint"
_CHECKPOINT_SECONDS = 30.0

# Boundary states kept at a time. An offloaded model reads its weights once per micro-batch, so it gets more.
_STATE_MEMORY = 256 * 2**20
_STATE_MEMORY_OFFLOADED = 1024 * 2**20
# On the CPU larger micro-batches are not faster, they only leave the cache.
_TOKENS_CPU = 512
# fp32 states measured at once. On the CPU they should stay in the cache, and be small enough that the allocator
# keeps their memory instead of returning it to the system and faulting it in again each time.
_CHUNK_BYTES_CPU = 5 * 2**19
_CHUNK_BYTES_DEVICE = 128 * 2**20


def analyze(
    model: nn.Module,
    windows_ids: LongTensor,
    *,
    attention_mask: Tensor | None = None,
    batch_size: int | None = None,
    checkpoint: str | Path | None = None,
    source: SourceIdentity | None = None,
    calibration: CalibrationIdentity | None = None,
) -> Analysis:
    """Measure how redundant each block is, in one sweep over calibration windows.

    The decoder runs once over the windows, without the head. Memory does not depend on the number of
    windows. The model may be offloaded (to the CPU or to disk, through accelerate): weights are then read
    once per micro-batch. Training mode, gradients and hooks of the model are left as they were.

    Args:
        model: a causal language model.
        windows_ids: token ids, int64 [num_windows, context].
        attention_mask: 1 for tokens, 0 for padding, [num_windows, context]; padding on the right only.
        batch_size: windows per micro-batch. By default about 512 tokens on the CPU, elsewhere as many as keep
            the stored states under 256 MiB (1 GiB when the model is offloaded); at least one window.
        checkpoint: a file for the partial sums, written about every 30 s. If it exists and belongs to the
            same request, the sweep goes on from there. It stays: whoever has saved the analysis drops it.
        source: which model this is; recorded in the result, and in what makes a checkpoint fit.
        calibration: which text this is; recorded in the result.

    Raises:
        UsageError: shapes that do not fit, token ids outside the vocabulary, padding on the left.
        UnsupportedModelError: the model is not a decoder whose blocks can be found.
        FoldGPTError: the model produces states that are not finite; the message names the block.
        ArtifactError: the checkpoint cannot be written.
    """
    decoder = decoder_of(model)
    lengths = _check_windows(decoder, windows_ids, attention_mask)
    num_windows, context = windows_ids.shape
    moments = Moments(len(decoder.blocks), _arrangement(decoder))
    batch_size = _batch_size(decoder, context) if batch_size is None else batch_size
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, must be at least 1.")
    progress = ProgressFile(
        checkpoint,
        _CHECKPOINT_FORMAT,
        lambda: _identity(decoder, windows_ids, lengths, source),
        seconds_between=_CHECKPOINT_SECONDS,
    )
    windows_done, seconds_before = _go_on_(progress, moments)
    started = time.perf_counter()

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_evaluation_mode(model))
        recorder = stack.enter_context(_recording(decoder))
        running = stack.enter_context(bar("Analysing", total=num_windows))
        running.advance(windows_done)
        body = decoder.body
        device = input_device(model)
        while windows_done < num_windows:
            batch = slice(windows_done, min(windows_done + batch_size, num_windows))
            ids, length = windows_ids[batch].to(device), lengths[batch]
            padded = int(length.min()) < context
            mask = (torch.arange(context) < length[:, None]).long() if padded else None
            body(input_ids=ids, attention_mask=None if mask is None else mask.to(device), use_cache=False)
            _measure_(moments, recorder.states(ids.numel()), length, mask)
            running.advance(batch.stop - batch.start)
            windows_done = batch.stop
            seconds = seconds_before + time.perf_counter() - started
            progress.save(functools.partial(_sums, moments, windows_done, seconds))

    return _result(
        decoder,
        moments,
        seconds_before + time.perf_counter() - started,
        source=source,
        calibration=calibration,
    )


def _check_windows(decoder: Decoder, windows_ids: LongTensor, attention_mask: Tensor | None) -> Tensor:
    """Validate the request; returns the number of tokens in each window, int64 [num_windows] on the CPU."""
    if windows_ids.ndim != 2 or 0 in windows_ids.shape:
        raise UsageError(f"windows must be token ids of shape [num_windows, context], got {list(windows_ids.shape)}.")
    vocabulary = decoder.config.vocab_size
    smallest, largest = int(windows_ids.min()), int(windows_ids.max())
    if smallest < 0 or largest >= vocabulary:
        wrong = smallest if smallest < 0 else largest
        raise UsageError(
            f"token id {wrong} in the windows, but the model's vocabulary has ids 0 to {vocabulary - 1}. "
            "Was the text tokenized for another model?"
        )
    num_windows, context = windows_ids.shape
    if attention_mask is None:
        return torch.full((num_windows,), context)
    if attention_mask.shape != windows_ids.shape:
        raise UsageError(
            f"attention_mask has shape {list(attention_mask.shape)}, the windows {list(windows_ids.shape)}."
        )
    mask = attention_mask.to("cpu").bool()
    lengths = mask.sum(1)
    if not torch.equal(mask, torch.arange(context) < lengths[:, None]):
        raise UsageError("attention_mask must be 1 on the left and 0 on the right of each window: pad on the right.")
    if int(lengths.min()) == 0:
        raise UsageError(f"window {int(lengths.argmin())} is padding only.")
    return lengths


def _arrangement(decoder: Decoder) -> str | None:
    if decoder.sublayers is None:
        return None
    return "parallel" if decoder.sublayers.between is None else "sequential"


def _num_slots(decoder: Decoder) -> int:
    """States stored per token: the N + 1 boundaries and, with known sublayers, one more per block."""
    num_blocks = len(decoder.blocks)
    return num_blocks + 1 if decoder.sublayers is None else 2 * num_blocks + 1


def _batch_size(decoder: Decoder, context: int) -> int:
    parameters = [p for p in decoder.model.parameters() if p.is_floating_point()]
    offloaded = any(parameter.is_meta for parameter in parameters)
    bytes_per_value = max(parameter.element_size() for parameter in parameters)
    bytes_per_token = _num_slots(decoder) * decoder.config.hidden_size * bytes_per_value
    tokens = (_STATE_MEMORY_OFFLOADED if offloaded else _STATE_MEMORY) // bytes_per_token
    if all(parameter.device.type == "cpu" for parameter in parameters):
        tokens = min(tokens, _TOKENS_CPU)
    return max(1, tokens // context)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Recorder:
    """Stored states of one micro-batch, [tokens, slots, hidden] in the dtype of what enters the first block.

    Copied when they pass, because some families update their tensors in place later; one buffer is used
    again for every micro-batch.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._buffer: Tensor | None = None

    def put(self, slot: int, state: Tensor) -> None:
        """Store one state, [batch, context, hidden] or [batch · context, hidden]."""
        state = state.reshape(-1, state.shape[-1])
        # With the first slot alone: a buffer that was made anew behind it would have lost what is in the others.
        if slot == 0 and (self._buffer is None or len(self._buffer) < len(state) or self._buffer.dtype != state.dtype):
            shape = (len(state), self._num_slots, state.shape[-1])
            self._buffer = torch.empty(shape, dtype=state.dtype, device=state.device)
        assert self._buffer is not None
        self._buffer[: len(state), slot].copy_(state)

    def states(self, num_tokens: int) -> Tensor:
        """What was stored for the `num_tokens` tokens that passed last."""
        assert self._buffer is not None
        return self._buffer[:num_tokens]


@contextmanager
def _recording(decoder: Decoder) -> Iterator[_Recorder]:
    """Record the residual stream wherever it passes a block boundary, or comes between two sublayers."""
    recorder = _Recorder(_num_slots(decoder))
    step = 1 if decoder.sublayers is None else 2
    handles = []

    def record_input(module: nn.Module, slot: int) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorder.put(slot, args[0] if args else kwargs["hidden_states"])

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def record_output(module: nn.Module, slot: int) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # A tuple in some families, the bare tensor in most: output[0] of that would be batch item 0.
            recorder.put(slot, output[0] if isinstance(output, tuple) else output)

        handles.append(module.register_forward_hook(hook))

    try:
        for index, block in enumerate(decoder.blocks):
            record_input(block, step * index)
            if decoder.sublayers is not None:
                if decoder.sublayers.between is not None:
                    record_input(block.get_submodule(decoder.sublayers.between), step * index + 1)
                else:
                    record_output(block.get_submodule(decoder.sublayers.attention[-1]), step * index + 1)
        record_output(decoder.blocks[-1], step * len(decoder.blocks))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def _measure_(moments: Moments, states: Tensor, lengths: Tensor, mask: Tensor | None) -> None:
    """Add one micro-batch.

    Args:
        moments: the sums to add to.
        states: [batch · context, slots, hidden].
        lengths: tokens of each window, [batch].
        mask: [batch, context], or None if no token is padding.
    """
    context = len(states) // len(lengths)
    kept = None if mask is None else mask.flatten().nonzero().squeeze(1).to(states.device)
    num_tokens = len(states) if kept is None else len(kept)
    chunk_bytes = _CHUNK_BYTES_CPU if states.device.type == "cpu" else _CHUNK_BYTES_DEVICE
    chunk_tokens = max(1, chunk_bytes // (states[0].numel() * torch.float32.itemsize))
    for start in range(0, num_tokens, chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        finite = moments.add_tokens(states[chunk if kept is None else kept[chunk]])
        if not finite.all():
            raise _not_finite(int(finite.logical_not().nonzero()[0]))
    last = torch.arange(len(lengths)) * context + lengths - 1
    for some in last.to(states.device).split(chunk_tokens):
        moments.add_last_tokens(states[some])


def _not_finite(boundary: int) -> FoldGPTError:
    where = f"block {boundary - 1} puts out" if boundary else "the embedding puts out"
    return FoldGPTError(
        f"{where} hidden states that are not finite (inf or NaN). "
        "The weights may be damaged, or overflow in this dtype: try --dtype float32 or bfloat16."
    )


def _identity(
    decoder: Decoder, windows_ids: LongTensor, lengths: Tensor, source: SourceIdentity | None
) -> dict[str, Any]:
    """All that decides what a sweep finds."""
    windows = hashlib.sha256(windows_ids.to("cpu").contiguous().numpy().tobytes())
    windows.update(lengths.numpy().tobytes())
    if source is None:
        # Of an offloaded model values are known only of what is in memory, which may be another part the next time.
        known: Any = weights_fingerprint(decoder.model)
    else:
        # The same model may be named otherwise the next time, by another path or from another folder.
        known = source.fingerprint or source.model_dump(mode="json")
    return {
        "foldgpt": foldgpt.__version__,
        "source": known,
        "config": str(decoder.config.to_json_string()),
        "dtype": str(next(decoder.model.parameters()).dtype),
        "windows": windows.hexdigest(),
        "shape": list(windows_ids.shape),
    }


def _sums(moments: Moments, windows_done: int, seconds: float) -> dict[str, Any]:
    """What a sweep has so far, for `_go_on_`."""
    return {"windows_done": windows_done, "seconds": seconds, "moments": moments.to_json_dict()}


def _go_on_(progress: ProgressFile, moments: Moments) -> tuple[int, float]:
    """Load the sums of an interrupted sweep if there are some that fit.

    Returns:
        The number of windows already in `moments`, and the seconds they took.
    """
    found = progress.load()
    try:
        windows_done, seconds = int(found["windows_done"]), float(found["seconds"])
        moments.load_json_dict_(found["moments"])
    except (KeyError, TypeError, ValueError):
        return 0, 0.0  # none, or damaged
    return windows_done, seconds


def _result(
    decoder: Decoder,
    moments: Moments,
    seconds: float,
    *,
    source: SourceIdentity | None,
    calibration: CalibrationIdentity | None,
) -> Analysis:
    means = moments.means()
    sublayers: dict[str, SublayerMeasures] = {}
    if moments.sublayers is not None:
        sublayers = {
            name: SublayerMeasures(
                bi=_rounded(means[f"{name}_distance"]),
                relative_update=_rounded(means[f"{name}_relative_update"]),
            )
            for name in ("attention", "mlp")
        }
    return Analysis(
        model_type=decoder.model_type,
        dtype=dtype_name(next(decoder.model.parameters()).dtype),
        num_blocks=moments.num_blocks,
        num_windows=moments.num_windows,
        num_tokens=moments.num_tokens,
        source=source,
        calibration=calibration,
        seconds=round(seconds, 3),
        bi=_rounded(means["distance"].diagonal(1)),
        relative_update=_rounded(means["relative_update"]),
        cosine=[_rounded(row) for row in 1 - means["distance"]],
        angular=_spans(means["angle"]),
        angular_last_token=_spans(means["angle_last_token"]),
        attention=sublayers.get("attention"),
        mlp=sublayers.get("mlp"),
    )


def _spans(angle: Tensor) -> list[list[float]]:
    """Row n − 1: the distances from each h_i to h_{i+n}."""
    return [_rounded(angle.diagonal(n)) for n in range(1, len(angle))]


def _rounded(values: Tensor) -> list[float]:
    """Eight significant digits: more than the measure carries, and half the size as JSON."""
    return [float(f"{value:.8g}") for value in values.tolist()]
