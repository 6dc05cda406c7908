"""Whether a saved model is what was in memory: reloaded, run, and stepped with a KV cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from foldgpt.errors import VerificationError, first_line
from foldgpt.families import brings_own_code, decode, input_device
from foldgpt.free_memory import free_memory
from foldgpt.progress import quiet_libraries

#: Largest relative error (of centred logits, root mean square) taken for rounding, by dtype. Wrong positions,
#: stale indices or random weights are off by 0.1 and more.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
#: The same for a KV cache in 16 bits, for models too large to be compared in fp32: 0.075 was seen for rounding.
_UNSEEN_TOLERANCE = 0.2
_PROBE_TOKENS = 24
_PREFILL_TOKENS = 8


@dataclass(frozen=True)
class Verification:
    """What was checked of a saved checkpoint, with the figures seen.

    Attributes:
        model_class: name of the class it loads as.
        logits_identical: whether the reloaded model's logits equal the saved one's bit by bit.
        reload_error: relative error of the reloaded model's logits (0 when identical).
        cache_error: relative error of step-by-step decoding with a KV cache against none, in fp32 where that fits.
        num_parameters: unique parameters.
        weight_bytes: bytes of all stored tensors.
    """

    model_class: str
    logits_identical: bool
    reload_error: float
    cache_error: float
    num_parameters: int
    weight_bytes: int


@torch.no_grad()
def verify_checkpoint(folder: str | Path, model: nn.Module, *, expected_parameters: int | None = None) -> Verification:
    """Load a checkpoint and compare it with the model it was saved from.

    Args:
        folder: the checkpoint.
        model: the model in memory.
        expected_parameters: unique parameters it should have.

    Raises:
        VerificationError: keys missing or too many, another class, a model that cannot be run or whose logits are
            not finite, other logits, a KV cache that changes the result, or another size than its parameters say.
    """
    folder = Path(folder)
    parameter = next(model.parameters())
    reloaded = _reload(folder, model)
    was_training = model.training
    model.eval()
    probe = _probe(model)
    try:
        with _running("the model in memory"):
            before = _logits(model, probe)
        with _running("the saved model"):
            after = _logits(reloaded, probe)
    finally:
        model.train(was_training)
    if not before.isfinite().all():
        raise VerificationError(
            "the model to be saved puts out values that are not finite, in memory already. Its weights may be damaged, "
            "or too large for the number format that it computes in."
        )
    reload_error, dtype = _relative_error(after, before), parameter.dtype
    if reload_error and dtype in (torch.bfloat16, torch.float16) and _fits_in_fp32(model, copies=2):
        # In 16 bits much passes for rounding. What differs there for a reason must not differ in fp32.
        reload_error, dtype = _error_in_fp32(model, reloaded, probe, dtype), torch.float32
    tolerance = _TOLERANCE[dtype]
    if not reload_error <= tolerance:
        raise VerificationError(
            f"the saved model computes something else than the one in memory (relative error {reload_error:.2g}, "
            f"tolerance {tolerance:.0e}). A config field may depend on the block index in a way foldgpt does not know."
        )
    num_parameters = sum(p.numel() for p in reloaded.parameters())
    if expected_parameters is not None and num_parameters != expected_parameters:
        raise VerificationError(
            f"the plan foretold {expected_parameters:,} unique parameters; the saved model has {num_parameters:,}"
        )
    stored = sum(_tensor_bytes(file) for file in folder.glob("*.safetensors"))
    unique = sum(p.numel() * p.element_size() for p in reloaded.parameters())
    if abs(stored - unique) > 0.01 * unique:
        raise VerificationError(f"the checkpoint stores {stored:,} bytes for {unique:,} bytes of unique parameters")
    return Verification(
        model_class=type(reloaded).__name__,
        logits_identical=torch.equal(before, after),
        reload_error=reload_error,
        cache_error=_check_cache(reloaded, probe),
        num_parameters=num_parameters,
        weight_bytes=stored,
    )


def _reload(folder: Path, model: nn.Module) -> Any:
    """Load a checkpoint as anyone would, and refuse keys or a class other than the saved model's."""
    parameter = next(model.parameters())
    try:
        with quiet_libraries():
            reloaded, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=parameter.dtype, output_loading_info=True, trust_remote_code=brings_own_code(model)
            )
    except Exception as error:  # from_pretrained passes on errors of half a dozen libraries
        raise VerificationError(f"the saved model cannot be loaded: {first_line(error)}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            shown = ", ".join(sorted(str(key) for key in info[problem])[:5])
            raise VerificationError(f"the saved model has {problem.replace('_', ' ')} on loading: {shown}")
    # A class that comes with the checkpoint is made anew from each folder.
    is_same = type(reloaded) is type(model) or (
        brings_own_code(reloaded) and brings_own_code(model) and type(reloaded).__name__ == type(model).__name__
    )
    if not is_same:
        raise VerificationError(f"saved a {type(model).__name__}, but it loads as {type(reloaded).__name__}")
    return reloaded.to(input_device(model)).eval()


@contextmanager
def _running(what: str) -> Iterator[None]:
    """Say of a model whose own code fails that it cannot be run."""
    try:
        yield
    except Exception as error:  # of any architecture's code
        raise VerificationError(f"{what} cannot be run: {first_line(error)}") from error


def _check_cache(model: nn.Module, probe: torch.Tensor) -> float:
    """Compare decoding step by step with a KV cache against none; returns the relative error.

    In 16 bits the two differ by rounding alone, and by how much depends on the model, so the comparison is made in
    fp32, where the memory allows it.

    Args:
        model: the reloaded model; left in fp32.
        probe: token ids [2, 24].
    """
    dtype = next(model.parameters()).dtype
    tolerance = _TOLERANCE[dtype]
    if dtype in (torch.bfloat16, torch.float16):
        if _fits_in_fp32(model):
            model.float()
            tolerance = _TOLERANCE[torch.float32]
        else:
            tolerance = _UNSEEN_TOLERANCE
    with _running("the saved model, decoding with a KV cache,"):
        cached = _cached_logits(model, probe)
    error = _relative_error(cached, _logits(model, probe))
    if not error <= tolerance:
        raise VerificationError(
            f"decoding with a KV cache differs from decoding without (relative error {error:.2g}, "
            f"tolerance {tolerance:.0e})"
        )
    return error


def _error_in_fp32(model: nn.Module, reloaded: nn.Module, probe: torch.Tensor, dtype: torch.dtype) -> float:
    """The relative error of copies in fp32.

    Buffers that differ by what a conversion to 16 bits rounds are taken from the model in memory: `.to(bfloat16)`
    rounds rotary frequencies there, and loading makes them anew. What differs by more was made of another config.

    Args:
        model: the model in memory.
        reloaded: the one that was loaded.
        probe: token ids [2, 24].
        dtype: of their weights, 16 bits.
    """
    ours, theirs = copy.deepcopy(model).float().eval(), copy.deepcopy(reloaded).float().eval()
    buffers = dict(ours.named_buffers())
    rounding = torch.finfo(dtype)
    for name, buffer in theirs.named_buffers():
        own = buffers.get(name)
        if own is None or own.shape != buffer.shape or not buffer.is_floating_point():
            continue
        if torch.allclose(own, buffer, rtol=rounding.eps, atol=rounding.smallest_normal * rounding.eps):
            buffer.copy_(own)
    return _relative_error(_logits(theirs, probe), _logits(ours, probe))


def _fits_in_fp32(model: nn.Module, copies: int = 1) -> bool:
    return copies * sum(4 * p.numel() for p in model.parameters()) < free_memory(input_device(model)) / 2


def _probe(model: nn.Module) -> torch.Tensor:
    """Token ids [2, 24], random but always the same."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    shape = (2, _PROBE_TOKENS)
    ids = torch.randint(0, config.get_text_config().vocab_size, shape, generator=generator)
    return ids.to(input_device(model))


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def _cached_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a prefill and then one token at a time."""
    step_logits, cache = decode(model, ids[:, :_PREFILL_TOKENS])
    logits = [step_logits]
    for step in range(_PREFILL_TOKENS, ids.shape[1]):
        step_logits, cache = decode(model, ids[:, step : step + 1], cache)
        logits.append(step_logits)
    return torch.cat(logits, dim=1)


def _relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Root-mean-square difference over the spread of the reference's logits; infinite if not finite."""
    value, reference = value.double(), reference.double()
    spread = (reference - reference.mean(dim=-1, keepdim=True)).square().mean().sqrt()
    error = float((value - reference).square().mean().sqrt() / spread)
    return error if error == error else float("inf")


def _tensor_bytes(file: Path) -> int:
    """Bytes of the tensors in a safetensors file, without its header."""
    with safe_open(file, framework="pt") as tensors:
        keys = list(tensors.keys())
    with file.open("rb") as start:
        header = int.from_bytes(start.read(8), "little")
    return file.stat().st_size - 8 - header if keys else 0
