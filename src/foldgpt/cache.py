"""Where everything is kept that is fetched or made once for all runs."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """The folder of demo models, demo texts and texts that models wrote; `FOLDGPT_CACHE` moves it. Safe to delete."""
    return Path(os.environ.get("FOLDGPT_CACHE") or platformdirs.user_cache_dir("foldgpt"))
