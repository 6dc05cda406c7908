"""GGUF files as ordinary dense models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

import gguf
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from foldgpt.artifacts import staged_folder
from foldgpt.errors import SourceError, first_line
from foldgpt.progress import note, quiet_libraries
from foldgpt.sources.configs import gguf_config
from foldgpt.sources.reading import as_source_errors
from foldgpt.sources.weights import check_complete

#: Another thread's reader must not be put in place of this one's, nor be left there.
_READING = RLock()


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
    with _read_once(path) as metadata:
        gguf_config(path)  # refuses what is no decoder before its weights are unpacked
        with quiet_libraries(), as_source_errors(path):
            model, report = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=dtype,
                # Without this, transformers keeps the weights packed wherever it has a kernel for them.
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
        tokenizer = _tokenizer(path, metadata)
    check_complete(report, path)
    # The weights are dense now; a trace of the quantiser would make the model refuse to be saved.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    return model.eval(), tokenizer


def convert_gguf(path: Path, folder: Path) -> None:
    """Dequantise a GGUF file to bf16 once, so that later loads read plain safetensors."""
    note(f"converting {path.name} to bf16 (once)")
    model, tokenizer = load_gguf(path, dtype=torch.bfloat16)
    with staged_folder(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file, cutting text as in training.

    Raises:
        SourceError: the file is corrupt, truncated or incomplete, or holds no tokenizer that can be read.
    """
    with _read_once(path) as metadata:
        return _tokenizer(path, metadata)


@contextmanager
def _read_once(path: Path) -> Iterator[dict[str, gguf.ReaderField]]:
    """The key-value fields of a GGUF file whose tensors are all there, which is parsed once meanwhile.

    transformers parses it for the config, again for the weights and twice for the tokenizer, each token of the
    vocabulary in Python: of 262k tokens that is most of the time.
    """
    with _READING:
        parse = gguf.GGUFReader
        try:
            reader = parse(path)
            end = max((int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors), default=0)
            if not end or end > path.stat().st_size:
                raise ValueError("it ends before its last tensor")
        except Exception as error:  # the reader fails as numpy does: index, value and memory errors
            raise SourceError(f"corrupt or truncated GGUF file {path}: {first_line(error)}") from error

        def read(file: Any, *args: Any, **options: Any) -> gguf.GGUFReader:
            return reader if Path(file) == path else parse(file, *args, **options)

        gguf.GGUFReader = read
        try:
            yield reader.fields
        finally:
            gguf.GGUFReader = parse


def _tokenizer(path: Path, metadata: dict[str, gguf.ReaderField]) -> PreTrainedTokenizerBase:
    with quiet_libraries(), as_source_errors(path):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    scheme = metadata.get("tokenizer.ggml.pre")
    if scheme is not None and scheme.contents() == "smollm":
        # The converter leaves out the first half of this scheme, without which runs of blanks before
        # a digit are cut in another place than in training.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer
