"""Causal attention by torch's fused kernel, with a backward pass of ordinary products, to be compiled.

On CPUs with AMX the kernel's backward pass is a fifth of a recovery step. Products are much faster there, and what is
between them costs little once it is compiled into a few loops. Scores are not kept, so they are made again, and a
product in bf16 rounds them; but not by much if what is made is already score − logsumexp. It is near 0 where a
probability is large, and it needs only that the queries get two more channels: minus the logsumexp, and what rounding
left of that. The same holds for the gradient of the probabilities, from which the softmax takes its mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from foldgpt.attention.calls import in_place_of_torch_s

#: Queries in a tile.
_TILE = 128
#: Longer windows go to torch's kernel: each tile is compiled by itself, holds tables of as many keys, and gains less.
_MOST_TOKENS = 1024
#: Before, the kernel took the key heads of grouped queries for as many as there are queries' heads.
_KNOWS_GROUPS = torch.__version__ >= "2.9"  # a version, which compares as one


def _serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        1 < query.shape[2] <= _MOST_TOKENS
        and query.shape[-1] == value.shape[-1]
        and (_KNOWS_GROUPS or query.shape[1] == key.shape[1])
    )


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    output: Tensor = _Products.apply(query, key, value, scaling)
    return output


products_attention = in_place_of_torch_s(_attend, _serves)


class _Products(torch.autograd.Function):
    """Shape suffixes: X batch × key heads, M a tile's queries of all heads that share a key head, T tokens, D channels.

    With two more channels: C.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, scale=scaling
        )
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.scaling = scaling
        found: Tensor = output
        return found

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        (grad,) = grad_outputs
        scaling = ctx.scaling
        heads, tokens, size = query.shape[1:]
        shared = key.shape[0] * key.shape[1]
        key_XTD, value_XTD = key.reshape(shared, tokens, size), value.reshape(shared, tokens, size)
        ones = key.new_ones(shared, tokens, 2)
        key_XCT = torch.cat([key_XTD, ones], -1).transpose(1, 2)
        value_XCT = torch.cat([value_XTD, ones], -1).transpose(1, 2)
        mean = (grad.float() * output.float()).sum(-1, keepdim=True)
        query_and = torch.cat([query, *_in_two(-logsumexp.unsqueeze(-1) / scaling)], -1)
        grad_and = torch.cat([grad, *_in_two(-mean)], -1)
        places = torch.arange(tokens, device=query.device)
        grad_query = []
        grad_key, grad_value = (torch.zeros(part.shape, device=query.device) for part in (key_XTD, value_XTD))
        for start in range(0, tokens, _TILE):
            stop = min(start + _TILE, tokens)
            many = heads * query.shape[0] // shared * (stop - start)
            query_XMC, grad_XMC = (
                part[:, :, start:stop].reshape(shared, many, size + 2) for part in (query_and, grad_and)
            )
            seen_MT = (places[start:stop, None] >= places[:stop]).repeat(many // (stop - start), 1)
            score_XMT = (query_XMC @ key_XCT[:, :, :stop]).float() * scaling
            p_XMT = torch.where(seen_MT, score_XMT.exp(), 0.0)
            score_grad_XMT = (p_XMT * (grad_XMC @ value_XCT[:, :, :stop]).float()).to(query.dtype)
            grad_query.append((score_grad_XMT @ key_XTD[:, :stop]).view(-1, heads, stop - start, size))
            # Each key gets a part from every tile behind it: summed in fp32.
            behind = (0, 0, 0, tokens - stop)
            grad_key = grad_key + pad((score_grad_XMT.transpose(1, 2) @ query_XMC[..., :size]).float(), behind)
            grad_value = grad_value + pad((p_XMT.to(grad.dtype).transpose(1, 2) @ grad_XMC[..., :size]).float(), behind)
        return (
            torch.cat(grad_query, 2) * scaling,
            (grad_key * scaling).to(key.dtype).view_as(key),
            grad_value.to(value.dtype).view_as(value),
            None,
        )


def _in_two(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values in fp32 as the sum of two in bf16.

    The first is cut off by its bits: of a number that is rounded and widened again a compiler may keep the original.
    """
    first = (values.contiguous().view(torch.int32) & -(1 << 16)).view(torch.float32)
    return first.bfloat16(), (values - first).bfloat16()
