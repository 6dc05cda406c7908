"""Where models come from: a hub id, a local folder, a GGUF file, or a demo model.

Whatever the origin, a source is first resolved to files on this machine, the files are checked before any
weight is read, and what is loaded is complete: a weight that is missing, left over or of another shape is an
error, because a block with random weights looks like any other block.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import psutil
import torch
from huggingface_hub import snapshot_download
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from foldgpt.artifacts import hash_of, hash_of_file, staged_folder
from foldgpt.demo import demo_model
from foldgpt.errors import SourceError, UnsupportedModelError, UsageError, did_you_mean
from foldgpt.progress import note, quiet_libraries

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Bytes of one value in each safetensors dtype that a full-precision checkpoint holds.
_VALUE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
#: safetensors headers larger than this are refused by the format itself.
_LONGEST_HEADER = 100_000_000

#: Weights up to this many bytes are hashed whole; larger ones are sampled.
_HASHED_WHOLE_BYTES = 2 << 30
_SAMPLE_BYTES = 64 << 10
_SAMPLES_PER_FILE = 64

#: Accelerators that cannot compute in float64, in which fits are made and saved models are verified.
_WITHOUT_FP64 = ("mps",)

#: What of a config does not change what the model computes.
_CONFIG_NOISE = frozenset(("_name_or_path", "_model_name_or_path", "transformers_version", "dtype", "torch_dtype"))

#: Share of the free memory that a model may take before its blocks stay on disk.
_MEMORY_SHARE = 0.8

#: What is fetched of a hub model. The card names licence and languages; code is for those who trust it.
_HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "README.md", "*.py"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


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


def resolve(spec: str, *, revision: str | None = None) -> Path:
    """Find the files of a model on this machine, fetching them first where needed.

    Args:
        spec: a hub id, a local folder, a path that ends in `.gguf`, or `demo:NAME`.
        revision: branch, tag or commit of a hub id.

    Returns:
        A Hugging Face folder or a GGUF file; it is itself a valid spec.

    Raises:
        SourceError: there is no such model, or it cannot be fetched.
        UsageError: an unknown demo model, or a revision of something that has none.
    """
    if spec.startswith("demo:"):
        place = demo_model(spec.removeprefix("demo:"), _convert_gguf)
    else:
        place = Path(spec).expanduser()
        if not place.exists():
            if _looks_like_path(spec):
                raise SourceError(f"no model at {spec}.{_near_names(place)}")
            return _fetch(spec, revision)
    if revision is not None:
        raise UsageError(f"--revision is for hub models only; {spec} is on this machine")
    if place.is_file() and place.suffix != ".gguf":
        raise SourceError(f"{spec} is a file, but not a GGUF file. Give the folder that holds config.json.")
    if place.is_dir() and not (place / "config.json").is_file():
        ggufs = sorted(file.name for file in place.glob("*.gguf"))
        advice = f" It holds {ggufs[0]}: give that file." if ggufs else ""
        raise SourceError(f"{spec} is not a model folder: it has no config.json.{advice}")
    return place


def load_source(
    spec: str,
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
    torch_dtype = _dtype_of(dtype)
    torch_device = _device_of(device)
    place = resolve(spec, revision=revision)
    commit = place.name if _is_hub_snapshot(place) else None
    if place.is_file():
        model, tokenizer = load_gguf(place, dtype=torch_dtype or torch.bfloat16)
        return Source(model.to(torch_device), tokenizer, spec, commit, model_fingerprint(place))

    config = load_config(place, trust_remote_code=trust_remote_code)
    headers = _weight_headers(place)
    placement, offload_folder = _placement(headers, torch_dtype, torch_device, max_memory_gb)
    with quiet_libraries(), _as_source_errors(place):
        model, report = AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            dtype=torch_dtype or "auto",
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            **placement,
        )
    _check_complete(report, place)
    tokenizer = load_tokenizer(str(place), trust_remote_code=trust_remote_code)
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    return Source(model.eval(), tokenizer, spec, commit, model_fingerprint(place), offloaded, offload_folder)


def load_tokenizer(
    spec: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; see `load_source` for the arguments.

    Raises:
        SourceError: the model cannot be found or comes without a tokenizer that can be read.
    """
    place = resolve(spec, revision=revision)
    if place.is_file():
        return _gguf_tokenizer(place, _gguf_metadata(place))
    try:
        with quiet_libraries():
            return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # each tokenizer class fails in its own way
        raise SourceError(f"{place} has no tokenizer that can be read: {_first_line(error)}") from error


