"""Where text comes from: what a text spec means, and its documents, read as they are asked for."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import pyarrow.parquet

from foldgpt.artifacts import from_home, hash_of, hash_of_file
from foldgpt.corpus.own_text import SELF, OwnText, Sampling
from foldgpt.demo import demo_text, demo_text_identity
from foldgpt.errors import FoldGPTError, SourceError, UsageError, did_you_mean, first_line
from foldgpt.formats import NOT_FILES

_DEFAULT_COLUMN = "text"
#: The column that data sets of chats have in its place, by the custom of the field.
_CHAT_COLUMN = "messages"
_HUB_OPTIONS = ("config", "split", "column", "revision")

#: A text file is one document, but it is read in pieces of about this many characters, cut after a line or a word.
_PIECE_CHARACTERS = 1 << 20

#: How much is shown of what was hardly meant as a path.
_SHOWN_CHARACTERS = 60

#: Files up to this many bytes are told apart by their contents, larger ones by size and time.
_HASHED_BYTES = 256 << 20


@dataclass(frozen=True)
class Chat:
    """A document that is a conversation: a tokenizer's template makes text of it, and says so where it is needed."""

    messages: Sequence[Mapping[str, Any]]
    """`{"role": …, "content": …}`, one after another."""
    place: str
    """Where it is from, for messages."""

    def __iter__(self) -> Iterator[str]:
        raise UsageError(
            f"{self.place}: this is a chat. Chats are trained on (recover); to calibrate or to measure on, give text"
        )


#: A document in pieces, so that a long file need not be in memory at once.
Document = Iterable[str] | Chat


@dataclass(frozen=True)
class Text:
    """One text spec, understood: what to call it, how its documents join, and how to read them."""

    name: str
    """For messages and protocols; without folders, so that it is the same on every machine."""
    join: str
    read: Callable[[random.Random | None], Iterator[Document]]
    identity: Callable[[], Any]
    """What changes when the text does, as plain values."""
    endless: bool = False
    """The documents never end, and are in random order as they come."""

    def documents(self, order: random.Random | None = None) -> Iterator[Document]:
        """The documents, in order, or with the files in a random order."""
        return self.read(order)


def read_documents(specs: Sequence[str], *, own: OwnText | None = None) -> Iterator[str]:
    """The documents of some texts, in order, read as they are asked for.

    Args:
        specs: each `demo:NAME`; a path or glob of .txt, .raw, .jsonl or .parquet files (with `#COLUMN` after
            it for another column than "text"); `hub:NAME?config=…&split=…&column=…&revision=…`; or
            `self:?seed=…&temperature=…&top_p=…&length=…`, documents without end that the model writes.
        own: the model's own text, which `self:` stands for.

    Yields:
        One string per document. A .txt or .raw file is one document, unchanged.

    Raises:
        SourceError: nothing matches, or a file cannot be read; the message names the file and line.
        UsageError: the spec itself is wrong, or a document is a chat.
    """
    for text in open_texts(specs, own):
        for document in text.documents():
            yield "".join(document)


def open_texts(specs: Sequence[str], own: OwnText | None = None) -> list[Text]:
    """What some text specs mean; nothing is read yet.

    Args:
        specs: texts, as in `read_documents`.
        own: the model's own text, where a model is at hand.

    Raises:
        SourceError: nothing matches.
        UsageError: no spec, or one that is wrong.
    """
    if isinstance(specs, str | os.PathLike):
        raise UsageError(f"texts are a list, and {specs!r} is one text: give [{specs!r}]")
    if not specs:
        raise UsageError("no text was given")
    return [_open_text(os.fspath(spec), own) for spec in specs]


def identity_of(specs: Sequence[str], *, own: OwnText | None = None) -> str:
    """What tells some texts from others, also where a file of the same name holds something else now.

    Files of up to 256 MiB count with their contents, larger ones with size and time of the last change. A hub data
    set counts with its name and options alone.

    Args:
        specs: texts, as in `read_documents`.
        own: the model's own text.

    Returns:
        SHA-256 in hex.

    Raises:
        SourceError: nothing matches, or a file cannot be read.
        UsageError: a spec is wrong.
    """
    return hash_of([text.identity() for text in open_texts(specs, own)])


def _open_text(spec: str, own: OwnText | None) -> Text:
    if spec.startswith("demo:"):
        name = spec.removeprefix("demo:")
        return Text(
            spec,
            "\n\n",
            lambda order: ((text,) for text in demo_text(name)),
            lambda: [spec, demo_text_identity(name)],
        )
    if spec.startswith("hub:"):
        return _hub_text(spec)
    if spec.startswith(SELF):
        return _own_text(spec, own)
    return _local_text(spec)


