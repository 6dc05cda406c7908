"""Weights on disk: which files hold them, whether they are whole, and by what they are known again."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import torch

from foldgpt.artifacts import hash_of, hash_of_file
from foldgpt.errors import SourceError
from foldgpt.fingerprints import CONFIG_NOISE
from foldgpt.formats import dtype_name
from foldgpt.sources.configs import read_config

#: The weights of a checkpoint in one file, or the list of the files that hold them.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

#: Number formats by their names in safetensors files.
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

#: Bytes of one value in each safetensors dtype that a full-precision checkpoint holds.
_VALUE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

#: safetensors headers larger than this are refused by the format itself.
_LONGEST_HEADER = 100_000_000

#: What is loaded with a model and is neither its weights nor its config.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "chat_template.json",
    "generation_config.json",
)

#: Weights up to this many bytes are hashed whole; larger ones are sampled.
_HASHED_WHOLE_BYTES = 2 << 30

_SAMPLE_BYTES = 64 << 10

_SAMPLES_PER_FILE = 64


def model_fingerprint(place: Path) -> str:
    """Identity of a checkpoint that does not depend on where it lies or in which dtype it is loaded.

    It covers the config (without version stamps), code that the config names, and the weights. Weights of up to
    2 GiB are hashed whole (`full:…`); of larger ones (`sampled:…`) each file counts with its size, its header or first
    bytes, and 64 samples of 64 KiB spread evenly over it, so a change of a few values between samples can go unseen.

    Args:
        place: a Hugging Face folder or a GGUF file.

    Returns:
        `full:` or `sampled:`, and a SHA-256 in hex.
    """
    if place.is_file():
        files, config = [place], {}
    else:
        files = _weight_files(place)
        config = {k: v for k, v in read_config(place).items() if k not in CONFIG_NOISE}
        if "auto_map" in config:
            config["code"] = [[path.name, hash_of_file(path)] for path in sorted(place.glob("*.py"))]
    whole = sum(file.stat().st_size for file in files) <= _HASHED_WHOLE_BYTES
    contents = [hash_of_file(file) if whole else _hash_of_samples(file) for file in files]
    return f"{'full' if whole else 'sampled'}:{hash_of({'config': config, 'weights': contents})}"


def companions_fingerprint(place: Path) -> str:
    """Identity of what lies beside a checkpoint's weights: its tokenizer with its templates, and how it generates.

    Args:
        place: a Hugging Face folder or a GGUF file, which holds its own and counts with its weights.

    Returns:
        SHA-256 in hex.
    """
    files = (
        []
        if place.is_file()
        else sorted({path for pattern in _COMPANIONS for path in place.glob(pattern) if path.is_file()})
    )
    return hash_of([[path.relative_to(place).as_posix(), hash_of_file(path)] for path in files])


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


def weight_headers(place: Path) -> list[dict[str, Any]]:
    """The headers of a checkpoint's safetensors files; a `SourceError` where one is missing or cut off."""
    return [_safetensors_header(file) for file in _weight_files(place)]


def _weight_files(place: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name.

    Raises:
        SourceError: there is none, or the index names one that is missing.
    """
    index, single = place / INDEX, place / SINGLE
    if single.is_file():
        return [single]
    if not index.is_file():
        raise SourceError(f"{place} has no weights in safetensors (model.safetensors or its index)")
    names = shards_of(index)
    missing = [name for name in names if not (place / name).is_file()]
    if missing:
        raise SourceError(f"{place} is incomplete: {', '.join(missing)} named in {index.name} but not there")
    return [place / name for name in names]


def shards_of(index: Path) -> list[str]:
    """The files that an index names, sorted.

    Raises:
        SourceError: it is no index.
    """
    try:
        shard_of_tensor = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({str(Path(name)) for name in shard_of_tensor.values()})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
        raise SourceError(f"{index} is not a safetensors index: {error}") from error


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


def stored_dtype(place: Path) -> torch.dtype | None:
    """The number format in which a checkpoint is loaded as it is stored; None where nothing says it.

    Its config says it, or else its first tensor. A GGUF file is loaded in bfloat16, whatever is in it.

    Raises:
        SourceError: the config cannot be read.
    """
    if place.is_file():
        return torch.bfloat16
    values = read_config(place)
    text = values.get("text_config")
    inner: dict[str, Any] = text if isinstance(text, dict) else {}
    named = next((each[key] for each in (values, inner) for key in ("dtype", "torch_dtype") if each.get(key)), None)
    if named is None:
        tensors = (entry["dtype"] for header in weight_headers(place) for entry in header.values())
        return next((_STORED[name] for name in tensors if name in _STORED), None)
    found = getattr(torch, dtype_name(named), None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


def loaded_bytes(entry: dict[str, Any], dtype: torch.dtype | None) -> int:
    """Bytes that a tensor takes once it is loaded in a dtype, or as it is stored if that is None."""
    stored = _VALUE_BYTES.get(entry["dtype"], 1)
    first, last = entry["data_offsets"]
    return (last - first) // stored * (dtype.itemsize if dtype else stored)


def check_complete(report: dict[str, Any], place: Path) -> None:
    """Refuse a model that was loaded with weights missing, left over or of another shape."""
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
