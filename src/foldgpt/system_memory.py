"""The machine's own memory: what is left of it, within a container's limit, and giving back what was freed."""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
#: Controller as the kernel lists it → folder, limit, usage, and memory that is used as long as nothing else needs it.
#: The first is cgroup v2.
_LAYOUTS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def memory_left() -> int:
    """Bytes of the machine's own memory that this process may still take beside what it has, freed or not."""
    return min([int(psutil.virtual_memory().available), *_left_to_groups(_CGROUPS, _OWN_GROUPS)])


def give_back() -> None:
    """Return freed memory to the system, which it is kept from otherwise (see allocator.py); nothing without glibc."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)


def _left_to_groups(root: Path, own_groups: Path) -> list[int]:
    """What each control group that this process is in (a container, a batch job) may still take.

    Args:
        root: where they are mounted. A container sees its own group there.
        own_groups: the kernel's list of the groups of this process.
    """
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in _LAYOUTS.keys() & controllers.split(","):
            place, limit, usage, reclaimable = _LAYOUTS[controller]
            top = root / place
            group = top / path.lstrip("/")
            folders = [folder for folder in (group, *group.parents) if folder.is_relative_to(top)]
            left += [x for folder in folders if (x := _left_to(folder, limit, usage, reclaimable)) is not None]
    return left


def _left_to(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """What one group may still take; None where it has no limit, or is not seen from here."""
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return None
        statistics = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        files = next((int(value) for name, value in statistics if name == reclaimable), 0)
        return max(0, int(most) - int((folder / usage).read_text()) + files)
    except (OSError, ValueError):
        return None