def in_seeded_order(
    text: Text, order: random.Random, read_ahead: int, *, weight: Callable[[Document], int] | None = None
) -> Iterator[Document]:
    """Documents through a shuffle buffer: mixed well for small texts, bounded memory for large ones.

    What is in random order already comes as it is, since reading it ahead may be dear.

    Args:
        text: the text; local files are shuffled as well.
        order: where the order comes from.
        read_ahead: each document is drawn from so many.
        weight: of a document, above 0: with twice of it one is twice as likely to be drawn; by default all are alike.
    """
    buffer: list[tuple[Document, int]] = []
    if text.endless:
        yield from text.documents()
    for document in text.documents(order):
        buffer.append((document, weight(document) if weight else 1))
        if len(buffer) == read_ahead:
            yield _take_any(buffer, order, weighed=weight is not None)
    while buffer:
        yield _take_any(buffer, order, weighed=weight is not None)


def _take_any(buffer: list[tuple[Document, int]], order: random.Random, *, weighed: bool) -> Document:
    if weighed:
        index = order.choices(range(len(buffer)), weights=[weight for _, weight in buffer])[0]
    else:
        index = order.randrange(len(buffer))
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()[0]


def reused_texts(tested: Sequence[str], uses: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Which texts a model is measured on that it was made by as well.

    Args:
        tested: text specs.
        uses: use, such as "calibration" → text specs.

    Returns:
        Tested spec → the uses in which the same text, or one of its files, occurs; those without any are left out.
    """
    found = {
        text: [use for use, specs in uses.items() if any(_overlap(text, spec) for spec in specs)] for text in tested
    }
    return {text: names for text, names in found.items() if names}


def check_none_twice(specs: Sequence[str]) -> None:
    """Refuse texts of which two have documents in common: one that is held out would be trained on.

    Columns of one file are texts of their own.

    Raises:
        UsageError: two have.
    """
    for index, spec in enumerate(specs):
        for earlier in specs[:index]:
            if _column_of(spec) == _column_of(earlier) and _overlap(spec, earlier):
                same = "is given twice" if spec == earlier else f"and {earlier} have a text in common"
                raise UsageError(
                    f"{spec} {same}: a document that is held out, to judge by, would be trained on. Give each text once"
                )


def _column_of(spec: str) -> str:
    """The column that a spec names, or what stands for none."""
    if spec.startswith("hub:"):
        return dict(parse_qsl(spec.partition("?")[2])).get("column", _DEFAULT_COLUMN)
    if spec.startswith(NOT_FILES):
        return _DEFAULT_COLUMN
    try:
        _, files, column = _local_files(spec)
    except FoldGPTError:
        return _DEFAULT_COLUMN
    # What has no columns is the same text under any, and chats are read where there is no text.
    return _DEFAULT_COLUMN if _are_plain(files) or column == _CHAT_COLUMN else column


def _overlap(spec: str, other: str) -> bool:
    """Whether two text specs are of the same text, or have a file in common."""
    if spec == other:
        return True
    for kind, are_one in (("hub:", _are_of_the_same_rows), (SELF, _are_the_same_samples)):
        if spec.startswith(kind) and other.startswith(kind):
            return are_one(spec, other)
    if any(each.startswith(NOT_FILES) for each in (spec, other)):
        return False
    try:
        files, others = ({file.resolve() for file in _local_files(each)[1]} for each in (spec, other))
    except FoldGPTError:
        # Not on this machine (any more), so it is none of the files that are.
        return False
    return bool(files & others)


def _local_text(spec: str) -> Text:
    path, files, column = _local_files(spec)

    def read(order: random.Random | None) -> Iterator[Document]:
        for file in order.sample(files, len(files)) if order else files:
            try:
                yield from _READERS[file.suffix](file, column)
            except OSError as error:
                raise SourceError(f"cannot read {file}: {error.strerror or error}") from error

    name = path.name if path.is_file() else f"{path.name} ({len(files)} files)"
    name += "" if column == _DEFAULT_COLUMN else f"#{column}"
    return Text(
        name,
        "" if _are_plain(files) else "\n\n",
        read,
        lambda: [name, [[file.name, _file_identity(file)] for file in files]],
    )


def _local_files(spec: str) -> tuple[Path, list[Path], str]:
    """Path or pattern of a spec, the files that it means, and the column to read of them."""
    try:
        return _files_of(spec)
    except OSError as error:  # a name that is too long
        start = spec if len(spec) <= _SHOWN_CHARACTERS else f"{spec[:_SHOWN_CHARACTERS]}…"
        raise SourceError(f"no text file matches {start}: {error.strerror or error}") from error


def _files_of(spec: str) -> tuple[Path, list[Path], str]:
    pattern, column = spec, _DEFAULT_COLUMN
    before, _, after = spec.rpartition("#")
    # Folders may have a # in their names, and columns a slash.
    if before and ("/" not in after or Path(before).suffix in _READERS) and not from_home(spec).exists():
        pattern, column = before, after
    try:
        path = Path(pattern).expanduser()
    except RuntimeError as error:  # ~NAME of a user who does not exist
        raise SourceError(f"cannot read {pattern}: {error}") from error
    if path.is_dir():
        raise SourceError(f"{pattern} is a folder. Give a file or a pattern in it, e.g. '{pattern}/*.jsonl'.")
    files = [path] if path.is_file() else _matches(path)
    files = [file for file in files if file.is_file()]
    if not files:
        near = did_you_mean(path.name, _readable_files(path.parent)) if path.parent.is_dir() else ""
        raise SourceError(f"no text file matches {pattern}.{near}")
    for file in files:
        try:
            file.name.encode()  # records are JSON, which could not hold it
        except UnicodeEncodeError as error:
            raise SourceError(
                f"cannot read {file.name!a} in {file.parent}: its name is not UTF-8. Give it another one."
            ) from error
        if file.suffix not in _READERS:
            raise SourceError(f"cannot read {file}: known kinds of text are {', '.join(_READERS)}")
    return path, files, column


def _are_plain(files: Sequence[Path]) -> bool:
    """Whether they are text and nothing else: without columns, and one document each."""
    return all(_READERS[file.suffix] is _read_plain for file in files)


def _file_identity(file: Path) -> str:
    try:
        status = file.stat()
        return hash_of_file(file) if status.st_size <= _HASHED_BYTES else f"{status.st_size} {status.st_mtime_ns}"
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror or error}") from error


def _matches(pattern: Path) -> list[Path]:
    """Files that match a glob, sorted; a relative pattern starts at the working folder."""
    root = Path(pattern.anchor)
    try:
        return sorted(root.glob(str(pattern.relative_to(root))))
    except ValueError as error:  # before Python 3.13, ** beside other characters
        raise SourceError(f"no text file matches {pattern}: {error}. '**/*' matches at any depth.") from error


def _readable_files(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.suffix in _READERS]


@dataclass(frozen=True)
class _TextFile:
    """A plain text file as one document; each iteration reads it again, piece by piece."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        try:
            rest, position, is_last = "", 0, False
            while not is_last:
                # Opened for each piece: many files can be begun at a time. newline="": what is measured is the file's
                # text, whatever the system's line ends.
                with self.path.open(encoding="utf-8", newline="") as file:
                    file.seek(position)
                    piece = file.read(_PIECE_CHARACTERS)
                    position = file.tell()
                is_last = len(piece) < _PIECE_CHARACTERS
                # Behind a line; where there is none, in front of a blank, which tokenizers take with the word.
                end = len(piece) if is_last else piece.rfind("\n") + 1 or max(piece.rfind(" "), 0)
                if not is_last or rest or piece:
                    yield rest + piece[:end]
                rest = piece[end:]
        except UnicodeDecodeError as error:
            raise SourceError(f"{self.path} is not UTF-8 text: {error.reason}") from error
        except OSError as error:
            raise SourceError(f"cannot read {self.path}: {error.strerror or error}") from error


def _read_plain(path: Path, column: str) -> Iterator[Document]:
    if column != _DEFAULT_COLUMN:
        raise UsageError(f"{path.name} has no columns, so there is no column {column!r}")
    yield _TextFile(path)


def _read_jsonl(path: Path, column: str) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path} line {number}"
            yield _document_of(json_row(line, place), column, place)


