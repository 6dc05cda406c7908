"""LoRA on the linear layers of a student: peft's layers with a cheaper forward and backward pass, merged exactly."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_ADAPTER = "default"


class LoraLinear(PeftLinear):
    """peft's LoRA layer, computed as x (W + s B A)ᵀ + b.

    peft adds s B A x to W x, which takes several passes over tables of tokens × features. Adding B A to W takes one
    over W, and the forward pass is then the very product that the merged model will compute. The backward pass keeps
    x alone. A and B stay in fp32 while W is in 16 bits, or small updates would be lost.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs [..., O] of inputs [..., I]."""
        base: Any = self.get_base_layer()
        weight_OI = base.weight.T if isinstance(base, Conv1D) else base.weight
        device, bias = x.device.type, base.bias
        # On the meta device, where a rehearsal counts, there is none.
        mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        mixed = mixed and x.dtype != torch.float64
        if mixed:
            # What autocast does to a linear layer; it does nothing in a backward pass of one's own.
            dtype = torch.get_autocast_dtype(device)
            x, weight_OI, bias = x.to(dtype), weight_OI.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False) if mixed else nullcontext():
            result: Tensor = _LoraProduct.apply(
                x,
                weight_OI,
                bias,
                self.lora_A[_ADAPTER].weight,
                self.lora_B[_ADAPTER].weight,
                self.scaling[_ADAPTER],
            )
        return result

    @torch.no_grad()
    def with_terms_added(self) -> nn.Module:
        """The base layer with s B A added, in fp64 and cast once."""
        base: Any = self.get_base_layer()
        delta_OI = self.scaling[_ADAPTER] * (
            self.lora_B[_ADAPTER].weight.double() @ self.lora_A[_ADAPTER].weight.double()
        )
        delta = delta_OI.T if isinstance(base, Conv1D) else delta_OI
        base.weight.copy_((base.weight.double() + delta).to(base.weight.dtype))
        return base


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        a, b = a_RI.to(x.dtype), (b_OR * scale).to(x.dtype)
        ctx.save_for_backward(x, weight_OI, a, b)
        ctx.scale = scale
        return nn.functional.linear(x, torch.addmm(weight_OI, b, a), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI, a, b = ctx.saved_tensors
        output_TO = grad_outputs[0].reshape(-1, weight_OI.shape[0])
        x_TI = x.reshape(-1, weight_OI.shape[1])
        inner_TR = output_TO @ b
        input_TI = None
        if ctx.needs_input_grad[0]:
            # Of the very weights that the forward pass had.
            input_TI = (output_TO @ torch.addmm(weight_OI, b, a)).view_as(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        grad_a = (inner_TR.T @ x_TI).to(wide)
        grad_b = (output_TO.T @ (x_TI @ a.T)).to(wide) * ctx.scale
        return input_TI, None, None, grad_a, grad_b, None


def attach_lora_(blocks: nn.ModuleList, names: Iterable[str], *, rank: int, alpha: float, seed: int) -> None:
    """Give linear layers of a model's blocks LoRA terms, in place; all else in them is frozen.

    A layer that several positions share is one module, found at its owner: it gets one adapter, which all of them use
    and which is merged once. B starts at zero, so the model computes what it did.

    Args:
        blocks: the blocks. Not the model: of one that names its architecture peft takes names of layers for those of
            earlier versions of it, and puts terms on experts as well.
        names: dotted names of the layers inside them.
        rank: R of A [R, I] and B [O, R].
        alpha: the terms are scaled by alpha / rank.
        seed: seed of A.
    """
    names = list(names)
    conv = any(isinstance(blocks.get_submodule(name), Conv1D) for name in names)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names, bias="none", fan_in_fan_out=conv
    )
    config._register_custom_module({nn.Linear: LoraLinear, Conv1D: LoraLinear})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, blocks, adapter_name=_ADAPTER)
    del blocks.peft_config
    for layer in _layers(blocks).values():
        for term in (layer.lora_A, layer.lora_B):
            term.to(torch.promote_types(term[_ADAPTER].weight.dtype, torch.float32))


def merge_lora_(student: nn.Module) -> None:
    """Add the terms to the weights and put the plain layers back, in place.

    Each layer is merged once, in fp64, however many positions use it.
    """
    for name, layer in _layers(student).items():
        student.set_submodule(name, layer.with_terms_added())


def _layers(root: nn.Module) -> dict[str, LoraLinear]:
    return {name: module for name, module in root.named_modules() if isinstance(module, LoraLinear)}
