"""Shared fixtures."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from browser import Page, browser

# Threads of tiny products only get in each other's way; tests of real models ask for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as shown:
        yield shown