def json_row(line: bytes, place: str) -> dict[str, Any]:
    """The JSON object in one line of a file.

    Raises:
        SourceError: it is something else.
    """
    try:
        row = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise SourceError(f"{place}: not valid JSON: {error}") from error
    except RecursionError as error:
        raise SourceError(f"{place}: nested too deep to be read") from error
    if not isinstance(row, dict):
        raise SourceError(f"{place}: a JSON object is needed, not {type(row).__name__}")
    return row


def _read_parquet(path: Path, column: str) -> Iterator[Document]:
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            column = _column_among(names, column)
            if column not in names:
                raise _no_column(column, names, str(path))
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _document_of({column: value}, column, f"{path} row {row}")
    except pyarrow.ArrowException as error:
        raise SourceError(f"cannot read {path}: {error}") from error
    except UnicodeDecodeError as error:  # of a batch of rows, so that which one of them is not known
        raise SourceError(f"{path} behind row {row}: not UTF-8 text: {error.reason}") from error


_READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": _read_plain,
    ".raw": _read_plain,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _hub_text(spec: str) -> Text:
    name, _, query = spec.removeprefix("hub:").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key in options:
        if key not in _HUB_OPTIONS:
            raise UsageError(f"unknown option {key!r} in {spec}.{did_you_mean(key, _HUB_OPTIONS)}")
    column = options.get("column", _DEFAULT_COLUMN)
    # A protocol has to say on which part of the data something was measured, also where nobody chose it.
    split = options.setdefault("split", "train")

    def read(order: random.Random | None) -> Iterator[Document]:
        import datasets  # slow to import, and most texts are not from the hub

        try:
            rows = datasets.load_dataset(
                name,
                options.get("config"),
                split=split,
                revision=options.get("revision"),
                streaming=True,
            )
            for number, row in enumerate(rows, 1):
                yield _document_of(row, column, f"{name} row {number}")
        except FoldGPTError:
            raise
        except Exception as error:  # the client passes on errors of many libraries
            raise SourceError(f"cannot read the hub data set {name}: {first_line(error)}") from error

    return Text(f"hub:{name}?{urlencode(options, safe='/:')}", "\n\n", read, lambda: spec)


