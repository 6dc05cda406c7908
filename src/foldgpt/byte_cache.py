"""ByteCache: what was made last, as much of it as a number of bytes holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, ValuesView
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ByteCache(Generic[Key, Value]):
    """Values by key. Where they take too much, those go first that were not asked for the longest.

    Args:
        room: what all values may take together, in bytes.
        size_of: what one value takes.
    """

    def __init__(self, room: int, size_of: Callable[[Value], int]) -> None:
        self._capacity = self._room = room
        self._size_of = size_of
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """The value, if it is still there."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]

    def put(self, key: Key, value: Value) -> None:
        """Keep a value, unless it alone takes too much; one that is there already stays."""
        size = self._size_of(value)
        if key in self._values or size > self._capacity:
            return
        self._values[key] = value
        self._room -= size
        while self._room < 0:
            _, dropped = self._values.popitem(last=False)
            self._room += self._size_of(dropped)

    def clear(self) -> None:
        """Drop all values."""
        self._values.clear()
        self._room = self._capacity

    def values(self) -> ValuesView[Value]:
        """All values, from the one that would go first on."""
        return self._values.values()
