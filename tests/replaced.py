"""What a weight-only quantiser does, in plain sight: it swaps the linear layers that it finds by walking a model."""

from __future__ import annotations

import torch


class Doubled(torch.nn.Module):
    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * self.linear(hidden)


def replace_linears_(model: torch.nn.Module) -> None:
    """Put a layer of twice the output in place of each linear one in the blocks."""
    for name, module in linears_of(model):
        model.set_submodule(name, Doubled(module))


@torch.no_grad()
def double_weights_(model: torch.nn.Module) -> None:
    """The same, done to the weights."""
    for _, module in linears_of(model):
        module.weight *= 2


def linears_of(model: torch.nn.Module) -> list[tuple[str, torch.nn.Linear]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
