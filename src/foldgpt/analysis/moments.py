"""Sums over tokens from which every measure is made.

Cosines near 1 are the interesting ones, and there `1 - cos` loses all its digits in fp32. Between
neighbours the distance is therefore made from the directions u = a / ‖a‖ and v = b / ‖b‖, without that
cancellation, and the length of the update from the distance:

    1 − cos(a, b) = ‖v − u‖² / 2        ‖b − a‖² = (‖b‖ − ‖a‖)² + 2 ‖a‖ ‖b‖ (1 − cos(a, b))

Angles are 2·asin(√((1 − cos) / 2)), which is arccos(cos) without its loss near 1. Pairs further apart come
from one fp32 Gram matrix of the directions per token, right to about 1e-7. Tokens are added up in fp64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# A state of exactly zero has no direction: its cosine with anything counts as 0 and its relative update as 0.
_SMALLEST_NORM = 1e-12

Directed = tuple[Tensor, Tensor]  # directions and norms


class Moments:
    """Sums of the measures over the tokens seen so far. All tensors are fp64 on the CPU.

    Args:
        num_blocks: N.
        sublayers: "sequential" or "parallel" when attention and MLP are measured apart, None when not.
    """

    def __init__(self, num_blocks: int, sublayers: str | None) -> None:
        self.num_blocks = num_blocks
        self.sublayers = sublayers
        self.num_tokens = 0
        self.num_windows = 0
        pairs = (num_blocks + 1, num_blocks + 1)
        self.sums = {
            "distance": torch.zeros(pairs, dtype=torch.float64),
            "angle": torch.zeros(pairs, dtype=torch.float64),
            "angle_last_token": torch.zeros(pairs, dtype=torch.float64),
            "relative_update": torch.zeros(num_blocks, dtype=torch.float64),
        }
        if sublayers is not None:
            for name in ("attention", "mlp"):
                self.sums[f"{name}_distance"] = torch.zeros(num_blocks, dtype=torch.float64)
                self.sums[f"{name}_relative_update"] = torch.zeros(num_blocks, dtype=torch.float64)

    def add_tokens(self, states: Tensor) -> Tensor:
        """Add all measures of some tokens.

        Args:
            states: [tokens, slots, hidden], any float dtype. Slots are h_0 … h_N; with sublayers measured
                they alternate, h_0, s_0, h_1, …, s_{N-1}, h_N, where s_i is the stream between attention
                and MLP ("sequential") or the attention's output ("parallel").

        Returns:
            bool [N + 1]: which of h_0 … h_N are finite. Nothing was added unless all are.
        """
        states = states.float()
        direction, norm = _direction(states)
        if self.sublayers is None:
            h, h_norm = direction, norm
        else:
            h, h_norm = direction[:, ::2], norm[:, ::2]
        finite = h_norm.isfinite().all(0)
        if not finite.all():
            return finite
        before, after = (h[:, :-1], h_norm[:, :-1]), (h[:, 1:], h_norm[:, 1:])
        block_distance, relative_update = _compare(before, after)
        distance, angle = _distance_and_angle(h, block_distance)
        self._add("distance", distance)
        self._add("angle", angle)
        self._add("relative_update", relative_update)
        if self.sublayers == "sequential":
            between = direction[:, 1::2], norm[:, 1::2]
            self._add_sublayer("attention", before, between)
            self._add_sublayer("mlp", between, after)
        elif self.sublayers == "parallel":
            block_input, attention_output, block_output = states[:, :-1:2], states[:, 1::2], states[:, 2::2]
            self._add_sublayer("attention", before, _direction(block_input + attention_output))
            self._add_sublayer("mlp", before, _direction(block_output - attention_output))
        self.num_tokens += len(states)
        return finite

    def add_last_tokens(self, states: Tensor) -> None:
        """Add the angles of the last token of each window; these must be part of `add_tokens` too.

        Args:
            states: [windows, slots, hidden], as in `add_tokens`, finite.
        """
        h, norm = _direction(states if self.sublayers is None else states[:, ::2])
        block_distance, _ = _compare((h[:, :-1], norm[:, :-1]), (h[:, 1:], norm[:, 1:]))
        self._add("angle_last_token", _distance_and_angle(h, block_distance)[1])
        self.num_windows += len(states)

    def _add_sublayer(self, name: str, before: Directed, after: Directed) -> None:
        distance, relative_update = _compare(before, after)
        self._add(f"{name}_distance", distance)
        self._add(f"{name}_relative_update", relative_update)

    def _add(self, name: str, per_token: Tensor) -> None:
        self.sums[name] += per_token.sum(0).to("cpu", torch.float64)

    def means(self) -> dict[str, Tensor]:
        """Each sum divided by its number of tokens; pairwise ones are made symmetric."""
        means = {}
        for name, total in self.sums.items():
            mean = total / (self.num_windows if name == "angle_last_token" else self.num_tokens)
            if mean.ndim == 2:
                mean = mean.triu(1) + mean.triu(1).T
            means[name] = mean
        return means

    def to_json_dict(self) -> dict[str, Any]:
        """Everything needed to go on later, without loss."""
        return {
            "num_tokens": self.num_tokens,
            "num_windows": self.num_windows,
            "sums": {name: total.tolist() for name, total in self.sums.items()},
        }

    def load_json_dict_(self, value: dict[str, Any]) -> None:
        """Take over sums that `to_json_dict` wrote for a model of the same shape.

        Raises:
            KeyError, TypeError, ValueError: the value is something else.
        """
        sums = {name: torch.tensor(value["sums"][name], dtype=torch.float64) for name in self.sums}
        for name, total in sums.items():
            if total.shape != self.sums[name].shape:
                raise ValueError(f"{name} has shape {tuple(total.shape)}")
        self.num_tokens, self.num_windows = int(value["num_tokens"]), int(value["num_windows"])
        self.sums = sums


def _direction(states: Tensor) -> Directed:
    """States of any float dtype as directions of length 1, [..., hidden], and norms, [...], in fp32."""
    states = states.float()
    norm = torch.linalg.vector_norm(states, dim=-1)
    return states * norm.clamp_min(_SMALLEST_NORM).reciprocal().unsqueeze(-1), norm


def _compare(before: Directed, after: Directed) -> tuple[Tensor, Tensor]:
    """1 − cos and ‖after − before‖ / ‖before‖ of two [tokens, blocks, hidden] states, [tokens, blocks] each."""
    (before_direction, before_norm), (after_direction, after_norm) = before, after
    product = before_norm * after_norm
    distance = torch.linalg.vector_norm(after_direction - before_direction, dim=-1).square() / 2
    distance = torch.where(product > 0, distance, 1.0)
    update = ((after_norm - before_norm).square() + 2 * product * distance).sqrt()
    return distance, torch.where(before_norm > 0, update / before_norm, 0.0)


def _distance_and_angle(h: Tensor, block_distance: Tensor) -> tuple[Tensor, Tensor]:
    """1 − cos and arccos(cos) / π, [tokens, N + 1, N + 1] each; only entries i < j mean anything.

    Args:
        h: directions at the block boundaries, [tokens, N + 1, hidden].
        block_distance: 1 − cos across each block, [tokens, N], more exact than the Gram matrix.
    """
    distance = torch.bmm(h, h.transpose(1, 2)).neg_().add_(1).clamp_(0, 2)
    distance.diagonal(1, dim1=1, dim2=2).copy_(block_distance)
    angle = (distance * 0.5).clamp_(max=1).sqrt_().asin_().mul_(2 / math.pi)
    return distance, angle
