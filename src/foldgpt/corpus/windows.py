"""Text to packed token ids: how documents become windows of equal length.

Two ways lead to windows. Calibration wants varied text and little of it: a segment of each document, in a seeded
order, read only as far as needed. Perplexity wants one exact protocol: the whole text in order, nothing left to chance,
and a record of every choice that changes the number.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from foldgpt.artifacts import hash_of
from foldgpt.corpus.own_text import OwnText
from foldgpt.corpus.segments import segments
from foldgpt.corpus.texts import Text, open_texts
from foldgpt.errors import SourceError, UsageError

#: Calibration draws each document from this many that were read ahead: enough to mix, little to hold.
_READ_AHEAD = 1024
#: English text has about 4 characters a token; twice that is read before the tokens are counted.
_CHARACTERS_PER_TOKEN = 8
#: Tokens read beyond the last one needed, so that cutting the text there cannot change those before it.
_MARGIN_TOKENS = 64


@dataclass(frozen=True)
class Windows:
    """Packed token ids, and how they were made."""

    ids: torch.Tensor
    """int64 [num_windows, context]."""
    score_from: torch.Tensor
    """int64 [num_windows]: the first position in each window whose *own* token is scored (from the logits one
    position before it). At least 1: a window's first token has nothing before it. Larger where windows overlap,
    so that each token is scored once, with the most context it gets."""
    protocol: dict[str, Any]
    """Every choice that changes a number measured on these windows; JSON-serialisable."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the ids and of which of them are scored; equal for equal measurements."""
        digest = hashlib.sha256(self.ids.contiguous().numpy().tobytes())
        essentials = {key: self.protocol[key] for key in ("context", "stride", "bos", "vocabulary_size")}
        digest.update(hash_of({**essentials, "score_from": self.score_from.tolist()}).encode())
        return digest.hexdigest()


def calibration_windows(
    specs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    num_tokens: int,
    seed: int = 0,
    bos: bool | Literal["auto"] = "auto",
    own: OwnText | None = None,
) -> Windows:
    """Windows of varied text to calibrate or train on.

    Documents come in a seeded order: each is drawn from 1,024 that were read ahead, longer ones sooner, and local files
    are shuffled as well. They are tokenised without special tokens, each followed by EOS, and give one segment each, no
    longer than a window and from a random place; only where all of a text have given one, each gives another. One that
    is as long as a window fills one, shorter ones are packed. Several texts give equal numbers of windows, to within
    one, in turns. So the first windows, or the last ones, are a sample like any other, of documents of their own.

    Args:
        specs: texts, as in `read_documents`.
        tokenizer: the model's tokenizer.
        context: tokens per window.
        num_tokens: ids in all; `num_tokens // context` windows are made.
        seed: seed of the order.
        bos: whether each window begins with BOS; "auto" does what the tokenizer itself does. A window with
            BOS holds `context - 1` tokens of text.
        own: the model's own text, which `self:` stands for.

    Raises:
        SourceError: a text cannot be read, or is shorter than its share; the message says how long it is.
        UsageError: a spec or a number that makes no sense.
    """
    texts = open_texts(specs, own)
    prefix = prefix_of(tokenizer, bos)
    text_tokens = _text_tokens(context, prefix)
    num_windows = num_tokens // context
    if num_windows < len(texts):
        raise UsageError(
            f"{num_tokens:,} tokens do not fill one window of {context:,} for each of {len(texts)} text(s)"
        )
    order = random.Random(seed)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encode = functools.partial(_encode, tokenizer)
    rows_of_texts: list[list[list[int]]] = []
    num_documents = 0

    for index, text in enumerate(texts):
        share = num_windows // len(texts) + (index < num_windows % len(texts))
        drawn = segments(text, encode, end, length=text_tokens, order=order, read_ahead=_READ_AHEAD)
        rows: list[list[int]] = []
        packed: list[int] = []
        begun = 0
        for number, segment in drawn:
            begun = max(begun, number + 1)
            if len(segment) == text_tokens:
                rows.append(prefix + segment.tolist())
            else:
                packed += segment
            if len(packed) >= text_tokens:
                rows.append(prefix + packed[:text_tokens])
                packed = packed[text_tokens:]
            if len(rows) == share:
                break
        else:
            raise _too_short(text.name, len(rows) * text_tokens + len(packed), share, text_tokens)
        rows_of_texts.append(rows)
        num_documents += begun
    turns = itertools.zip_longest(*rows_of_texts)
    ids = torch.tensor([row for turn in turns for row in turn if row is not None], dtype=torch.int64)
    protocol = {
        "texts": [text.name for text in texts],
        "documents_read": num_documents,
        "separator": tokenizer.eos_token,
        "seed": seed,
        "context": context,
        "stride": text_tokens,
        "windows": num_windows,
        "bos": bool(prefix),
        "vocabulary_size": len(tokenizer),
    }
    return Windows(ids, torch.ones(num_windows, dtype=torch.int64), protocol)


