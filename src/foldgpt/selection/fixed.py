"""Selectors that do not look at the model: yardsticks that any measured one must beat."""

from __future__ import annotations

from typing import Any

import numpy

from foldgpt.block_lists import blocks_of
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
    generator = numpy.random.default_rng(seed)
    left = generator.permutation(request.num_blocks).tolist()
    decoder = None if request.model is None else decoder_of(request.model)
    units = Units.blocks(request.num_blocks, request.num_remove, decoder)
    gone: list[int] = []
    while (block := next((block for block in left if units.is_allowed([*gone, block])), None)) is not None:
        gone.append(block)
        left.remove(block)
        if units.read_blocks:
            # What was passed over may go once a block that reads from it is gone, and would else be the next for sure.
            left = generator.permutation(left).tolist()
    order = (*gone, *left)
    return Selection("random", None, order, request.foldable(order[: request.num_remove]))


def blocks(request: Request) -> Selection:
    """Remove the blocks that the option `blocks` names, such as a set that a paper reports.

    Raises:
        UsageError: as `blocks_options` says.
        PlanError: the model cannot be folded without them.
    """
    named = blocks_options(request)["blocks"]
    order = (*named, *(block for block in range(request.num_blocks) if block not in named))
    return Selection("blocks", None, order, request.foldable(named))


def blocks_options(request: Request) -> dict[str, Any]:
    """The blocks that are named, as a list.

    Raises:
        UsageError: an unknown option, none named or one that there is not, or more or fewer than are to be removed.
    """
    written = request.options_over("blocks", {"blocks": None})["blocks"]
    if written is None:
        raise UsageError("the selector 'blocks' removes what its option of that name says, such as blocks=13-18")
    named = blocks_of(written)
    missing = [block for block in named if not 0 <= block < request.num_blocks]
    if missing:
        raise UsageError(
            f"blocks {written!r}: there is no block {missing[0]}; the last one is {request.num_blocks - 1}"
        )
    if len(named) != request.num_remove:
        raise UsageError(
            f"blocks {written!r} are {len(named)}, and {request.num_remove} are to be removed: leave that number out, "
            "or name as many"
        )
    return {"blocks": named}


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
