"""Segments of documents: varied text is a little of many documents, not all of a few long ones."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice

#: So many segments of a document are read at a time, of which one is taken at random: long ones are not read to their
#: end for it.
_READ = 16


def segments(documents: Iterable[Iterable[int]], order: random.Random, length: int) -> Iterator[array[int]]:
    """Segments of documents: one of each, and only then another of each that has more.

    Which one a document gives is random. So text that is packed from them is as varied as it can be, and of two parts
    of it none has seen the other's documents but for one at the border, as long as there are documents enough.

    Args:
        documents: token ids of each, read only as far as needed.
        order: where the order comes from.
        length: of a segment in tokens, at most.
    """
    opened: Iterable[Iterator[array[int]]] = (_in_random_order(document, order, length) for document in documents)
    while True:
        left = []
        for document in opened:
            if (segment := next(document, None)) is not None:
                left.append(document)
                yield segment
        if not left:
            return
        opened = left


def _in_random_order(document: Iterable[int], order: random.Random, length: int) -> Iterator[array[int]]:
    tokens = iter(document)
    while read := array("q", islice(tokens, _READ * length)):
        parts = [read[start : start + length] for start in range(0, len(read), length)]
        while parts:
            # A short rest at the end comes first as seldom as it is short.
            chosen = order.choices(range(len(parts)), weights=[len(part) for part in parts])[0]
            yield parts.pop(chosen)
