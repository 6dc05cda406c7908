"""How the windows beside those of a search are divided: what fits may know, and what is held out for its last stage.

The last stage of a search by gates are finals, or, where sets are compensated, the refinement by what folding leaves.
"""

from __future__ import annotations

#: This share of all windows is held out where sets are compensated: what folding leaves is measured there. Measured on
#: as few as a search looks at, sets were in an order that other text did not bear out (docs/lab-notebook.md).
_HELD_OUT = 0.25
#: But no more than so many times the search's windows: of larger texts a quarter takes so much of a search's allowance
#: that too few sets are folded.
_MOST_HELD = 2
#: The last stage fits on so many times the search's windows at most, those included. Behind a fit on fewer, the order
#: may be neither the search's nor that of folding. Priors are fitted on as many, and none of the search's.
_FITTED = 3


def held_windows(searched: int, further: int) -> int:
    """On how many of the further windows, the last ones, folded sets are measured.

    Args:
        searched: windows of the search.
        further: windows beside them.
    """
    return min(further, _wanted(searched, further))


def fitted_windows(searched: int, further: int) -> int:
    """On how many windows, those of the search and the first further ones, the last stage fits sets."""
    return min(_FITTED * searched, searched + further - held_windows(searched, further))


def prior_windows(searched: int, further: int) -> int:
    """On how many of the further windows, the first ones, priors are fitted; 0 if there are none to spare."""
    return min(_FITTED * searched, further - held_windows(searched, further))


def prior_passes(fitted: int, searched: int) -> float:
    """What priors take once each block was in a fit, in passes over a search's text: a recording, and each block once.

    Args:
        fitted: windows, or tokens, that they are fitted on.
        searched: those of the search.
    """
    return 2 * fitted / searched


def last_stage_windows(searched: int, further: int, compensated: bool) -> int:
    """On how many windows the last stage records states at a time; 0 if there are too few further ones for it.

    Args:
        searched: windows of the search.
        further: windows beside them.
        compensated: whether sets are compensated.
    """
    wanted = _wanted(searched, further) if compensated else searched
    if 2 * further < wanted:
        return 0
    held = held_windows(searched, further)
    return fitted_windows(searched, further) + held if compensated else min(searched, further)


def _wanted(searched: int, further: int) -> int:
    """On how many windows folded sets would be measured if there were enough."""
    return max(1, min(round(_HELD_OUT * (searched + further)), _MOST_HELD * searched))
