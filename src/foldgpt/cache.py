"""Where everything is kept that is fetched or made once for all runs."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from foldgpt.artifacts import from_home


def cache_folder() -> Path:
    """The folder of demo models, demo texts and texts that models wrote; `FOLDGPT_CACHE` moves it. Safe to delete."""
    given = os.environ.get("FOLDGPT_CACHE")
    return from_home(given) if given else Path(platformdirs.user_cache_dir("foldgpt"))
