"""Priors: corrections fitted on the source's own states, as a start for fits on few tokens.

A search fits at each cut of each set anew, and on few tokens. But the block before a cut and the block behind it say
most of what a correction has to be, whatever else is removed. That can be fitted once, on more text, in the source, and
is then the start of all fits at this cut: the ridge draws them to it instead of to the plain removal.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foldgpt.byte_cache import ByteCache
from foldgpt.compensation.compensator import MASSIVE, Compensator
from foldgpt.compensation.correction import Correction
from foldgpt.plan import Sublayer
from foldgpt.replay import Replay

#: What kept corrections take at most, and kept outputs of sublayers, in bytes.
_CORRECTION_BYTES, _OUTPUT_BYTES = 1024 * 2**20, 512 * 2**20


class Priors:
    """Corrections at cuts of the source, each fitted when it is first asked for.

    Args:
        replay: the source, recorded on windows of which none is measured on.

    Raises:
        UnsupportedModelError: the family cannot be compensated.
    """

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        # As in a search, whose fits leave massive tokens alone.
        self._compensator = Compensator(replay, spared=MASSIVE)
        self._corrections: ByteCache[tuple[int, int, Sublayer | None], Correction]
        self._corrections = ByteCache(_CORRECTION_BYTES, lambda correction: correction.map_KH.nbytes)
        self._outputs: ByteCache[tuple[int, Sublayer | None], tuple[Tensor, Tensor]]
        self._outputs = ByteCache(_OUTPUT_BYTES, lambda outputs: sum(output.nbytes for output in outputs))

    @property
    def num_tokens(self) -> int:
        """Tokens that are fitted on."""
        return self._replay.ids_WT.numel()

    @property
    def forward_tokens(self) -> float:
        """Work so far, as a number of tokens that pass all blocks, the recording included; solving is not counted."""
        return (1 + self._replay.num_block_calls / self._replay.num_blocks) * self.num_tokens

    @torch.no_grad()
    def of(self, block: int, after: int, absent: Sublayer | None = None) -> Correction:
        """The correction of a block that makes up for the blocks between it and another, in the source otherwise whole.

        Args:
            block: source index of the block that carries it.
            after: the boundary where the next kept block begins.
            absent: a sublayer that the block itself loses.

        Raises:
            NotFiniteError: the source's states are not finite.
            UnsupportedModelError: the family cannot be compensated.
        """
        known = self._corrections.get((block, after, absent))
        if known is not None:
            return known
        carrier: Sublayer = "attention" if absent == "mlp" else "mlp"
        output_WTH, carried_WTH = self._outputs_of(block, carrier, absent)
        target_WTH = self._replay.states[after]
        _, fitted = self._compensator.correct(block, output_WTH, carried_WTH, target_WTH, sublayer=carrier)
        # It is multiplied with states, in their dtype.
        correction = replace(fitted, map_KH=fitted.map_KH.to(carried_WTH.dtype))
        self._corrections.put((block, after, absent), correction)
        return correction

    def _outputs_of(self, block: int, carrier: Sublayer, absent: Sublayer | None) -> tuple[Tensor, Tensor]:
        """The stream behind a block of the source, and what the sublayer that carries the correction put out."""
        known = self._outputs.get((block, absent))
        if known is None:
            stream = self._replay.split(self._replay.states[block])
            known = self._compensator.run(block, stream, sublayer=carrier, absent=absent)[:2]
            self._outputs.put((block, absent), known)
        return known

    def forget_outputs(self) -> None:
        """Drop what would make further corrections at the same blocks faster."""
        self._outputs.clear()


def bytes_kept(num_blocks: int, hidden_size: int, num_tokens: int, item_size: int) -> int:
    """What priors keep at most, beside the source's states.

    Args:
        num_blocks: blocks of the source.
        hidden_size: width of its stream.
        num_tokens: that are fitted on.
        item_size: bytes of one number of its states.
    """
    cuts = num_blocks * (num_blocks + 1) // 2
    corrections = min(_CORRECTION_BYTES, cuts * hidden_size**2 * item_size)
    return corrections + min(_OUTPUT_BYTES, 2 * num_blocks * num_tokens * hidden_size * item_size)
