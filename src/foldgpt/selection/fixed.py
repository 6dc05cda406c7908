"""Selectors that do not look at the model: yardsticks that any measured one must beat."""

from __future__ import annotations

from typing import Any

import numpy

from foldgpt.errors import UsageError
from foldgpt.families import decoder_of
from foldgpt.selection.selection import Request, Selection
from foldgpt.selection.units import Units


def last(request: Request) -> Selection:
    """Remove the last blocks, the deepest first.

    Raises:
        PlanError: the model cannot be folded without these blocks; others would not be the last.
    """
    order = tuple(reversed(range(request.num_blocks)))
    return Selection("last", None, order, request.foldable(order[: request.num_remove]))


def random(request: Request) -> Selection:
    """Remove blocks drawn one after another with the option `seed`, by default the request's.

    Each is drawn uniformly among those without which the model can still be folded.

    Raises:
        UsageError: an unknown option, or a seed that cannot be one.
        PlanError: the model cannot be folded at all.
    """
    seed = random_options(request)["seed"]
    drawn = [int(index) for index in numpy.random.default_rng(seed).permutation(request.num_blocks)]
    decoder = None if request.model is None else decoder_of(request.model)
    units = Units.blocks(request.num_blocks, request.num_remove, decoder)
    # What may not go at its turn may not go later either, so passing it over leaves the other draws uniform.
    gone: list[int] = []
    for block in drawn:
        if units.is_allowed([*gone, block]):
            gone.append(block)
    order = (*gone, *(block for block in drawn if block not in gone))
    return Selection("random", None, order, request.foldable(order[: request.num_remove]))


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
