"""How much memory is free on a device, with what this process has freed and keeps, and within a container's limit."""

from __future__ import annotations

import gc

import torch

from foldgpt.system_memory import give_back, memory_left


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device.

    What the process has freed and its allocators keep is free as well: glibc's is told to give it back, of CUDA's it is
    added. Of the machine's own memory a container may have less than the machine.
    """
    gc.collect()
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    give_back()
    return memory_left()
