"""Parameters that are trained themselves: held in fp32, cast to the model's own format wherever they are used."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class _Cast(nn.Module):
    """The view of an fp32 master in another format."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        """The master, rounded."""
        return master.to(self.dtype)


def train_(modules: Iterable[nn.Module], fixed: Collection[int] = ()) -> None:
    """Make the own parameters of some modules trainable, in place; those in 16 bits get a master in fp32.

    An update of a few millionths of a weight is lost in 16 bits.

    Args:
        modules: the modules.
        fixed: ids of parameters that stay as they are.
    """
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in fixed:
                continue
            wide = torch.promote_types(parameter.dtype, torch.float32)
            if wide == parameter.dtype:
                parameter.requires_grad_(True)
                continue
            setattr(module, name, nn.Parameter(parameter.detach().to(wide)))
            # unsafe: the only way to say that the format changes.
            parametrize.register_parametrization(module, name, _Cast(parameter.dtype), unsafe=True)


def merge_masters_(model: nn.Module) -> None:
    """Round each master once and make it an ordinary parameter again, in place."""
    for module in list(model.modules()):
        parametrizations: Any = getattr(module, "parametrizations", None)
        if parametrizations is None or not parametrize.is_parametrized(module):
            continue
        for name in list(parametrizations):
            rounded = getattr(module, name).detach().clone()
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            setattr(module, name, nn.Parameter(rounded))


def parameters_called(module: nn.Module, kind: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module of that name, with their places in it; also where a master stands for one.

    A master in fp32 is called `parametrizations.scale.original`.
    """
    return ((place, parameter) for place, parameter in module.named_parameters() if kind in place.split("."))
