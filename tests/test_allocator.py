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


_HEAP_COMES_APART = """
import sys, time, psutil, torch
from foldgpt import allocator
if not allocator.keep_freed_memory() or not hasattr(allocator.ctypes.CDLL(None), "mallinfo2"):
    sys.exit(3)
allocator.memory_left = lambda: int(sys.argv[1])
tensors, between = [], []
for _ in range(256):
    tensors.append(torch.ones(2**20))
    between.append(torch.ones(16))  # in the way of larger ones
full = psutil.Process().memory_info().rss
del tensors
for _ in range(50):
    time.sleep(0.1)
    if (given_back := full - psutil.Process().memory_info().rss) > 0.8 * 2**30:
        break
assert all(bool((some == 1).all()) for some in between)
print(given_back)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
@pytest.mark.parametrize(("left", "is_given_back"), [(2 * 2**30, True), (100 * 2**30, False)])
def test_what_is_kept_unused_goes_back_when_it_is_much_of_what_is_left(left: int, is_given_back: bool) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _HEAP_COMES_APART, str(left)], capture_output=True, text=True, check=False
    )
    if run.returncode == 3:
        pytest.skip("this C library does not tell what it keeps")
    assert run.returncode == 0, run.stderr
    assert (int(run.stdout) > 0.8 * 2**30) == is_given_back


def test_elsewhere_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert keep_freed_memory() is False
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert keep_freed_memory() is False
