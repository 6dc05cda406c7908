"""The language-modelling head as a function of hidden states, so that logits can be made a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foldgpt.errors import FoldGPTError, UnsupportedModelError
from foldgpt.families import decoder_of
from foldgpt.fingerprints import have_same_tensors


class Head:
    """Hidden states after the final norm → logits, as the model itself makes them.

    Args:
        model: a causal language model.

    Attributes:
        vocab_size: V.
        hidden_size: H.
        factor: what the logits are multiplied by (1 in most families).

    Raises:
        UnsupportedModelError: the model does more to its logits than is known here (soft-capping, a constant
            factor); found out by comparing with the model's own logits on a few tokens.
        FoldGPTError: its logits are not finite.
    """

    def __init__(self, model: nn.Module) -> None:
        self._output: Any = model.get_output_embeddings()  # type: ignore[operator]
        decoder = decoder_of(model)
        config: Any = decoder.config
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = self._output.weight.shape[-1]
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        # Granite divides, Cohere multiplies.
        self.factor: float = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        self._check(model, decoder.body)

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """Logits [rows, V] of hidden states [rows, H], in fp32."""
        return self.finished(self.product(hidden_RH))

    def product(self, hidden_RH: Tensor) -> Tensor:
        """The head's matrix times hidden states [rows, H]: [rows, V], in the format of the matrix."""
        # The two differ where FSDP casts what it gathers or is given.
        product_RV: Tensor = self._output(hidden_RH.to(self._output.weight.dtype))
        return product_RV

    def finished(self, product_RV: Tensor) -> Tensor:
        """Logits [rows, V] of products, in fp32."""
        logits_RV = product_RV.float()
        if self.factor != 1:
            logits_RV = logits_RV * self.factor
        if self._cap:
            logits_RV = torch.tanh(logits_RV / self._cap) * self._cap
        return logits_RV

    def back_to_products(self, gradient_RV: Tensor, logits_RV: Tensor) -> Tensor:
        """The gradient with respect to products of one with respect to logits; all of them [rows, V], in fp32."""
        if self._cap:
            gradient_RV = gradient_RV * (1 - (logits_RV / self._cap).square())
        if self.factor != 1:
            gradient_RV = gradient_RV * self.factor
        return gradient_RV

    @property
    def itemsize(self) -> int:
        """Bytes of one product."""
        size: int = self._output.weight.element_size()
        return size

    @property
    def linear(self) -> nn.Linear | None:
        """The head's matrix where logits are linear in the hidden states (up to `factor`); None otherwise."""
        return self._output if isinstance(self._output, nn.Linear) and not self._cap else None

    def is_linear_as(self, other: Head) -> bool:
        """Whether logits are linear in the hidden states, and the other head's are the same of the same states."""
        mine, theirs = self.linear, other.linear
        if mine is None or theirs is None or self.factor != other.factor:
            return False
        return have_same_tensors(mine, theirs)

    @torch.no_grad()
    def _check(self, model: Any, body: nn.Module) -> None:
        device = model.get_input_embeddings().weight.device
        ids_BT = torch.arange(1, 9, device=device)[None] % self.vocab_size
        was_training = model.training
        model.eval()
        hidden_BTH = body(input_ids=ids_BT, use_cache=False).last_hidden_state
        own_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
        model.train(was_training)
        if not bool(own_BTV.isfinite().all()):
            raise FoldGPTError(
                f"the logits of this {type(model).__name__} are not finite; load it in float32 or bfloat16 (--dtype), "
                "or check its weights"
            )
        if not torch.allclose(self.logits(hidden_BTH), own_BTV, rtol=2e-2, atol=2e-2 * float(own_BTV.abs().max())):
            raise UnsupportedModelError(
                f"{type(model).__name__} does something to its logits that foldgpt does not know; "
                "objectives on logits are not possible for it."
            )
