"""Selectors that do not look at the model: yardsticks that any measured one must beat."""

from __future__ import annotations

import numpy

from foldgpt.errors import UsageError
from foldgpt.selection.selection import Request, Selection


def last(request: Request) -> Selection:
    """Remove the last blocks, the deepest first."""
    request.check_options("last", {})
    order = tuple(reversed(range(request.num_blocks)))
    return Selection("last", None, order, tuple(sorted(order[: request.num_remove])))


def random(request: Request) -> Selection:
    """Remove blocks drawn uniformly with the option `seed`, by default the request's."""
    seed = request.check_options("random", {"seed": request.seed})["seed"]
    if type(seed) is not int or seed < 0:
        raise UsageError(f"the seed of the selector 'random' must be a whole number from 0 on, not {seed!r}")
    order = tuple(int(index) for index in numpy.random.default_rng(seed).permutation(request.num_blocks))
    return Selection("random", None, order, tuple(sorted(order[: request.num_remove])))
