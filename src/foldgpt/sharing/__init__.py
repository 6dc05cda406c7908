"""Who shares with whom."""

from foldgpt.sharing.adjacent import adjacent_groups
from foldgpt.sharing.zero_started import zero_started_groups

__all__ = ["adjacent_groups", "zero_started_groups"]
