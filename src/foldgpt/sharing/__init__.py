"""Who shares with whom."""

from foldgpt.sharing.adjacent import adjacent_groups

__all__ = ["adjacent_groups"]
