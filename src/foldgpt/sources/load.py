"""Loading a source, complete or not at all, on a device or as far as the memory allows."""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from foldgpt.errors import SourceError, UsageError, did_you_mean, first_line
from foldgpt.formats import dtype_name
from foldgpt.free_memory import free_memory
from foldgpt.progress import note, quiet_libraries
from foldgpt.sources.configs import load_config
from foldgpt.sources.gguf_files import gguf_tokenizer, load_gguf
from foldgpt.sources.locate import is_hub_snapshot, resolve
from foldgpt.sources.reading import as_source_errors
from foldgpt.sources.weights import check_complete, loaded_bytes, model_fingerprint, weight_headers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Devices by their names in torch; `cuda` is AMD's too.
_DEVICES = ("cpu", "cuda", "xpu", "mps", "npu", "hpu", "mlu", "musa")

#: Accelerators that cannot compute in float64, in which fits are made and saved models are verified.
_WITHOUT_FP64 = ("mps",)

#: Share of the free memory that a model may take before its blocks stay on disk.
_MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Source:
    """A model that is ready to be measured and folded, and what is known of its origin."""

    model: PreTrainedModel
    """The model, in eval mode."""
    tokenizer: PreTrainedTokenizerBase
    spec: str
    """What the user asked for."""
    revision: str | None
    """The hub commit; None for a model that is not from the hub."""
    fingerprint: str
    """Identity of the weights and the config; see `model_fingerprint`."""
    offloaded: bool = False
    """True when some blocks stay on disk, or beside the accelerator, and are brought each time they run."""
    _offload_folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False, compare=False)


def load_source(
    spec: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    max_memory_gb: float | None = None,
    trust_remote_code: bool = False,
) -> Source:
    """Load a decoder-only language model with its tokenizer, complete or not at all.

    A model that is larger than the memory allowed keeps what does not fit on disk, in the checkpoint itself
    where its tensors are stored as the model needs them, and reads it block by block.

    Args:
        spec: a hub id, a local folder, a path that ends in `.gguf`, or `demo:NAME`.
        dtype: a key of `DTYPES`, or "auto": what the checkpoint is stored in; bfloat16 for GGUF.
        device: a torch device, or "auto": the accelerator where there is one.
        revision: branch, tag or commit of a hub id.
        max_memory_gb: memory the weights may take, in units of 1e9 bytes; by default 80 % of what is free.
        trust_remote_code: run modelling code that comes with the checkpoint.

    Raises:
        SourceError: the model cannot be found, read, or is incomplete.
        UnsupportedModelError: it is not a decoder-only language model, or it is quantised.
        UsageError: an unknown dtype or device.
    """
    spec = str(spec)
    torch_dtype = _dtype_of(dtype)
    torch_device = device_of(device)
    place = resolve(spec, revision=revision)
    commit = place.name if is_hub_snapshot(place) else None
    if place.is_file():
        model, tokenizer = load_gguf(place, dtype=torch_dtype or torch.bfloat16)
        _say_if_slow(model.dtype, torch_device)
        return Source(model.to(torch_device), tokenizer, spec, commit, model_fingerprint(place))

    config = load_config(place, trust_remote_code=trust_remote_code)
    headers = weight_headers(place)
    placement, offload_folder = _placement(headers, torch_dtype, torch_device, max_memory_gb)
    with quiet_libraries(), as_source_errors(place):
        model, report = AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            dtype=torch_dtype or "auto",
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            **placement,
        )
    check_complete(report, place)
    _say_if_slow(model.dtype, torch_device)
    tokenizer = load_tokenizer(str(place), trust_remote_code=trust_remote_code)
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    return Source(model.eval(), tokenizer, spec, commit, model_fingerprint(place), offloaded, offload_folder)


def load_tokenizer(
    spec: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; see `load_source` for the arguments.

    Raises:
        SourceError: the model cannot be found or comes without a tokenizer that can be read.
    """
    place = resolve(spec, revision=revision)
    if place.is_file():
        return gguf_tokenizer(place)
    try:
        with quiet_libraries():
            return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # each tokenizer class fails in its own way
        raise SourceError(f"{place} has no tokenizer that can be read: {first_line(error)}") from error


def _dtype_of(name: str) -> torch.dtype | None:
    if name == "auto":
        return None
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}.{did_you_mean(name, [*DTYPES, 'auto'])}")
    return DTYPES[name]


def is_slow_in_16_bits() -> bool:
    """Whether this CPU is likely to compute more slowly in 16 bits than in 32, having no products of them."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


@functools.cache
def _say_if_slow(dtype: torch.dtype, device: torch.device) -> None:
    """Say it once where 16 bits cost time: most x86 CPUs without AVX-512 have no products of them."""
    if device.type == "cpu" and dtype.itemsize == 2 and is_slow_in_16_bits():
        note(
            f"this CPU is likely to be slow in {dtype_name(dtype)}: without AVX-512 that takes several "
            "times as long as float32 (--dtype float32, or dtype in a recipe; twice the memory)"
        )


def device_of(name: str) -> torch.device:
    """The device of that name; "auto" is the accelerator where there is one that foldgpt can use, else the CPU.

    Raises:
        UsageError: it is not there, or cannot be used.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        if found is None or found.type in _WITHOUT_FP64:
            return torch.device("cpu")
        # Under torchrun and accelerate each process has a device of its own; all of them see the first.
        rank = os.environ.get("LOCAL_RANK")
        return found if rank is None else torch.device(found.type, int(rank) % torch.accelerator.device_count())
    kind = name.partition(":")[0]
    if kind not in _DEVICES:
        near = " Did you mean 'cuda'?" if kind == "gpu" else did_you_mean(kind, ("auto", *_DEVICES))
        raise UsageError(f"unknown device {name!r}.{near}")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {name!r} is not available here: {first_line(error)}") from error
    if device.type in _WITHOUT_FP64:
        raise UsageError(f"device {name!r} has no float64, in which foldgpt fits and verifies; use cpu")
    return device


def _placement(
    headers: list[dict[str, Any]],
    dtype: torch.dtype | None,
    device: torch.device,
    max_memory_gb: float | None,
) -> tuple[dict[str, Any], tempfile.TemporaryDirectory[str] | None]:
    """Arguments that put the model on its device, or as much of it as the memory allows."""
    needed = sum(loaded_bytes(entry, dtype) for header in headers for entry in header.values())
    allowed = free_memory(device) * _MEMORY_SHARE if max_memory_gb is None else max_memory_gb * 1e9
    if needed <= allowed:
        return {"device_map": {"": device}}, None
    folder = tempfile.TemporaryDirectory(prefix="foldgpt-offload-")
    on_gpu = device.type == "cuda"
    limits = {(device.index or 0) if on_gpu else "cpu": int(allowed)}
    if on_gpu:
        limits["cpu"] = int(free_memory(torch.device("cpu")) * _MEMORY_SHARE)
    placement = {"device_map": "auto", "max_memory": limits, "offload_folder": folder.name}
    return placement, folder
