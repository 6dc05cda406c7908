"""All selectors and what each can do. A selector is one function in one file and one row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from foldgpt.errors import UsageError, did_you_mean
from foldgpt.selection.angular import angular
from foldgpt.selection.bi import bi
from foldgpt.selection.cost import Objective
from foldgpt.selection.fixed import blocks, blocks_options, last, random, random_options
from foldgpt.selection.gating.gates import gates, gates_options, gates_passes
from foldgpt.selection.greedy import greedy, greedy_passes
from foldgpt.selection.loo import loo, loo_passes
from foldgpt.selection.measured import cost_passes, with_cost
from foldgpt.selection.selection import Request, Selection, Selector
from foldgpt.selection.taylor import taylor, taylor_passes


@dataclass(frozen=True)
class _Row:
    """A selector.

    Attributes:
        run: the function.
        reads_analysis: whether it reads the redundancy analysis.
        passes: about how many forward passes over its windows its search takes, the recording of the source's states
            included, from a request and from what the predictions of one set take, in forward passes of the blocks;
            None where it does not measure the model on the calibration windows.
        by_sublayer: whether it can remove the attention and the MLP of a block apart.
        objectives: what it can be asked to measure; empty where it measures nothing that could be chosen.
        options: what checks its options and fills in their defaults; None where it has none.
    """

    run: Selector
    reads_analysis: bool = False
    passes: Callable[[Request, float], float] | None = None
    by_sublayer: bool = False
    objectives: tuple[Objective, ...] = ()
    options: Callable[[Request], dict[str, Any]] | None = None


#: The objectives of whatever measures the cost of sets.
_BOTH: tuple[Objective, ...] = ("kl", "lm")

_ROWS: dict[str, _Row] = {
    "gates": _Row(gates, passes=gates_passes, by_sublayer=True, objectives=_BOTH, options=gates_options),
    "bi": _Row(bi, reads_analysis=True),
    "angular": _Row(angular, reads_analysis=True),
    "loo": _Row(loo, passes=loo_passes, by_sublayer=True, objectives=_BOTH),
    "greedy": _Row(greedy, passes=greedy_passes, by_sublayer=True, objectives=_BOTH),
    # A norm behind a sublayer would undo its gate, so the gradient that taylor takes is for whole blocks.
    "taylor": _Row(taylor, passes=taylor_passes, objectives=("lm",)),
    "last": _Row(last),
    "random": _Row(random, options=random_options),
    "blocks": _Row(blocks, options=blocks_options),
}

SELECTORS: dict[str, Selector] = {name: row.run for name, row in _ROWS.items()}
#: Selectors that do not read the redundancy analysis.
ANALYSIS_FREE = frozenset(name for name, row in _ROWS.items() if not row.reads_analysis)
#: Selectors that measure the model on the calibration windows.
MEASURED = frozenset(name for name, row in _ROWS.items() if row.passes is not None)
#: Selectors that can remove the attention and the MLP of a block apart.
BY_SUBLAYER = frozenset(name for name, row in _ROWS.items() if row.by_sublayer)
#: Selectors that can be asked for either objective.
WITH_OBJECTIVE = frozenset(name for name, row in _ROWS.items() if row.objectives == _BOTH)


def check_name(method: str) -> None:
    """Refuse a selector that there is not.

    Raises:
        UsageError: names the nearest one that there is.
    """
    if method not in _ROWS:
        raise UsageError(f"unknown selector {method!r}.{did_you_mean(method, _ROWS)}")


def check_request(method: str, request: Request) -> None:
    """Refuse what is wrong in a request whatever the model and the analysis; neither is needed.

    Args:
        method: a key of `SELECTORS`.
        request: what is asked.

    Raises:
        UsageError: an unknown method or option, a number that cannot be removed, sublayers for a method that rates
            blocks, or an objective for one that measures none.
    """
    check_name(method)
    if not 0 <= request.num_remove < request.num_blocks:
        raise UsageError(
            f"cannot remove {request.num_remove} of {request.num_blocks} blocks; "
            f"a number from 0 to {request.num_blocks - 1} leaves at least one"
        )
    row = _ROWS[method]
    if request.sublayers and not row.by_sublayer:
        raise UsageError(
            f"the selector {method!r} removes whole blocks; attention and MLP apart can be selected by "
            f"{', '.join(sorted(BY_SUBLAYER))}"
        )
    # "kl" is the default, and stands in the requests of all.
    if request.objective not in ("kl", *row.objectives):
        raise UsageError(
            f"the selector {method!r} measures no objective, so {request.objective!r} would change nothing: leave "
            f"select.objective out, or select by {', '.join(sorted(WITH_OBJECTIVE))}"
        )
    if row.options is None:
        request.options_over(method, {})
    else:
        row.options(request)


def search_passes(method: str, request: Request, *, head: float = 0.0) -> float:
    """About how many forward passes over its windows `select` takes, the recording of the source's states included.

    Args:
        method: a key of `SELECTORS`.
        request: what is asked; neither a model nor windows are needed, but `taylor` reads off the shape of windows
            that are there how many positions it makes logits at. If small units go, it takes more of them to make up
            the same size, and more passes than this.
        head: what the predictions of one set take, in forward passes of the blocks.

    Returns:
        The number of passes; for a selector that searches nothing those that measuring what it chose takes.

    Raises:
        UsageError: as `check_request` says.
    """
    check_request(method, request)
    passes = _ROWS[method].passes
    if passes is not None:
        return passes(request, head) + request.prior_passes
    return cost_passes(head) + request.prior_passes if request.num_remove else 0.0


def select(method: str, request: Request) -> Selection:
    """Select blocks by a method. Where a model and windows are given, each reports what its set costs on them.

    Args:
        method: a key of `SELECTORS`.
        request: what is asked.

    Raises:
        UsageError: as `check_request` says, or an analysis, a model or windows that are missing or do not fit.
        PlanError: the model that is given cannot be folded without the blocks that the method means.
        FoldGPTError: a search that cannot give an answer; the message says why.
    """
    check_request(method, request)
    selection = _ROWS[method].run(request)
    if method in MEASURED or request.model is None or request.ids_WT is None:
        return selection
    return with_cost(selection, request)
