"""Text and chats to training windows, through files on disk: neither they nor their tokens need fit in memory."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from foldgpt.artifacts import alone, hash_of, is_whole, read_json, remove_leftovers, staged_file, write_json
from foldgpt.corpus import OwnText, identity_of
from foldgpt.corpus.texts import Chat, Document, check_none_twice, in_seeded_order, open_texts
from foldgpt.corpus.windows import prefix_of
from foldgpt.errors import ArtifactError, SourceError, UsageError
from foldgpt.progress import bar
from foldgpt.recovery.chat import chat_tokens
from foldgpt.recovery.windows import TrainingWindows

#: Upper case, accents, digits, spaces: what tokenizers treat differently.
_PROBE = "The Straße cost 12,345.60 €;\n\tdon't — ﬁne  naïve 中文 x_1."

#: Suffix of the file that says of each token, window by window, whether it is scored and whether it begins a document.
_MARKS = ".marks"
#: Rows of tokens with their marks, int32 [3, N].
_ID, _SCORED, _BEGINS = range(3)
_Tokens = NDArray[np.int32]

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

    The held-out windows are filled first. Windows come from the texts in turn, so that each gives as many tokens as the
    others; one that ends leaves its turns to them. The documents of a text, each drawn from 1,024 that were read ahead,
    are tokenised, followed by EOS, and packed. Where the tokenizer puts BOS before a text, every document and every
    window begins with it. Chats are rendered by the tokenizer's template, and only what the assistant says is scored;
    see `chat_tokens`. Ids and marks lie in files, which a later call with the same inputs finds again; a file whose
    contents changed is another input, while a data set on the hub is known by its name and options: give its commit as
    `revision` where it may change. Texts are read only as far as needed.

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
        UsageError: a number that makes no sense, two texts have documents in common, a chat cannot be rendered or its
            replies not be told, or no token of the windows is a reply.
        ArtifactError: the file cannot be written.
    """
    numbers = {"context": context, "num_tokens": num_tokens, "num_held_out": num_held_out, "seed": seed}
    for name, number in numbers.items():
        if not isinstance(number, Integral) or isinstance(number, bool):
            raise UsageError(f"{name} must be a whole number, not {number!r}")
    context, num_tokens, num_held_out, seed = map(int, numbers.values())
    counts = (num_held_out // context, num_tokens // context)
    if context < 2 or min(counts) < 1:
        raise UsageError(
            f"{num_tokens:,} tokens to train on and {num_held_out:,} held out do not fill a window of {context:,} each"
        )
    contents = identity_of(specs, own=own)  # refuses what is no list of texts
    specs = [os.fspath(spec) for spec in specs]
    check_none_twice(specs)
    protocol = {
        "texts": specs,
        "contents": contents,
        "tokenizer": _identity_of(tokenizer),
        "context": context,
        "windows": list(counts),
        "seed": seed,
        "bos": bool(prefix_of(tokenizer)),
        # Tokenizers of one vocabulary may end documents differently.
        "ids": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "template": tokenizer.chat_template,
    }
    path = Path(folder) / f"{hash_of(protocol)[:32]}.ids"
    shape = (sum(counts), context)

    def is_there() -> bool:
        num_ids = math.prod(shape)
        return is_whole(path, 4 * num_ids) and is_whole(path.with_suffix(_MARKS), 2 * num_ids)

    if not is_there():
        try:
            # Processes that train together all ask for it.
            with alone(path):
                if not is_there():
                    for left in (path, path.with_suffix(_MARKS)):
                        remove_leftovers(left)
                    _write(specs, own, tokenizer, path, counts, context, seed, protocol)
        except OSError as error:
            raise ArtifactError(f"cannot write {path}: {error.strerror or error}. Nothing was left behind.") from error
        finally:
            with suppress(OSError):  # it holds something
                path.parent.rmdir()
    written = read_json(path.with_suffix(".json"), "protocol of the windows")
    if written != {**protocol, "is_masked": written.get("is_masked")}:
        raise ArtifactError(f"{path} does not hold what its name says; remove it")
    ids_WT = _mapped(path, np.int32, shape)
    scored_WT, begins_WT = _mapped(path.with_suffix(_MARKS), np.uint8, (shape[0], 2, context)).unbind(1)
    held_out, train = (
        TrainingWindows(
            ids_WT[rows],
            scored_WT[rows] if written["is_masked"] else None,
            begins_WT[rows] if separate_documents else None,
        )
        for rows in (slice(counts[0]), slice(counts[0], None))
    )
    return train, held_out


def _mapped(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> Tensor:
    # mode "c": torch wants writable memory, and nothing is ever written back.
    mapped: Tensor = torch.from_numpy(np.memmap(path, dtype=dtype, mode="c", shape=shape))
    return mapped


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
    counts: tuple[int, int],
    context: int,
    seed: int,
    protocol: dict[str, Any],
) -> None:
    num_windows = sum(counts)
    prefix, written, is_masked = prefix_of(tokenizer), 0, False
    # Of held-out windows and of those that are trained on.
    is_scored = [False, False]
    with staged_file(path) as file:
        with staged_file(path.with_suffix(_MARKS)) as marks, bar("reading text", num_windows) as progress:
            order = random.Random(seed)
            texts = [in_seeded_order(text, order, _READ_AHEAD) for text in open_texts(specs, own)]
            windows = [_rows_of(_tokens_of(text, tokenizer, prefix), context, prefix) for text in texts]
            for window_3T in itertools.islice(_by_turns(windows), num_windows):
                file.write(window_3T[_ID].tobytes())
                marks.write(window_3T[_ID + 1 :].astype(np.uint8).tobytes())
                is_masked |= not window_3T[_SCORED].all()
                is_scored[written >= counts[0]] |= bool(window_3T[_SCORED, 1:].any())
                written += 1
                progress.advance()
            if written < num_windows:
                raise SourceError(
                    f"{', '.join(specs)}: too short: {written * context:,} tokens in full windows of {context:,}, and "
                    f"{num_windows * context:,} are asked for"
                )
            for name, any_is in zip(("held-out", "training"), is_scored, strict=True):
                if not any_is:
                    raise UsageError(f"{', '.join(specs)}: in the {name} windows the assistant says nothing")
        # Whoever finds the windows is to find what they are, also if this process is killed in between.
        write_json(path.with_suffix(".json"), {**protocol, "is_masked": is_masked})


def _rows_of(pieces: Iterator[_Tokens], context: int, prefix: list[int]) -> Iterator[_Tokens]:
    """Full windows of a stream of tokens; those that do not begin with the prefix get it in front."""
    tokens_3N, before = _tokens([]), _tokens(prefix)
    for piece_3N in pieces:
        tokens_3N = np.concatenate([tokens_3N, piece_3N], axis=1)
        start = 0
        while True:
            missing = before[:, :0] if tokens_3N[_ID, start : start + len(prefix)].tolist() == prefix else before
            end = start + context - missing.shape[1]
            if end > tokens_3N.shape[1]:
                break
            yield np.concatenate([missing, tokens_3N[:, start:end]], axis=1)
            start = end
        tokens_3N = tokens_3N[:, start:]


def _tokens_of(
    documents: Iterator[Document], tokenizer: PreTrainedTokenizerBase, prefix: list[int]
) -> Iterator[_Tokens]:
    """Tokens of the documents, piece by piece, the prefix before each, EOS behind a text."""
    for document in documents:
        if isinstance(document, Chat):
            ids, is_said = chat_tokens(document.messages, tokenizer, document.place)
            # Most templates write BOS themselves.
            before = [] if ids[: len(prefix)] == prefix else prefix
            yield _tokens(before + ids, [False] * len(before) + is_said, begins=True)
            continue
        begins = True
        for piece in itertools.chain([None], document):
            ids = prefix if piece is None else tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            yield _tokens(ids, begins=begins)
            begins = begins and not ids
        if tokenizer.eos_token_id is not None:
            yield _tokens([int(tokenizer.eos_token_id)], begins=begins)


def _tokens(ids: Sequence[int], scored: Sequence[bool] | bool = True, *, begins: bool = False) -> _Tokens:
    """Token ids with their marks, [3, N]: what is scored, and whether the first of them begins a document."""
    tokens_3N = np.zeros((3, len(ids)), dtype=np.int32)
    tokens_3N[_ID], tokens_3N[_SCORED], tokens_3N[_BEGINS, :1] = ids, scored, begins
    return tokens_3N


def _by_turns(texts: Sequence[Iterator[_Tokens]]) -> Iterator[_Tokens]:
    """Windows of the texts in turn; a text that ends leaves its turns to the others."""
    left = list(texts)
    while left:
        for text in list(left):
            window_3T = next(text, None)
            if window_3T is None:
                left.remove(text)
            else:
                yield window_3T
