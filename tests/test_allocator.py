"""The allocator keeps freed memory where it can, and says whether it did."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from foldgpt.allocator import keep_freed_memory

_FAULTS = """
import resource, sys, torch
from foldgpt.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(6):
    torch.ones(12 * 2**20)
before = faults()
for _ in range(20):
    torch.ones(12 * 2**20)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_large_buffers_are_not_faulted_in_again() -> None:
    faults = {}
    for how in ("keep", "default"):
        run = subprocess.run([sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, check=True)
        faults[how] = int(run.stdout)
    assert 3 * faults["keep"] < faults["default"]


def test_elsewhere_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert keep_freed_memory() is False
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert keep_freed_memory() is False
