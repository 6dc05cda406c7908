"""Segments of documents: varied text is a little of many documents, not all of a few long ones."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice

from foldgpt.corpus.texts import Document, Text, in_seeded_order

#: So many segments of a document are read at a time, of which one is taken at random: long ones are not read to their
#: end for it.
_READ = 16
#: English text has about 4 characters a token.
_CHARACTERS_PER_TOKEN = 4


def segments(
    text: Text,
    encode: Callable[[str], list[int]],
    end: list[int],
    *,
    length: int,
    order: random.Random,
    read_ahead: int,
) -> Iterator[tuple[int, array[int]]]:
    """Token ids of segments: one of each document, and only then another of each that has more.

    Of the documents that were read ahead, one that is twice as long is twice as likely to be the next, up to a length
    of 16 segments; which of its segments it gives is random. So tokens of long and of short documents come as often as
    they are in the text, and of two parts of what is made of the segments neither has seen the other's documents, as
    long as there are documents enough.

    Args:
        text: whose documents they are, read only as far as needed.
        encode: the token ids of a piece.
        end: token ids that end a document.
        length: of a segment in tokens, at most.
        order: where the order comes from.
        read_ahead: each document is drawn from so many.

    Yields:
        The number of its document, in the order in which they are drawn, and the segment.
    """
    weight = partial(_length, enough=_READ * length * _CHARACTERS_PER_TOKEN)
    documents = in_seeded_order(text, order, read_ahead, weight=weight)
    opened: Iterable[tuple[int, Iterator[array[int]]]] = (
        (number, _in_random_order(chain(chain.from_iterable(map(encode, pieces)), end), order, length))
        for number, pieces in enumerate(documents)
    )
    while True:
        left = []
        for number, document in opened:
            if (segment := next(document, None)) is not None:
                left.append((number, document))
                yield number, segment
        if not left:
            return
        opened = left


def _length(document: Document, enough: int) -> int:
    """Of a document in characters, of which no more than `enough` count; one that is empty counts as well."""
    size = 0
    for piece in document:
        size += len(piece)
        if size >= enough:
            break
    return 1 + min(size, enough)


def _in_random_order(tokens: Iterator[int], order: random.Random, length: int) -> Iterator[array[int]]:
    while read := array("q", islice(tokens, _READ * length)):
        parts = [read[start : start + length] for start in range(0, len(read), length)]
        while parts:
            # A short rest at the end comes first as seldom as it is short.
            chosen = order.choices(range(len(parts)), weights=[len(part) for part in parts])[0]
            yield parts.pop(chosen)
