"""Priors: corrections fitted on the source's own states, as a start for fits on few tokens.

A search fits at each cut of each set anew, and on few tokens. But the block before a cut and the block behind it say
most of what a correction has to be, whatever else is removed. That can be fitted once, on more text, in the source, and
is then the start of all fits at this cut: the ridge draws them to it instead of to the plain removal. And it can be the
fit that folding makes, of the whole output matrix, which is too dear to be made for each set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foldgpt.byte_cache import ByteCache
from foldgpt.compensation.carriers import inner_width, norm_behind
from foldgpt.compensation.compensator import MASSIVE, Compensator
from foldgpt.compensation.correction import Correction
from foldgpt.families import Decoder
from foldgpt.plan import Sublayer
from foldgpt.replay import Replay

#: What kept corrections take at most, and kept outputs of sublayers, in bytes.
CORRECTION_BYTES, OUTPUT_BYTES = 1024 * 2**20, 1536 * 2**20


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
        self._corrections = ByteCache(CORRECTION_BYTES, lambda correction: correction.map_KH.nbytes)
        self._outputs: ByteCache[tuple[int, Sublayer | None], _Outputs]
        self._outputs = ByteCache(OUTPUT_BYTES, lambda outputs: outputs.nbytes)

    @property
    def num_tokens(self) -> int:
        """Tokens that are fitted on."""
        return self._replay.ids_WT.numel()

    @property
    def forward_tokens(self) -> float:
        """Work since the recording, as a number of tokens that pass all blocks; solving is not counted."""
        return self._replay.num_block_calls / self._replay.num_blocks * self.num_tokens

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
        outputs = self._outputs_of(block, carrier, absent)
        behind_WTH = self._replay.states[block + 1] if outputs.behind_WTH is None else outputs.behind_WTH
        _, fitted = self._compensator.correct(
            block,
            behind_WTH,
            outputs.carried_WTH,
            self._replay.states[after],
            sublayer=carrier,
            inner_RI=outputs.inner_RI,
        )
        # It is multiplied with states, in their dtype.
        correction = replace(fitted, map_KH=fitted.map_KH.to(behind_WTH.dtype))
        self._corrections.put((block, after, absent), correction)
        return correction

    def _outputs_of(self, block: int, carrier: Sublayer, absent: Sublayer | None) -> _Outputs:
        known = self._outputs.get((block, absent))
        if known is None:
            inner = prior_width(self._replay.decoder, block, carrier) is not None
            stream = self._replay.split(self._replay.states[block])
            behind_WTH, carried_WTH, inner_RI = self._compensator.run(
                block, stream, sublayer=carrier, absent=absent, inner=inner
            )
            # Behind a whole block it is what was recorded there.
            known = _Outputs(None if absent is None else behind_WTH, carried_WTH, inner_RI)
            self._outputs.put((block, absent), known)
        return known

    def forget_outputs(self) -> None:
        """Drop what would make further corrections at the same blocks faster."""
        self._outputs.clear()


@dataclass(frozen=True)
class _Outputs:
    """What a fit looks at, all that a block of the source puts out.

    Attributes:
        behind_WTH: the stream behind it; None if it is the source's own.
        carried_WTH: what the sublayer that carries the correction put out.
        inner_RI: what its output matrix was given; None where the correction maps what it puts out.
    """

    behind_WTH: Tensor | None
    carried_WTH: Tensor
    inner_RI: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.behind_WTH, self.carried_WTH, self.inner_RI) if part is not None)


def prior_width(decoder: Decoder, block: int, carrier: Sublayer) -> int | None:
    """Inputs of the output matrix whose correction a prior is; None where it maps what the sublayer puts out.

    That is so where there are several such matrices, and where a norm stands behind: rounds through it take many times
    as long.

    Raises:
        UnsupportedModelError: the family's sublayers are not known.
    """
    return None if norm_behind(decoder, block, carrier) is not None else inner_width(decoder, block, carrier)
