"""Causal attention in tiles, for CPUs on which torch's fused kernel is slow: exact, with a cheaper backward pass.

Without AMX torch's fused kernel for bf16 takes a quarter of a small model's forward pass, and its backward pass
more than twice that. Here the queries go through in tiles of 64; each tile meets the keys up to its own end only, in
ordinary matrix products, and grouped-query heads share them. Scores and softmax are in fp32, as in the fused kernel.
Nothing of size tokens × tokens is kept: the backward pass makes the probabilities again. The one query of a decoding
step needs no tiles: two products are enough, and there the kernel is slowest of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from foldgpt.attention.calls import in_place_of_torch_s

#: Queries in a tile: few enough to leave out most of what is masked, enough for an efficient product.
_TILE = 64


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    output: Tensor = (_of_one if query.shape[2] == 1 else _Tiles.apply)(query, key, value, scaling)
    return output


tiled_attention = in_place_of_torch_s(_attend, lambda *_: True)


def _of_one(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention of the last token to all that are there, itself included."""
    key_XTD, value_XTE = key.flatten(0, 1), value.flatten(0, 1)
    query_XGD = query.reshape(len(key_XTD), -1, query.shape[-1])
    probability = ((query_XGD.float() * scaling) @ key_XTD.float().transpose(1, 2)).softmax(-1)
    found = probability.to(value.dtype) @ value_XTE
    return found.view(*query.shape[:3], value.shape[-1])


class _Tiles(torch.autograd.Function):
    """Shape suffixes: B batch, K key heads, G queries' heads for each, T tokens, N a tile's, D and E channels."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        output = query.new_empty(*query.shape[:3], value.shape[-1])
        value_XTE = value.flatten(0, 1)
        for rows, probability, _ in _tiles(query, key, scaling):
            found = probability.to(value.dtype).flatten(1, 2) @ value_XTE[:, : rows.stop]
            output[:, :, rows] = found.view(output[:, :, rows].shape)
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        key_XTD, value_XTE = key.flatten(0, 1), value.flatten(0, 1)
        grad_query = torch.empty_like(query)
        # Each key gets a part from every tile behind it: summed in fp32.
        grad_key = torch.zeros(key_XTD.shape, dtype=torch.float32)
        grad_value = torch.zeros(value_XTE.shape, dtype=torch.float32)
        for rows, probability, query_XMD in _tiles(query, key, ctx.scaling):
            seen = slice(0, rows.stop)
            grad_XME = grad_outputs[0][:, :, rows].reshape(len(value_XTE), -1, value.shape[-1])
            grad_value[:, seen] += probability.to(value.dtype).flatten(1, 2).transpose(1, 2) @ grad_XME
            inner = (grad_XME @ value_XTE[:, seen].transpose(1, 2)).view(probability.shape)
            score = torch._softmax_backward_data(inner.float(), probability, -1, torch.float32)
            score_XMT = score.to(key.dtype).flatten(1, 2)
            grad_query[:, :, rows] = (score_XMT @ key_XTD[:, seen]).view(grad_query[:, :, rows].shape)
            grad_key[:, seen] += score_XMT.transpose(1, 2) @ query_XMD
        return (
            grad_query.mul_(ctx.scaling),
            grad_key.mul_(ctx.scaling).to(key.dtype).view_as(key),
            grad_value.to(value.dtype).view_as(value),
            None,
        )


def _tiles(query: Tensor, key: Tensor, scaling: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each tile of queries: its places, probabilities fp32 [B K, G, N, keys], and queries [B K, G N, D]."""
    tokens, size = query.shape[2:]
    shared = key.shape[0] * key.shape[1]
    # In fp32: rounded scores of 30 are off by a tenth, and their probabilities as well.
    key_XDT = key.flatten(0, 1).float().transpose(1, 2)
    future = torch.ones(_TILE, _TILE, dtype=torch.bool).triu(1)
    for start in range(0, tokens, _TILE):
        rows = slice(start, min(start + _TILE, tokens))
        length = rows.stop - start
        query_XMD = query[:, :, rows].reshape(shared, -1, size)
        score = ((query_XMD.float() * scaling) @ key_XDT[:, :, : rows.stop]).view(shared, -1, length, rows.stop)
        score[..., start:].masked_fill_(future[:length, :length], float("-inf"))
        yield rows, score.softmax(-1), query_XMD
