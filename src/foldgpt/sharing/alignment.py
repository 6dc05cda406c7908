"""Alignment: reorder a block's attention heads and MLP neurons so that they stand where another's like ones stand.

A block computes the same whichever order its neurons are in, and whichever order its attention heads are in, so
long as everything that belongs to one moves with it. Two blocks can therefore be compared, and averaged, in the
order in which they agree best (Ainsworth et al. 2023, Git Re-Basin, arXiv 2209.04836). Heads move whole, with the
key and value head that their group reads, so rotary embeddings and norms within a head are untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from foldgpt.families import Decoder
from foldgpt.plan import SUBLAYERS, Sublayer
from foldgpt.sharing.covariance import BlockMoments
from foldgpt.sharing.linears import is_linear, weight_of

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Order:
    """The rows and columns of one linear layer in their new order.

    Attributes:
        rows_O: which output each new output was, int64; None leaves them.
        columns_I: which input each new input was, int64; None leaves them.
    """

    rows_O: Tensor | None = None
    columns_I: Tensor | None = None

    def weight(self, weight_OI: Tensor) -> Tensor:
        """A matrix in the new order."""
        if self.rows_O is not None:
            weight_OI = weight_OI[self.rows_O.to(weight_OI.device)]
        if self.columns_I is not None:
            weight_OI = weight_OI[:, self.columns_I.to(weight_OI.device)]
        return weight_OI

    def bias(self, bias_O: Tensor) -> Tensor:
        """A bias in the new order."""
        return bias_O if self.rows_O is None else bias_O[self.rows_O.to(bias_O.device)]

    def moments(self, second_II: Tensor) -> Tensor:
        """Second moments of the inputs in the new order."""
        if self.columns_I is None:
            return second_II
        columns_I = self.columns_I.to(second_II.device)
        return second_II[columns_I][:, columns_I]


#: Name of a linear layer → its new order; layers that are not named stay as they are.
Alignment = Mapping[str, Order]


def can_align(decoder: Decoder, index: int, sublayer: Sublayer) -> bool:
    """Whether the parts of a sublayer of block `index` are known well enough to be reordered.

    That is so where the sublayer is one module whose parameters are q, k, v and o (and norms within a head), or
    gate, up and down.
    """
    if decoder.sublayers is None:
        return False
    names = decoder.modules(index, sublayer)
    if len(names) != 1:
        return False
    module = decoder.blocks[index].get_submodule(names[0])
    parts = _ATTENTION if sublayer == "attention" else _MLP
    if not all(hasattr(module, part) and is_linear(getattr(module, part)) for part in parts):
        return False
    known = {f"{part}.{key}" for part in parts for key in ("weight", "bias")}
    others = {name: parameter for name, parameter in module.named_parameters() if name not in known}
    if sublayer == "mlp":
        return not others
    head_dim = getattr(module, "head_dim", None)
    if not isinstance(head_dim, int):
        return False
    # With a gate beside the queries (Qwen3.5) a head has more rows than its output has columns.
    reading, writing = module.get_submodule("q_proj"), module.get_submodule("o_proj")
    queries, outputs = weight_of(reading).shape[0], weight_of(writing).shape[1]
    if queries != outputs or queries % head_dim:
        return False
    # A norm over the whole projection has a weight for each head; within a head, all share one.
    return all(
        name in ("q_norm.weight", "k_norm.weight") and tuple(parameter.shape) == (module.head_dim,)
        for name, parameter in others.items()
    )


@torch.no_grad()
def align(
    decoder: Decoder,
    reference: int,
    member: int,
    moments: Mapping[int, BlockMoments],
    sublayers: tuple[Sublayer, ...] = SUBLAYERS,
) -> dict[str, Order]:
    """The order of a member's heads and neurons in which its weights are nearest to a reference's.

    Nearest by what weights do to the inputs of both: with C the mean of their second moments, the sum of
    ⟨w, v⟩_C = w C vᵀ over all pairs that come to stand in one place is as large as it can be, each layer taken in
    relation to its size. For neurons that is one linear assignment. Of attention heads, whole groups that read one
    key and value head are assigned to each other, at the similarity of the best assignment of the query heads
    within them.

    Args:
        decoder: the source.
        reference: the block whose order is taken.
        member: the block to reorder.
        moments: of both blocks.
        sublayers: which to align.

    Returns:
        The new order of each layer, for `Order`; nothing for sublayers whose parts are not known.
    """
    found: dict[str, Order] = {}
    for sublayer in sublayers:
        if not (can_align(decoder, reference, sublayer) and can_align(decoder, member, sublayer)):
            continue
        pair = _Pair(decoder, reference, member, moments, sublayer)
        found |= pair.neurons() if sublayer == "mlp" else pair.heads()
    return found


class _Pair:
    """The layers of one sublayer of two blocks."""

    def __init__(
        self,
        decoder: Decoder,
        reference: int,
        member: int,
        moments: Mapping[int, BlockMoments],
        sublayer: Sublayer,
    ) -> None:
        assert decoder.sublayers is not None
        self.root = decoder.modules(member, sublayer)[0]
        self.reference: nn.Module = decoder.blocks[reference].get_submodule(self.root)
        self.member: nn.Module = decoder.blocks[member].get_submodule(self.root)
        self._metrics = {
            part: moments[reference][f"{self.root}.{part}"].second_KK + moments[member][f"{self.root}.{part}"].second_KK
            for part in (("q_proj", "k_proj", "v_proj") if sublayer == "attention" else ("gate_proj", "up_proj"))
        }

    def neurons(self) -> dict[str, Order]:
        """The order of an MLP's neurons."""
        similarity_II = self._rows("gate_proj") + self._rows("up_proj") + self._columns("down_proj")
        order_I = _assign(similarity_II)
        return {
            f"{self.root}.gate_proj": Order(rows_O=order_I),
            f"{self.root}.up_proj": Order(rows_O=order_I),
            f"{self.root}.down_proj": Order(columns_I=order_I),
        }

    def heads(self) -> dict[str, Order]:
        """The order of attention heads: query heads within groups, and groups."""
        head_dim = int(self.member.head_dim)  # type: ignore[arg-type]
        query_QQ = _within_heads(self._rows("q_proj") + self._columns("o_proj"), head_dim)
        key_value_GG = _within_heads(self._rows("k_proj") + self._rows("v_proj"), head_dim)
        num_groups = len(key_value_GG)
        size = len(query_QQ) // num_groups
        inner: dict[tuple[int, int], Tensor] = {}
        similarity_GG = key_value_GG.clone()
        for one in range(num_groups):
            for other in range(num_groups):
                block_SS = query_QQ[one * size : (one + 1) * size, other * size : (other + 1) * size]
                inner[one, other] = _assign(block_SS)
                similarity_GG[one, other] += block_SS.gather(1, inner[one, other][:, None]).sum()
        groups_G = _assign(similarity_GG)
        queries_Q = torch.cat([int(g) * size + inner[place, int(g)] for place, g in enumerate(groups_G)])
        rows_q, rows_kv = _whole_heads(queries_Q, head_dim), _whole_heads(groups_G, head_dim)
        return {
            f"{self.root}.q_proj": Order(rows_O=rows_q),
            f"{self.root}.k_proj": Order(rows_O=rows_kv),
            f"{self.root}.v_proj": Order(rows_O=rows_kv),
            f"{self.root}.o_proj": Order(columns_I=rows_q),
        }

    def _rows(self, part: str) -> Tensor:
        """⟨row of the reference, row of the member⟩ in the metric of the inputs, over the layer's size, [O, O]."""
        metric_II = self._metrics[part]
        ours, theirs = self._weights(part)
        ours_metric = ours @ metric_II
        scale = (ours_metric * ours).sum().sqrt() * ((theirs @ metric_II) * theirs).sum().sqrt()
        return ours_metric @ theirs.T / scale.clamp_min(1e-30)

    def _columns(self, part: str) -> Tensor:
        """⟨column of the reference, column of the member⟩ over the layer's size, [I, I]."""
        ours, theirs = self._weights(part)
        return ours.T @ theirs / (ours.norm() * theirs.norm()).clamp_min(1e-30)

    def _weights(self, part: str) -> tuple[Tensor, Tensor]:
        dtype = next(iter(self._metrics.values())).dtype
        return weight_of(getattr(self.reference, part)).to(dtype), weight_of(getattr(self.member, part)).to(dtype)


def _assign(similarity_RM: Tensor) -> Tensor:
    """For each row the column assigned to it, so that the sum of similarities is largest, int64."""
    _, columns = linear_sum_assignment(similarity_RM.double().cpu().numpy(), maximize=True)
    return torch.from_numpy(np.asarray(columns, dtype=np.int64))


def _within_heads(similarity_OO: Tensor, head_dim: int) -> Tensor:
    """Similarity of whole heads: dimension d of one against dimension d of the other, summed, [heads, heads].

    It is on the CPU, where heads are assigned.
    """
    num_heads = len(similarity_OO) // head_dim
    return similarity_OO.view(num_heads, head_dim, num_heads, head_dim).diagonal(dim1=1, dim2=3).sum(-1).cpu()


def _whole_heads(heads_H: Tensor, head_dim: int) -> Tensor:
    """The rows of heads in a given order."""
    return (heads_H[:, None] * head_dim + torch.arange(head_dim)).flatten()