def evaluation_windows(
    specs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    stride: int | None = None,
    max_windows: int | None = None,
    bos: bool | Literal["auto"] = "auto",
) -> Windows:
    """Windows over a whole text in order, to measure perplexity on.

    Documents of a .txt or .raw text are joined with nothing, all others with a blank line, and so are several
    texts. The result is tokenised in one piece, without special tokens. Tokens after the last full window are
    not used. With `max_windows`, reading stops soon after the last window.

    Args:
        specs: texts, as in `read_documents`.
        tokenizer: the model's tokenizer.
        context: tokens per window, BOS included.
        stride: tokens of text from the start of one window to the next; by default, and if it is the context, windows
            do not overlap.
        max_windows: use the first so many windows only.
        bos: as in `calibration_windows`.

    Returns:
        The windows. `protocol` records: names of the texts, join rules, characters and tokens read, whether
        that is the whole text, context, stride, windows, BOS, tokens scored, vocabulary size of the tokenizer.

    Raises:
        SourceError: a text cannot be read, or is shorter than one window; the message says how long it is.
        UsageError: a spec or a number that makes no sense.
    """
    texts = open_texts(specs)
    prefix = prefix_of(tokenizer, bos)
    text_tokens = _text_tokens(context, prefix)
    # The context stands for all text of a window, of which BOS is none.
    stride = text_tokens if stride is None or stride == context else stride
    if not 1 <= stride <= text_tokens:
        raise UsageError(
            f"evaluate.stride must be between 1 and {text_tokens} (tokens of text in a window) or the context "
            f"({context}), not {stride}"
        )
    if max_windows is not None and max_windows < 1:
        raise UsageError(f"at least one window is needed, not {max_windows}")
    wanted = None if max_windows is None else (max_windows - 1) * stride + text_tokens
    tokens, characters, complete = _tokens_in_order(texts, tokenizer, wanted)
    if len(tokens) < text_tokens:
        raise _too_short(" + ".join(text.name for text in texts), len(tokens), 1, text_tokens)

    num_windows = min((len(tokens) - text_tokens) // stride + 1, max_windows or len(tokens))
    rows = [prefix + tokens[row * stride : row * stride + text_tokens] for row in range(num_windows)]
    ids = torch.tensor(rows, dtype=torch.int64)
    score_from = torch.full((num_windows,), max(1, context - stride), dtype=torch.int64)
    score_from[0] = 1
    protocol = {
        "texts": [text.name for text in texts],
        "join": [text.join for text in texts],
        "characters": characters,
        "tokens": len(tokens),
        "text_complete": complete,
        "context": context,
        "stride": stride,
        "windows": num_windows,
        "bos": bool(prefix),
        "tokens_scored": int((context - score_from).sum()),
        "vocabulary_size": len(tokenizer),
    }
    return Windows(ids, score_from, protocol)


# ------------------------------------------------------------------------------------------------- tokens


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a text longer than the model's context is the rule here, not worth a warning.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def prefix_of(tokenizer: PreTrainedTokenizerBase, bos: bool | Literal["auto"] = "auto") -> list[int]:
    """What each window begins with: BOS or nothing.

    Args:
        tokenizer: the model's.
        bos: True and False ask for it or not; "auto" does as the tokenizer does before a text.

    Raises:
        UsageError: BOS is asked for, and the tokenizer has none.
    """
    if bos is False:
        return []
    if tokenizer.bos_token_id is None:
        if bos is True:
            raise UsageError("the tokenizer has no BOS token to put before each window")
        return []
    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if bos is True or adds_bos else []


def _text_tokens(context: int, prefix: list[int]) -> int:
    if context - len(prefix) < 2:
        raise UsageError(f"a window of {context} tokens holds nothing to predict")
    return context - len(prefix)


def _too_short(name: str, num_tokens: int, num_windows: int, text_tokens: int) -> SourceError:
    return SourceError(
        f"{name} is too short: it has {num_tokens:,} tokens, and {num_windows:,} window(s) of "
        f"{text_tokens:,} tokens of text need {num_windows * text_tokens:,}"
    )


def _tokens_in_order(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, wanted: int | None
) -> tuple[list[int], int, bool]:
    """Tokens of the joined texts, or of a beginning with more than `wanted` tokens.

    Returns:
        The tokens, the number of characters they were made from, and whether that was the whole text.
    """
    pieces = _joined_pieces(texts)
    read: list[str] = []
    characters = 0
    enough = None if wanted is None else (wanted + _MARGIN_TOKENS) * _CHARACTERS_PER_TOKEN
    for piece in pieces:
        read.append(piece)
        characters += len(piece)
        if wanted is None or enough is None or characters < enough:
            continue
        tokens = _encode(tokenizer, "".join(read))
        if len(tokens) >= wanted + _MARGIN_TOKENS:
            return tokens, characters, next(pieces, None) is None
        enough = 2 * characters
    return _encode(tokenizer, "".join(read)), characters, True


def _joined_pieces(texts: Sequence[Text]) -> Iterator[str]:
    for number, text in enumerate(texts):
        for index, document in enumerate(text.documents()):
            if index or number:
                yield text.join if index else "\n\n"
            yield from document
