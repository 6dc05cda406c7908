"""Keep freed memory in the process, so that large buffers are not faulted in again for every operation.

By default glibc maps each large buffer anew and gives it back when it is freed. A model on the CPU allocates and
frees the same few sizes thousands of times, and spends more time on page faults than on some of its operations.
"""

from __future__ import annotations

import ctypes
import platform

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4

_TOP_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Tell the allocator of this process to keep what is freed.

    Call it once, early. Memory that Python no longer needs is then reused and not returned to the system until the
    process ends: right for a command, wrong for a long-lived server.

    Returns:
        Whether anything was changed: False where the C library is not glibc.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    never = 2**31 - 1
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, never), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(mallopt(name, value) == 1 for name, value in settings)
