"""How large a model is: parameters that exist, parameters that are stored, bytes, and its KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from foldgpt.errors import ArtifactError
from foldgpt.families import decode, decoder_of, input_device
from foldgpt.folding import private_modules
from foldgpt.modeling.modeling_foldgpt import Borrowed
from foldgpt.sources.weights import shards_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Shorter than any sliding window, so that every cached token is still there to be counted.
_PROBE_TOKENS = 2


@dataclass(frozen=True)
class ModelSize:
    """Size of a loaded model. Weights shared by several places are unique once and counted as stored at each.

    Attributes:
        num_blocks: number of decoder blocks (positions).
        unique_parameters: number of parameters, a shared one counted once.
        stored_parameters: number of parameters with a shared one counted at each of its places, tied or borrowed:
            what a model without sharing would store.
        block_parameters: unique parameters inside the blocks (without embeddings, final norm and head).
        unique_bytes: bytes of the unique parameters in the dtypes they have now.
        kv_bytes_per_token: bytes that the KV cache grows by for each token of one sequence, until a sliding
            window is full.
        num_sliding_blocks: how many blocks stop growing their cache at `sliding_window` tokens.
        sliding_window: that number of tokens; None without such blocks.
        private_parameters: scales and low-rank terms that positions have beside shared weights, counted above too.
        private_bytes: bytes of these.
    """

    num_blocks: int
    unique_parameters: int
    stored_parameters: int
    block_parameters: int
    unique_bytes: int
    kv_bytes_per_token: int
    num_sliding_blocks: int
    sliding_window: int | None
    private_parameters: int = 0
    private_bytes: int = 0


def size_of(model: PreTrainedModel) -> ModelSize:
    """Count the parameters of a model and measure its KV cache with a prompt of two tokens.

    The cache is measured, not derived from the config: families name and lay out their heads differently,
    and a block whose attention was removed has none.

    Raises:
        UnsupportedModelError: the model's blocks cannot be found.
    """
    blocks = decoder_of(model).blocks
    layers = _cache_layers(model)
    windows = {layer.sliding_window for layer in layers if layer.is_sliding}
    private = [parameter for terms in private_modules(model) for parameter in terms.parameters(recurse=False)]
    return ModelSize(
        num_blocks=len(blocks),
        unique_parameters=_count(model.parameters()),
        stored_parameters=_count(tensor for _, tensor in model.named_parameters(remove_duplicate=False))
        + _count(_borrowed(model)),
        block_parameters=_count(blocks.parameters()),
        private_parameters=_count(private),
        private_bytes=sum(tensor.numel() * tensor.element_size() for tensor in private),
        unique_bytes=sum(tensor.numel() * tensor.element_size() for tensor in model.parameters()),
        kv_bytes_per_token=sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) // _PROBE_TOKENS,
        num_sliding_blocks=sum(layer.is_sliding for layer in layers),
        sliding_window=max(windows, default=None),
    )


def _borrowed(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """The parameters of each borrowed leaf, once for each place that borrows it: as modules they are met once."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Borrowed):
                yield from value.owned.parameters()


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@torch.inference_mode()
def _cache_layers(model: PreTrainedModel) -> list[Any]:
    """The layers of the cache that hold something after one short prompt."""
    was_training = model.training
    model.eval()
    try:
        prompt = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device=input_device(model))
        _, cache = decode(model, prompt)
    finally:
        model.train(was_training)
    if cache is None:
        return []
    filled = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return [layer for layer in filled if layer.keys.numel()]  # a removed attention has keys of no width


def folder_bytes(path: str | Path) -> int:
    """Bytes on disk of a model's weight files.

    Args:
        path: a Hugging Face folder, or one weight file (GGUF). A folder that holds the same weights in
            several formats counts once, in the one that is loaded: safetensors, else PyTorch's, else GGUF.

    Raises:
        ArtifactError: there are no weight files, or one that the index names is missing.
        SourceError: the index is none.
    """
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    files = _weight_files(path)
    if not files:
        raise ArtifactError(f"no weight files (.safetensors, .bin or .gguf) in {path}.")
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        raise ArtifactError(f"{path} lacks the weight file {missing[0]}, which its index names.")
    return sum(file.stat().st_size for file in files)


def _weight_files(folder: Path) -> list[Path]:
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).is_file():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if index.is_file():
            return [folder / name for name in shards_of(index)]
    return next((files for kind in ("safetensors", "gguf") if (files := list(folder.glob(f"*.{kind}")))), [])