def _are_of_the_same_rows(spec: str, other: str) -> bool:
    """Whether two specs mean rows of a hub data set in common; of two different parts of a split it is not known."""
    (name, options), (other_name, others) = _rows_of(spec), _rows_of(other)
    if (name, options.get("config")) != (other_name, others.get("config")):
        return False
    splits = [each["split"] for each in (options, others)]
    wholes = [split.partition("[")[0] for split in splits]
    return wholes[0] == wholes[1] and (splits[0] == splits[1] or any(split in wholes for split in splits))


def _rows_of(spec: str) -> tuple[str, dict[str, str]]:
    """Name and options of a hub data set; all its revisions are taken for one."""
    name, _, query = spec.removeprefix("hub:").partition("?")
    return name, {"split": "train", **dict(parse_qsl(query))}


def _are_the_same_samples(spec: str, other: str) -> bool:
    return Sampling.parse(spec) == Sampling.parse(other)


def absolute(spec: str) -> str:
    """A text spec that means the same from every folder of this machine: files by their whole paths."""
    if spec.startswith(NOT_FILES):
        return spec
    return str(from_home(spec).absolute())


def _own_text(spec: str, own: OwnText | None) -> Text:
    sampling = Sampling.parse(spec)
    if own is None:
        raise UsageError(
            f"{spec} is text that the model writes itself: to calibrate on and to train on, not to measure on"
        )

    def read(order: random.Random | None) -> Iterator[Document]:
        return ((document,) for document in own.documents(sampling))

    return Text(spec, "\n\n", read, lambda: [SELF, own.identity(sampling)], endless=True)


def _document_of(row: dict[str, Any], column: str, place: str) -> Document:
    column = _column_among(row, column)
    if column not in row:
        raise _no_column(column, row, place)
    found = row[column]
    if isinstance(found, str):
        check_is_unicode(found, place)
        return (found,)
    if isinstance(found, list) and all(isinstance(message, Mapping) for message in found):
        for message in found:
            for value in message.values():
                if isinstance(value, str):
                    check_is_unicode(value, place)
        return Chat(found, place)
    raise SourceError(f"{place}: column {column!r} holds {type(found).__name__}, not text")


def check_is_unicode(text: str, place: str) -> None:
    """Refuse half of a pair of surrogates, which JSON can write and no tokenizer takes.

    Raises:
        SourceError: there is one; the message names the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{place}: holds {text[error.start]!r}, half of a character, as text that was cut inside one has it"
        ) from error


def _column_among(names: Iterable[str], column: str) -> str:
    """The column to read: where none was named and there is none of text, that of chats."""
    found = set(names)
    return _CHAT_COLUMN if column == _DEFAULT_COLUMN not in found and _CHAT_COLUMN in found else column


def _no_column(column: str, columns: Iterable[str], place: str) -> SourceError:
    return SourceError(f"{place}: there is no column {column!r}.{did_you_mean(column, columns)}")