def save_tokenizer(source: Source, folder: str | Path) -> None:
    """Save the source's tokenizer, chat template included, beside a model in `folder`."""
    source.tokenizer.save_pretrained(folder)


def model_fingerprint(place: Path) -> str:
    """Identity of a checkpoint that does not depend on where it lies or in which dtype it is loaded.

    It covers the config (without version stamps) and the weights. Weights of up to 2 GiB are hashed whole
    (`full:…`); of larger ones (`sampled:…`) each file counts with its size, its header or first bytes, and
    64 samples of 64 KiB spread evenly over it, so a change of a few values between samples can go unseen.

    Args:
        place: a Hugging Face folder or a GGUF file.

    Returns:
        `full:` or `sampled:`, and a SHA-256 in hex.
    """
    if place.is_file():
        files, config = [place], {}
    else:
        files = _weight_files(place)
        config = {k: v for k, v in _read_config(place).items() if k not in _CONFIG_NOISE}
    whole = sum(file.stat().st_size for file in files) <= _HASHED_WHOLE_BYTES
    contents = [hash_of_file(file) if whole else _hash_of_samples(file) for file in files]
    return f"{'full' if whole else 'sampled'}:{hash_of({'config': config, 'weights': contents})}"


# ------------------------------------------------------------------------------------------------ finding


def _looks_like_path(spec: str) -> bool:
    """Whether a spec that is not there was meant as a path; `a/b` may be either, so its folder decides."""
    if spec.startswith((".", "/", "~")) or spec.endswith(".gguf") or not _HUB_ID.fullmatch(spec):
        return True
    return "/" in spec and Path(spec).parent.is_dir()


def _near_names(place: Path) -> str:
    """A suffix that names the nearest entry of the folder that was meant, or that folder's absence."""
    parent = place.parent
    if not parent.is_dir():
        return f" The folder {parent} does not exist."
    names = [entry.name for entry in parent.iterdir() if entry.is_dir() or entry.suffix == ".gguf"]
    near = difflib.get_close_matches(place.name, names, n=1)
    return f" Did you mean {str(parent / near[0])!r}?" if near else ""


def _is_hub_snapshot(place: Path) -> bool:
    return place.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", place.name) is not None


