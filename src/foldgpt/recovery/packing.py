"""Text to training windows through a file on disk, so that neither the text nor its tokens need fit in memory."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from foldgpt.artifacts import alone, hash_of, read_json, staged_file, write_json
from foldgpt.corpus import OwnText, identity_of
from foldgpt.corpus.texts import Document, in_seeded_order, open_texts
from foldgpt.corpus.windows import prefix_of
from foldgpt.errors import ArtifactError, SourceError, UsageError
from foldgpt.progress import bar
from foldgpt.recovery.windows import TrainingWindows

#: Upper case, accents, digits, spaces: what tokenizers treat differently.
_PROBE = "The Straße cost 12,345.60 €;\n\tdon't — ﬁne  naïve 中文 x_1."

#: Documents read ahead, of which each next one is drawn.
_READ_AHEAD = 1024


def packed_windows(
    specs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    context: int,
    num_tokens: int,
    num_held_out: int,
    seed: int = 0,
    separate_documents: bool = False,
    own: OwnText | None = None,
) -> tuple[TrainingWindows, TrainingWindows]:
    """Windows to train on and, from other documents, windows to judge by.

    The held-out windows are filled first. Documents come from the texts in turn, each drawn from 1,024 that were read
    ahead, are tokenised, each followed by EOS, and packed. Where the tokenizer puts BOS before a text, every document
    and every window begins with it. The ids lie in one file, which a later call with the same inputs finds again; a
    text whose contents changed is another input. Texts are read only as far as needed.

    Args:
        specs: texts, as in `read_documents`.
        tokenizer: the model's tokenizer.
        folder: where the file is kept.
        context: tokens in a window.
        num_tokens: ids to train on; `num_tokens // context` windows are made.
        num_held_out: ids to judge by, likewise.
        seed: seed of the order.
        separate_documents: a token sees only its own document. Otherwise it sees all that stands before it in its
            window, EOS between documents, as in most pre-training.
        own: the model's own text, which `self:` stands for.

    Returns:
        Training and held-out windows, memory-mapped.

    Raises:
        SourceError: a text cannot be read, or the texts together are too short.
        UsageError: a number that makes no sense, or documents are to be kept apart without an EOS token.
        ArtifactError: the file cannot be written.
    """
    counts = (num_held_out // context, num_tokens // context)
    if context < 2 or min(counts) < 1:
        raise UsageError(
            f"{num_tokens:,} tokens to train on and {num_held_out:,} held out do not fill a window of {context:,} each"
        )
    end: Any = tokenizer.eos_token_id
    if separate_documents and end is None:
        raise UsageError("the tokenizer has no EOS token by which documents could be kept apart")
    protocol = {
        "texts": list(specs),
        "contents": identity_of(specs, own=own),
        "tokenizer": _identity_of(tokenizer),
        "context": context,
        "windows": list(counts),
        "seed": seed,
        "bos": bool(prefix_of(tokenizer)),
        # Tokenizers of one vocabulary may end documents differently.
        "ids": [tokenizer.bos_token_id, end],
    }
    path = Path(folder) / f"{hash_of(protocol)[:32]}.ids"
    shape = (sum(counts), context)
    if not path.is_file():
        try:
            # Processes that train together all ask for it.
            with alone(path):
                if not path.is_file():
                    _write(specs, own, tokenizer, path, shape, seed, protocol)
        except OSError as error:
            raise ArtifactError(f"cannot write {path}: {error.strerror or error}. Nothing was left behind.") from error
    elif read_json(path.with_suffix(".json"), "protocol of the windows") != protocol:
        raise ArtifactError(f"{path} does not hold what its name says; remove it")
    # mode "c": torch wants writable memory, and nothing is ever written back.
    ids_WT: Tensor = torch.from_numpy(np.memmap(path, dtype=np.int32, mode="c", shape=shape))
    document_end = end if separate_documents else None
    held_out = TrainingWindows(ids_WT[: counts[0]], document_end=document_end)
    return TrainingWindows(ids_WT[counts[0] :], document_end=document_end), held_out


def _identity_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells a tokenizer from others, also from those of the same vocabulary that split text otherwise."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hash_of([type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer(_PROBE)["input_ids"]])
    rules = json.loads(backend.to_str())
    # Left behind by its last call.
    return hash_of({name: value for name, value in rules.items() if name not in ("truncation", "padding")})


def _write(
    specs: Sequence[str],
    own: OwnText | None,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    shape: tuple[int, int],
    seed: int,
    protocol: dict[str, Any],
) -> None:
    num_windows, context = shape
    prefix, written = prefix_of(tokenizer), 0
    with staged_file(path) as file:
        with bar("reading text", num_windows) as progress:
            tokens = _tokens_of(_mixed(specs, own, random.Random(seed)), tokenizer, prefix)
            for window in itertools.islice(_rows_of(tokens, context, prefix), num_windows):
                file.write(np.asarray(window, dtype=np.int32).tobytes())
                written += 1
                progress.advance()
        if written < num_windows:
            raise SourceError(
                f"{', '.join(specs)}: too short: {written * context:,} tokens in full windows of {context:,}, and "
                f"{num_windows * context:,} are asked for"
            )
        # Whoever finds the windows is to find what they are, also if this process is killed in between.
        write_json(path.with_suffix(".json"), protocol)


def _rows_of(pieces: Iterator[list[int]], context: int, prefix: list[int]) -> Iterator[list[int]]:
    """Full windows of a stream of token ids; those that do not begin with the prefix get it in front."""
    tokens: list[int] = []
    for piece in pieces:
        tokens += piece
        start = 0
        while True:
            missing = [] if tokens[start : start + len(prefix)] == prefix else prefix
            end = start + context - len(missing)
            if end > len(tokens):
                break
            yield missing + tokens[start:end]
            start = end
        del tokens[:start]


def _tokens_of(
    documents: Iterator[Document], tokenizer: PreTrainedTokenizerBase, prefix: list[int]
) -> Iterator[list[int]]:
    """Token ids of the documents, piece by piece, the prefix before each, EOS behind it."""
    for document in documents:
        yield prefix
        for piece in document:
            yield tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            yield [int(tokenizer.eos_token_id)]


def _mixed(specs: Sequence[str], own: OwnText | None, order: random.Random) -> Iterator[Document]:
    """Documents of the texts in turn, in a seeded order; a text that ends leaves its turns to the others."""
    texts = [in_seeded_order(text, order, _READ_AHEAD) for text in open_texts(specs, own)]
    while texts:
        for text in list(texts):
            document = next(text, None)
            if document is None:
                texts.remove(text)
            else:
                yield document
