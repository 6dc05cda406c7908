"""Text to packed token ids: where text comes from, and how it becomes windows of equal length.

Two ways lead to windows. Calibration wants varied text and little of it: documents in a seeded order, read
only as far as needed. Perplexity wants one exact protocol: the whole text in order, nothing left to chance,
and a record of every choice that changes the number.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

import pyarrow.parquet
import torch
from transformers import PreTrainedTokenizerBase

from foldgpt.artifacts import hash_of
from foldgpt.demo import demo_text
from foldgpt.errors import FoldGPTError, SourceError, UsageError, did_you_mean

_DEFAULT_COLUMN = "text"
_HUB_OPTIONS = ("config", "split", "column", "revision")

#: A text file is one document, but it is read in pieces of about this many characters, cut after a line.
_PIECE_CHARACTERS = 1 << 20
#: Calibration draws each document from this many that were read ahead: enough to mix, little to hold.
_READ_AHEAD = 256
#: English text has about 4 characters a token; twice that is read before the tokens are counted.
_CHARACTERS_PER_TOKEN = 8
#: Tokens read beyond the last one needed, so that cutting the text there cannot change those before it.
_MARGIN_TOKENS = 64

#: A document in pieces, so that a long file need not be in memory at once.
_Document = Iterable[str]


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


def read_documents(specs: Sequence[str]) -> Iterator[str]:
    """The documents of some texts, in order, read as they are asked for.

    Args:
        specs: each `demo:NAME`; a path or glob of .txt, .raw, .jsonl or .parquet files (with `#COLUMN` after
            it for another column than "text"); or `hub:NAME?config=…&split=…&column=…&revision=…`.

    Yields:
        One string per document. A .txt or .raw file is one document, unchanged.

    Raises:
        SourceError: nothing matches, or a file cannot be read; the message names the file and line.
        UsageError: the spec itself is wrong.
    """
    for text in _open_texts(specs):
        for document in text.documents():
            yield "".join(document)


def calibration_windows(
    specs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    num_tokens: int,
    seed: int = 0,
    bos: bool | Literal["auto"] = "auto",
) -> Windows:
    """Windows of varied text to calibrate or train on.

    Documents come in a seeded order (each drawn from 256 that were read ahead; local files are shuffled as
    well), are tokenised without special tokens, each followed by EOS, and packed. Several texts give equal
    numbers of windows, to within one; the windows of all are then mixed.

    Args:
        specs: texts, as in `read_documents`.
        tokenizer: the model's tokenizer.
        context: tokens per window.
        num_tokens: ids in all; `num_tokens // context` windows are made.
        seed: seed of the order.
        bos: whether each window begins with BOS; "auto" does what the tokenizer itself does. A window with
            BOS holds `context - 1` tokens of text.

    Raises:
        SourceError: a text cannot be read, or is shorter than its share; the message says how long it is.
        UsageError: a spec or a number that makes no sense.
    """
    texts = _open_texts(specs)
    prefix = _prefix(tokenizer, bos)
    text_tokens = _text_tokens(context, prefix)
    num_windows = num_tokens // context
    if num_windows < len(texts):
        raise UsageError(
            f"{num_tokens:,} tokens do not fill one window of {context:,} for each of {len(texts)} text(s)"
        )
    order = random.Random(seed)
    rows: list[list[int]] = []
    num_documents = 0
    for index, text in enumerate(texts):
        share = num_windows // len(texts) + (index < num_windows % len(texts))
        tokens: list[int] = []
        for document in _in_seeded_order(text, order):
            num_documents += 1
            for piece in document:
                tokens += _encode(tokenizer, piece)
                if len(tokens) >= share * text_tokens:
                    break
            else:
                tokens += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            if len(tokens) >= share * text_tokens:
                break
        else:
            raise _too_short(text.name, len(tokens), share, text_tokens)
        rows += [prefix + tokens[row * text_tokens : (row + 1) * text_tokens] for row in range(share)]
    order.shuffle(rows)
    ids = torch.tensor(rows, dtype=torch.int64)
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
        stride: tokens of text from the start of one window to the next; by default windows do not overlap.
        max_windows: use the first so many windows only.
        bos: as in `calibration_windows`.

    Returns:
        The windows. `protocol` records: names of the texts, join rules, characters and tokens read, whether
        that is the whole text, context, stride, windows, BOS, tokens scored, vocabulary size of the tokenizer.

    Raises:
        SourceError: a text cannot be read, or is shorter than one window; the message says how long it is.
        UsageError: a spec or a number that makes no sense.
    """
    texts = _open_texts(specs)
    prefix = _prefix(tokenizer, bos)
    text_tokens = _text_tokens(context, prefix)
    stride = text_tokens if stride is None else stride
    if not 1 <= stride <= text_tokens:
        raise UsageError(f"stride must be between 1 and {text_tokens} (tokens of text in a window), not {stride}")
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


def _prefix(tokenizer: PreTrainedTokenizerBase, bos: bool | Literal["auto"]) -> list[int]:
    """What each window begins with: BOS or nothing."""
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


def _in_seeded_order(text: _Text, order: random.Random) -> Iterator[_Document]:
    """Documents through a shuffle buffer: mixed well for small texts, bounded memory for large ones."""
    buffer: list[_Document] = []
    for document in text.documents(order):
        buffer.append(document)
        if len(buffer) == _READ_AHEAD:
            yield _take_any(buffer, order)
    while buffer:
        yield _take_any(buffer, order)


def _take_any(buffer: list[_Document], order: random.Random) -> _Document:
    index = order.randrange(len(buffer))
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()