def _fetch(repository: str, revision: str | None) -> Path:
    """Bring a hub model into the hub's own cache, or find it there."""
    try:
        place = Path(snapshot_download(repository, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises errors of several libraries
        raise SourceError(_why_not_fetched(repository, revision, error)) from error
    if not (place / "config.json").is_file():
        raise SourceError(f"the hub repository {repository} has no config.json: it is not a model")
    return place


def _why_not_fetched(repository: str, revision: str | None, error: Exception) -> str:
    kind = type(error).__name__
    if kind in ("RepositoryNotFoundError", "HFValidationError"):
        return f"there is no folder {repository}, and no hub model of this name that may be read"
    if kind == "GatedRepoError":
        return f"the hub model {repository} is gated: accept its terms and log in with `hf auth login`"
    if kind == "RevisionNotFoundError":
        return f"the hub model {repository} has no revision {revision!r}"
    # A full disk, a proxy or the hub's own failure look alike from here; the first line says which.
    reason = next(iter(str(error).strip().splitlines()), kind).removeprefix("Got: ").rstrip(".")
    return (
        f"there is no folder {repository}, and no model of this name could be fetched from the hub: {reason}. "
        "Give a local folder, a GGUF file or a demo model (demo:smollm2-135m)."
    )


# ----------------------------------------------------------------------------------------------- checking


def _read_config(place: Path) -> dict[str, Any]:
    path = place / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise SourceError(f"{path} does not hold a JSON object")
    return values


def load_config(place: Path, *, trust_remote_code: bool = False) -> Any:
    """The config of a model in a Hugging Face folder, or in a GGUF file.

    Raises:
        SourceError: it cannot be read.
        UnsupportedModelError: the model is not a decoder-only language model, is quantised, or needs code that is
            not trusted.
    """
    if place.is_file():
        return _gguf_config(place)
    values = _read_config(place)
    if "quantization_config" in values:
        method = (values["quantization_config"] or {}).get("quant_method", "unknown method")
        raise UnsupportedModelError(f"{place} is quantised ({method}). Fold full-precision weights, quantise last.")
    try:
        with quiet_libraries():
            config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        if "auto_map" in values and not trust_remote_code:
            raise UnsupportedModelError(
                f"{place} needs code that comes with the checkpoint. Read it, then pass --trust-remote-code."
            ) from error
        raise SourceError(f"cannot read {place / 'config.json'}: {_first_line(error)}") from error
    _check_decoder_only(config, place)
    return config


def _gguf_config(path: Path) -> Any:
    with quiet_libraries(), _as_source_errors(path):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    _check_decoder_only(config, path)
    return config


def _check_decoder_only(config: Any, place: Path) -> None:
    """Refuse what does not predict the next token of a text: encoders, and models of two halves."""
    architectures = getattr(config, "architectures", None) or []
    # gpt_neox says is_decoder=False too, so that alone decides nothing.
    encoder = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", True)
    other_head = bool(architectures) and all(
        name.endswith(("ForMaskedLM", "ForPreTraining", "Classification", "QuestionAnswering", "MultipleChoice"))
        for name in architectures
    )
    own_class = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    known = own_class or type(config) in AutoModelForCausalLM._model_mapping
    if getattr(config, "is_encoder_decoder", False) or encoder or other_head or not known:
        what = ", ".join(architectures) or config.model_type
        raise UnsupportedModelError(f"{place} ({what}) is not a decoder-only language model")


def _weight_files(place: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name.

    Raises:
        SourceError: there is none, or the index names one that is missing.
    """
    index = place / "model.safetensors.index.json"
    single = place / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise SourceError(f"{place} has no weights in safetensors (model.safetensors or its index)")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
        raise SourceError(f"{index} is not a safetensors index: {error}") from error
    missing = [name for name in names if not (place / name).is_file()]
    if missing:
        raise SourceError(f"{place} is incomplete: {', '.join(missing)} named in {index.name} but not there")
    return [place / name for name in names]


def _weight_headers(place: Path) -> list[dict[str, Any]]:
    return [_safetensors_header(file) for file in _weight_files(place)]


def _safetensors_header(path: Path) -> dict[str, Any]:
    """Tensor name → {dtype, shape, data_offsets} of one file, with its length checked against them."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_LONGEST_HEADER, size - 8):
                raise ValueError("its header does not fit the file")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != size:
            raise ValueError(f"its header promises {end:,} bytes, the file has {size:,}")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise SourceError(f"corrupt safetensors file {path}: {error}") from error
    return header


def _check_complete(report: dict[str, Any], place: Path) -> None:
    problems = {
        "missing": report["missing_keys"],
        "of another shape": [key[0] for key in report["mismatched_keys"]],
        "not part of the model": report["unexpected_keys"],
    }
    for what, keys in problems.items():
        if keys:
            names = sorted(keys)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise SourceError(f"the weights in {place} do not fit its config: {what}: {', '.join(names[:3])}{more}")


# ------------------------------------------------------------------------------------------------ loading


def _dtype_of(name: str) -> torch.dtype | None:
    if name == "auto":
        return None
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}.{did_you_mean(name, [*DTYPES, 'auto'])}")
    return DTYPES[name]


def _device_of(name: str) -> torch.device:
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        if found is None or found.type in _WITHOUT_FP64:
            return torch.device("cpu")
        # Under torchrun and accelerate each process has a device of its own; all of them see the first.
        rank = os.environ.get("LOCAL_RANK")
        return found if rank is None else torch.device(found.type, int(rank) % torch.accelerator.device_count())
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {name!r} is not available here: {_first_line(error)}") from error
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
    needed = sum(_loaded_bytes(entry, dtype) for header in headers for entry in header.values())
    free_ram = psutil.virtual_memory().available * _MEMORY_SHARE
    free = torch.cuda.mem_get_info(device)[0] * _MEMORY_SHARE if device.type == "cuda" else free_ram
    allowed = free if max_memory_gb is None else max_memory_gb * 1e9
    if needed <= allowed:
        return {"device_map": {"": device}}, None
    folder = tempfile.TemporaryDirectory(prefix="foldgpt-offload-")
    on_gpu = device.type == "cuda"
    limits = {(device.index or 0) if on_gpu else "cpu": int(allowed)}
    if on_gpu:
        limits["cpu"] = int(free_ram)
    placement = {"device_map": "auto", "max_memory": limits, "offload_folder": folder.name}
    return placement, folder


def _loaded_bytes(entry: dict[str, Any], dtype: torch.dtype | None) -> int:
    stored = _VALUE_BYTES.get(entry["dtype"], 1)
    first, last = entry["data_offsets"]
    return (last - first) // stored * (dtype.itemsize if dtype else stored)


@contextmanager
def _as_source_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # from_pretrained passes on errors of half a dozen libraries
        raise SourceError(f"cannot load {place}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _hash_of_samples(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            (length,) = struct.unpack("<Q", file.read(8))
            digest.update(file.read(length))
        for sample in range(_SAMPLES_PER_FILE):
            file.seek(sample * max(0, size - _SAMPLE_BYTES) // (_SAMPLES_PER_FILE - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- GGUF


def load_gguf(path: Path, *, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file as an ordinary dense model that can be trained and saved.

    Args:
        path: the file.
        dtype: what the weights are dequantised to.

    Returns:
        The model in eval mode, and its tokenizer.

    Raises:
        SourceError: the file is corrupt, truncated or incomplete.
        UnsupportedModelError: it does not hold a decoder-only language model.
    """
    metadata = _gguf_metadata(path)
    _gguf_config(path)  # refuses what is no decoder before its weights are unpacked
    with quiet_libraries(), _as_source_errors(path):
        model, report = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=dtype,
            # Without this, transformers keeps the weights packed wherever it has a kernel for them.
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    _check_complete(report, path)
    # The weights are dense now; a trace of the quantiser would make the model refuse to be saved.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    return model.eval(), _gguf_tokenizer(path, metadata)


def _convert_gguf(path: Path, folder: Path) -> None:
    """Dequantise a GGUF file to bf16 once, so that later loads read plain safetensors."""
    note(f"converting {path.name} to bf16 (once)")
    model, tokenizer = load_gguf(path, dtype=torch.bfloat16)
    with staged_folder(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def _gguf_metadata(path: Path) -> dict[str, gguf.ReaderField]:
    """The key-value fields of a GGUF file whose tensors are all there."""
    try:
        reader = gguf.GGUFReader(path)
        end = max((int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors), default=0)
        if not end or end > path.stat().st_size:
            raise ValueError("it ends before its last tensor")
    except Exception as error:  # the reader fails as numpy does: index, value and memory errors
        raise SourceError(f"corrupt or truncated GGUF file {path}: {_first_line(error)}") from error
    return reader.fields


def _gguf_tokenizer(path: Path, metadata: dict[str, gguf.ReaderField]) -> PreTrainedTokenizerBase:
    with quiet_libraries(), _as_source_errors(path):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    scheme = metadata.get("tokenizer.ggml.pre")
    if scheme is not None and scheme.contents() == "smollm":
        # The converter leaves out the first half of this scheme, without which runs of blanks before
        # a digit are cut in another place than in training.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer
