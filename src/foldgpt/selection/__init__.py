"""Selectors: which blocks to remove. Each is one function in one file, and one entry in `SELECTORS`."""

from foldgpt.selection.angular import angular
from foldgpt.selection.bi import bi
from foldgpt.selection.fixed import last, random
from foldgpt.selection.selection import Request, Selection, Selector, number_to_remove
from foldgpt.selection.selection import select as _select

SELECTORS: dict[str, Selector] = {"bi": bi, "angular": angular, "last": last, "random": random}


def select(method: str, request: Request) -> Selection:
    """Select blocks by a method.

    Args:
        method: a key of `SELECTORS`.
        request: what is asked.

    Raises:
        UsageError: an unknown method, a number that cannot be removed, or an analysis that is missing or of
            another model.
    """
    return _select(SELECTORS, method, request)


__all__ = ["SELECTORS", "Request", "Selection", "Selector", "number_to_remove", "select"]