def _tokens_in_order(
    texts: Sequence[_Text], tokenizer: PreTrainedTokenizerBase, wanted: int | None
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


def _joined_pieces(texts: Sequence[_Text]) -> Iterator[str]:
    for number, text in enumerate(texts):
        for index, document in enumerate(text.documents()):
            if index or number:
                yield text.join if index else "\n\n"
            yield from document


# ---------------------------------------------------------------------------------------------- documents


@dataclass(frozen=True)
class _Text:
    """One text spec, understood: what to call it, how its documents join, and how to read them."""

    name: str
    """For messages and protocols; without folders, so that it is the same on every machine."""
    join: str
    read: Callable[[random.Random | None], Iterator[_Document]]

    def documents(self, order: random.Random | None = None) -> Iterator[_Document]:
        """The documents, in order, or with the files in a random order."""
        return self.read(order)


def _open_texts(specs: Sequence[str]) -> list[_Text]:
    if not specs:
        raise UsageError("no text was given")
    return [_open_text(spec) for spec in specs]


def _open_text(spec: str) -> _Text:
    if spec.startswith("demo:"):
        name = spec.removeprefix("demo:")
        return _Text(spec, "\n\n", lambda order: ((text,) for text in demo_text(name)))
    if spec.startswith("hub:"):
        return _hub_text(spec)
    return _local_text(spec)


def _local_text(spec: str) -> _Text:
    pattern, column = spec, _DEFAULT_COLUMN
    if "#" in spec and not Path(spec).exists():
        pattern, _, column = spec.rpartition("#")
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise SourceError(f"{pattern} is a folder. Give a file or a pattern in it, e.g. '{pattern}/*.jsonl'.")
    files = [path] if path.is_file() else _matches(path)
    files = [file for file in files if file.is_file()]
    if not files:
        near = did_you_mean(path.name, _readable_files(path.parent)) if path.parent.is_dir() else ""
        raise SourceError(f"no text file matches {pattern}.{near}")
    for file in files:
        if file.suffix not in _READERS:
            raise SourceError(f"cannot read {file}: known kinds of text are {', '.join(_READERS)}")

    def read(order: random.Random | None) -> Iterator[_Document]:
        for file in order.sample(files, len(files)) if order else files:
            try:
                yield from _READERS[file.suffix](file, column)
            except OSError as error:
                raise SourceError(f"cannot read {file}: {error.strerror or error}") from error

    name = path.name if path.is_file() else f"{path.name} ({len(files)} files)"
    name += "" if column == _DEFAULT_COLUMN else f"#{column}"
    plain = all(file.suffix in (".txt", ".raw") for file in files)
    return _Text(name, "" if plain else "\n\n", read)


def _matches(pattern: Path) -> list[Path]:
    """Files that match a glob, sorted; a relative pattern starts at the working folder."""
    root = Path(pattern.anchor)
    return sorted(root.glob(str(pattern.relative_to(root))))


def _readable_files(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.suffix in _READERS]


@dataclass(frozen=True)
class _TextFile:
    """A plain text file as one document; each iteration reads it again, piece by piece."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        try:
            # newline="": what is measured is the file's text, whatever the system's line ends.
            with self.path.open(encoding="utf-8", newline="") as file:
                while lines := file.readlines(_PIECE_CHARACTERS):
                    yield "".join(lines)
        except UnicodeDecodeError as error:
            raise SourceError(f"{self.path} is not UTF-8 text: {error.reason}") from error
        except OSError as error:
            raise SourceError(f"cannot read {self.path}: {error.strerror or error}") from error


def _read_plain(path: Path, column: str) -> Iterator[_Document]:
    if column != _DEFAULT_COLUMN:
        raise UsageError(f"{path.name} has no columns, so there is no column {column!r}")
    yield _TextFile(path)


def _read_jsonl(path: Path, column: str) -> Iterator[_Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise SourceError(f"{place}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise SourceError(f"{place}: a JSON object is needed, not {type(row).__name__}")
            yield (_text_of(row, column, place),)


def _read_parquet(path: Path, column: str) -> Iterator[_Document]:
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise _no_column(column, names, str(path))
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield (_text_of({column: value}, column, f"{path} row {row}"),)
    except pyarrow.ArrowException as error:
        raise SourceError(f"cannot read {path}: {error}") from error


_READERS: dict[str, Callable[[Path, str], Iterator[_Document]]] = {
    ".txt": _read_plain,
    ".raw": _read_plain,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _hub_text(spec: str) -> _Text:
    name, _, query = spec.removeprefix("hub:").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key in options:
        if key not in _HUB_OPTIONS:
            raise UsageError(f"unknown option {key!r} in {spec}.{did_you_mean(key, _HUB_OPTIONS)}")
    column = options.get("column", _DEFAULT_COLUMN)

    def read(order: random.Random | None) -> Iterator[_Document]:
        import datasets  # slow to import, and most texts are not from the hub

        try:
            rows = datasets.load_dataset(
                name,
                options.get("config"),
                split=options.get("split", "train"),
                revision=options.get("revision"),
                streaming=True,
            )
            for number, row in enumerate(rows, 1):
                yield (_text_of(row, column, f"{name} row {number}"),)
        except FoldGPTError:
            raise
        except Exception as error:  # the client passes on errors of many libraries
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SourceError(f"cannot read the hub data set {name}: {reason}") from error

    return _Text(spec, "\n\n", read)


def _text_of(row: dict[str, Any], column: str, place: str) -> str:
    if column not in row:
        raise _no_column(column, row, place)
    text = row[column]
    if not isinstance(text, str):
        raise SourceError(f"{place}: column {column!r} holds {type(text).__name__}, not text")
    return text


def _no_column(column: str, columns: Iterable[str], place: str) -> SourceError:
    return SourceError(f"{place}: there is no column {column!r}.{did_you_mean(column, columns)}")
