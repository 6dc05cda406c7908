"""What is compiled by `torch.compile` while a student is trained: the blocks, and the losses between the products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from foldgpt.attention import computes_by_amx
from foldgpt.errors import UsageError, first_line
from foldgpt.families import decoder_of

_BACKEND = "inductor"
_VARIANTS = 64
#: Parameters × tokens from which what compiling saves (docs/recovery.md) is more than the minute that it takes: over a
#: third of a step on a CPU with AMX, and a quarter on a GPU.
_PAYS_FROM = {"cpu": 2.7e13, "cuda": 3e15}

_P = ParamSpec("_P")
_R = TypeVar("_R")


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where that does not work; in a training the same error comes from deep inside.

    Raises:
        UsageError: `torch.compile` fails on this device, for want of a C++ compiler for example.
    """
    x = torch.zeros(8, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: (x * x).sum(), backend=_BACKEND)(x).backward()
    except Exception as error:  # compilers, linkers and drivers fail in their own ways
        raise UsageError(
            f"torch.compile does not work on {device} here; train without compile. {first_line(error)}"
        ) from error


def would_pay(model: nn.Module, num_tokens: int) -> bool:
    """Whether a training on so many tokens would be done sooner if it were compiled.

    Args:
        model: the student, where it is trained.
        num_tokens: the training tokens.
    """
    weight = next(model.parameters())
    knows = weight.device.type == "cuda" or computes_by_amx(model)
    work = sum(parameter.numel() for parameter in model.parameters()) * num_tokens
    return knows and work >= _PAYS_FROM[weight.device.type]


def compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, compiled when it is called for the first time and for each new kind of arguments."""
    return torch.compile(function, backend=_BACKEND)


@contextmanager
def compiled_blocks(*models: nn.Module | None) -> Iterator[None]:
    """Run the blocks of these models compiled, each by itself; afterwards they are ordinary modules again.

    What is compiled serves all blocks that are alike. It takes seconds on a GPU, and up to minutes on a CPU.
    """
    blocks = [block for model in models if model is not None for block in decoder_of(model).blocks]
    try:
        for block in blocks:
            block.compile(backend=_BACKEND)
        # All blocks have their code in common, and of that 8 variants at most are compiled by default: kinds of
        # attention, what is trained in a block, with and without gradients.
        # What DDP would divide a graph by, to send gradients sooner, is no larger than a block; and older versions of
        # torch refuse to divide one with autograd functions in it.
        with torch._dynamo.config.patch(recompile_limit=_VARIANTS, optimize_ddp=False):
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
