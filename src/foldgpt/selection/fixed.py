"""Selectors that do not look at the model: yardsticks that any measured one must beat."""

from __future__ import annotations

from typing import Any

import numpy

from foldgpt.errors import UsageError
from foldgpt.selection.selection import Request, Selection


def last(request: Request) -> Selection:
    """Remove the last blocks, the deepest first."""
    order = tuple(reversed(range(request.num_blocks)))
    return Selection("last", None, order, tuple(sorted(order[: request.num_remove])))


def random(request: Request) -> Selection:
    """Remove blocks drawn uniformly with the option `seed`, by default the request's."""
    seed = random_options(request)["seed"]
    order = tuple(int(index) for index in numpy.random.default_rng(seed).permutation(request.num_blocks))
    return Selection("random", None, order, tuple(sorted(order[: request.num_remove])))


def random_options(request: Request) -> dict[str, Any]:
    """The options of `random` over their defaults.

    Raises:
        UsageError: an unknown option, or a seed that cannot be one.
    """
    options = request.options_over("random", {"seed": request.seed})
    seed = options["seed"]
    if type(seed) is not int or seed < 0:
        raise UsageError(f"the seed of the selector 'random' must be a whole number from 0 on, not {seed!r}")
    return options
