"""Hidden states of a model: the last ones, and those behind some of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    """

    def __init__(self, model: nn.Module, behind: Sequence[int] = ()) -> None:
        decoder = decoder_of(model)
        self._body = model.get_submodule(decoder.blocks_path.rpartition(".")[0])
        self._blocks = [decoder.blocks[position] for position in behind]

    def __call__(self, ids_BT: Tensor, positions_BT: Tensor | None = None) -> States:
        """Run the model on token ids [B, T].

        Args:
            ids_BT: token ids.
            positions_BT: places in the documents; a restart at 0 keeps the documents of a window apart.
        """
        collected: list[Tensor] = []

        def collect(_: nn.Module, args: Any, output: Any) -> None:
            collected.append(output[0] if isinstance(output, tuple) else output)

        handles = [block.register_forward_hook(collect) for block in self._blocks]
        more = {} if positions_BT is None else {"position_ids": positions_BT}
        try:
            output = self._body(input_ids=ids_BT, use_cache=False, **more)
        finally:
            for handle in handles:
                handle.remove()
        # Under gradient checkpointing the blocks run again in the backward pass, with the hooks gone.
        return States(output.last_hidden_state, tuple(collected))


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
    lost = {*plan.removed_attention, *plan.removed_mlp}
    return [
        (position, source)
        for position, source in pairs
        if where == "all" or source != plan.kept[position] or plan.kept[position] in lost
    ]
