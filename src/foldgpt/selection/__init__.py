"""Which blocks to remove. A selector is one function in one file and one entry in `SELECTORS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from foldgpt.errors import UsageError, did_you_mean
from foldgpt.selection.angular import angular
from foldgpt.selection.bi import bi
from foldgpt.selection.budget import flops_of, number_for_target, number_to_remove, parameters_of, seconds_of
from foldgpt.selection.cost import Objective, RemovalCost
from foldgpt.selection.fixed import last, random, random_options
from foldgpt.selection.gating.gates import gates, gates_effort, gates_options
from foldgpt.selection.greedy import greedy
from foldgpt.selection.loo import loo
from foldgpt.selection.selection import Request, Selection, Selector
from foldgpt.selection.taylor import taylor
from foldgpt.selection.units import Units

SELECTORS: dict[str, Selector] = {
    "gates": gates,
    "bi": bi,
    "angular": angular,
    "loo": loo,
    "greedy": greedy,
    "taylor": taylor,
    "last": last,
    "random": random,
}

#: Selectors that do not read the redundancy analysis.
ANALYSIS_FREE = frozenset(SELECTORS) - {"bi", "angular"}

#: Selectors that measure the model on the calibration windows.
MEASURED = ANALYSIS_FREE - {"last", "random"}

#: Selectors that can remove the attention and the MLP of a block apart. A norm behind a sublayer would undo its gate,
#: so the gradient that taylor takes is for whole blocks.
BY_SUBLAYER = MEASURED - {"taylor"}

#: Selectors that have options, and what checks them; the others have none.
_OPTIONS: dict[str, Callable[[Request], dict[str, Any]]] = {"gates": gates_options, "random": random_options}


def check(method: str, request: Request) -> None:
    """Refuse what is wrong in a request whatever the model and the analysis; neither is needed.

    Args:
        method: a key of `SELECTORS`.
        request: what is asked.

    Raises:
        UsageError: an unknown method or option, a number that cannot be removed, or sublayers for a method that
            rates blocks.
    """
    if method not in SELECTORS:
        raise UsageError(f"unknown selector {method!r}.{did_you_mean(method, SELECTORS)}")
    if not 0 <= request.num_remove < request.num_blocks:
        raise UsageError(
            f"cannot remove {request.num_remove} of {request.num_blocks} blocks; "
            f"a number from 0 to {request.num_blocks - 1} leaves at least one"
        )
    if request.sublayers and method not in BY_SUBLAYER:
        raise UsageError(
            f"the selector {method!r} removes whole blocks; attention and MLP apart can be selected by "
            f"{', '.join(sorted(BY_SUBLAYER))}"
        )
    if method in _OPTIONS:
        _OPTIONS[method](request)
    else:
        request.options_over(method, {})


def select(method: str, request: Request) -> Selection:
    """Select blocks by a method.

    Args:
        method: a key of `SELECTORS`.
        request: what is asked.

    Raises:
        UsageError: as `check` says, or an analysis, a model or windows that are missing or do not fit.
        FoldGPTError: a search that cannot give an answer; the message says why.
    """
    check(method, request)
    return SELECTORS[method](request)


__all__ = [
    "ANALYSIS_FREE",
    "BY_SUBLAYER",
    "MEASURED",
    "SELECTORS",
    "Objective",
    "RemovalCost",
    "Request",
    "Selection",
    "Selector",
    "Units",
    "check",
    "flops_of",
    "gates_effort",
    "number_for_target",
    "number_to_remove",
    "parameters_of",
    "seconds_of",
    "select",
]
