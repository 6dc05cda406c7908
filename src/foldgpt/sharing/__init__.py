"""Who shares with whom, and what they share."""

from foldgpt.sharing.adjacent import adjacent_groups
from foldgpt.sharing.best_donor import with_best_donors
from foldgpt.sharing.fit import boundaries_of, fit_sharing, sharing_replay
from foldgpt.sharing.fit_result import SHARING
from foldgpt.sharing.solver import limit_of, solve
from foldgpt.sharing.zero_started import zero_started_groups

__all__ = [
    "SHARING",
    "adjacent_groups",
    "boundaries_of",
    "fit_sharing",
    "limit_of",
    "sharing_replay",
    "solve",
    "with_best_donors",
    "zero_started_groups",
]
