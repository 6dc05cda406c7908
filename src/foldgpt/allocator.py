"""Keep freed memory in the process, so that large buffers are not faulted in again for every operation.

By default glibc maps each large buffer anew and gives it back when it is freed. A model on the CPU allocates and
frees the same few sizes thousands of times, and spends more time on page faults than on some of its operations.

What is kept may come apart: PyTorch asks for aligned buffers, and glibc (before 2.38 by far the most) often finds no
room for one where one of the same size has been, if something small was put beside it meanwhile. The heap then grows to
many times what is in use. So what is kept unused is watched, and given back when it is too much.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import threading
import time

import psutil

from foldgpt.system_memory import give_back, memory_left

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4

_TOP_PAD_BYTES = 64 * 2**20

#: The most that is kept unused, as a share of what is left to others.
_KEPT_SHARE = 1 / 3
#: This much is kept whatever is left: a few buffers.
_KEPT_BYTES = 512 * 2**20
_WATCH_SECONDS = 0.2


class _Statistics(ctypes.Structure):
    """glibc's `struct mallinfo2`; in bytes, over all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def keep_freed_memory() -> bool:
    """Tell the allocator of this process to keep what is freed.

    Call it once, early. Memory that Python no longer needs is then reused and not returned to the system until the
    process ends, or until it is more than a third of what the machine (or the container) has left: right for a command,
    wrong for a long-lived server. A thread watches that, where glibc is 2.33 or later.

    Returns:
        Whether anything was changed: False where the C library is not glibc.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    mallopt = getattr(library, "mallopt", None)
    if mallopt is None:
        return False
    never = 2**31 - 1
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, never), (_M_TOP_PAD, _TOP_PAD_BYTES))
    done = all(mallopt(name, value) == 1 for name, value in settings)
    if done and hasattr(library, "mallinfo2"):
        _start_watch()
    return done


@functools.cache
def _start_watch() -> None:
    threading.Thread(target=_watch, name="foldgpt-kept-memory", daemon=True).start()


def _watch() -> None:
    """Give freed memory back whenever too much of it is kept."""
    statistics = ctypes.CDLL(None).mallinfo2
    statistics.restype = _Statistics
    process = psutil.Process()

    def beside_what_is_used() -> int:
        memory = process.memory_info()
        return int(memory.rss - memory.shared - statistics().uordblks)

    # What is resident and not malloc's: stacks, other allocators. Known only when nothing unused is kept.
    others = 0
    while True:
        time.sleep(_WATCH_SECONDS)
        kept = beside_what_is_used() - others
        if kept > _KEPT_BYTES and kept > _KEPT_SHARE * memory_left():
            give_back()
            others = beside_what_is_used()
