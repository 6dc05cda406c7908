"""Hidden states of a model: the last ones, and those behind some of its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foldgpt.families import decoder_of
from foldgpt.plan import FoldPlan


@dataclass(frozen=True)
class States:
    """What one forward pass leaves behind.

    Attributes:
        last_BTH: after the final norm: what the head reads.
        between: the residual stream behind the blocks that were asked for, [B, T, H] each.
    """

    last_BTH: Tensor
    between: tuple[Tensor, ...] = ()


class Body:
    """A causal language model without its head, that also tells what leaves some of its blocks.

    Args:
        model: the model.
        behind: positions of the blocks.
        entry: position of a block; what stands in front of it can be left out of a pass.
    """

    def __init__(self, model: nn.Module, behind: Sequence[int] = (), entry: int = 0) -> None:
        decoder = decoder_of(model)
        self._body = decoder.body
        self._blocks = [decoder.blocks[position] for position in behind]
        self._before = list(decoder.blocks[:entry])
        self._returns_tuple = entry > 0 and self._block_returns_tuple(model)

    @torch.no_grad()
    def _block_returns_tuple(self, model: Any) -> bool:
        kinds: list[bool] = []
        handle = self._before[0].register_forward_hook(lambda _, args, output: kinds.append(isinstance(output, tuple)))
        self._body(input_ids=torch.zeros((1, 2), dtype=torch.int64, device=model.device), use_cache=False)
        handle.remove()
        return kinds[0]

    def __call__(self, ids_BT: Tensor, positions_BT: Tensor | None = None, entry_BTH: Tensor | None = None) -> States:
        """Run the model on token ids [B, T].

        Args:
            ids_BT: token ids.
            positions_BT: places in the documents; a restart at 0 keeps the documents of a window apart.
            entry_BTH: the stream in front of the entry block, where it is known; the blocks before do not run then.
        """
        collected: dict[int, Tensor] = {}

        def collect(place: int, _: nn.Module, args: Any, output: Any) -> None:
            collected[place] = output[0] if isinstance(output, tuple) else output

        handles = [block.register_forward_hook(partial(collect, place)) for place, block in enumerate(self._blocks)]
        more = {} if positions_BT is None else {"position_ids": positions_BT}
        try:
            with nullcontext() if entry_BTH is None else self._passed_over(entry_BTH):
                output = self._body(input_ids=ids_BT, use_cache=False, **more)
        finally:
            for handle in handles:
                handle.remove()
        # Under gradient checkpointing the blocks run again in the backward pass, with the hooks gone.
        return States(output.last_hidden_state, tuple(collected[place] for place in range(len(self._blocks))))

    @contextmanager
    def _passed_over(self, entry_BTH: Tensor) -> Iterator[None]:
        """The blocks before the entry do nothing but hand on the known stream.

        They stay where they are: a model goes by their number and attributes, for masks and more.
        """
        # Some families' blocks return a tuple, of which all but the first is for those who ask for it.
        handed_on = (entry_BTH, None) if self._returns_tuple else entry_BTH

        def forward(*args: Any, **kwargs: Any) -> Any:
            return handed_on

        for block in self._before:
            block.forward = forward
        try:
            yield
        finally:
            for block in self._before:
                del block.forward


def aligned_blocks(plan: FoldPlan, where: str) -> list[tuple[int, int]]:
    """Pairs of a position in the student and the source index of the teacher's block whose output it should match.

    The stream behind a kept block is to be what the teacher's next kept block reads, so a block before a cut answers
    to the last removed one, not to itself.

    Args:
        plan: the plan.
        where: "cuts" for the kept blocks before a cut, "all" for every one.
    """
    ends = [*plan.kept[1:], plan.source.num_blocks]
    pairs = [(position, end - 1) for position, end in enumerate(ends)]
    started = {block for group in plan.groups for block in group.started_at_zero}
    lost = {*plan.removed_attention, *plan.removed_mlp, *started}
    return [
        (position, source)
        for position, source in pairs
        if where == "all" or source != plan.kept[position] or plan.kept[position] in lost
    ]
