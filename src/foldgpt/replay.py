"""Replay: run the blocks of a model one by one, each on any hidden state.

A search over blocks to remove asks the same question hundreds of times: what comes out at the end if the
stream passes only some of the blocks, from some depth on? `Replay` records, in one pass of the untouched
model, the residual stream at every block boundary and what else each block is called with (masks, rotary
embeddings). After that any block can be called on any state of the same shape, so that a question is answered
from the first block that it changes, and two questions share what they have in common.

Nothing here knows an architecture: what each block and what comes after the last one is called with is
observed, and the replay of the untouched model must give its own hidden states back, or the model is refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from foldgpt.errors import FoldGPTError, UnsupportedModelError, UsageError
from foldgpt.families import Decoder, Sublayers, decoder_of
from foldgpt.modeling.modeling_foldgpt import Absent
from foldgpt.plan import Sublayer

#: Models whose blocks were seen to be called alike on two texts, so that it need not be looked at again.
_SEEN_ON_TWO_TEXTS: WeakSet[nn.Module] = WeakSet()


class Replay:
    """The untouched model's states on some windows, and its blocks ready to be called one by one.

    Shape suffixes: W windows, B windows of a micro-batch, T tokens of a window, H hidden size, V vocabulary.

    Args:
        model: a causal language model, in memory.
        ids_WT: token ids, int64, without padding.
        batch_size: windows per micro-batch; by default about 2,048 tokens.
        boundaries: where the residual stream is recorded, beside what enters block 0; by default everywhere. Beyond
            the last of them the untouched model runs on the first micro-batch only, or, where that is all there is, the
            first time once more.

    The model is put into evaluation mode.

    Attributes:
        states: the residual stream h_0 … h_N at the recorded block boundaries, [W, T, H] each, in the model's dtype;
            h_N leaves the last block, before the final norm.
        num_block_calls: block calls so far, in calls on all W windows: N of them are one forward pass.

    Raises:
        UsageError: the windows are not [W, T] or hold ids outside the vocabulary.
        UnsupportedModelError: the model is not all in memory, or replaying it does not give its own output.
    """

    def __init__(
        self,
        model: nn.Module,
        ids_WT: Tensor,
        *,
        batch_size: int | None = None,
        boundaries: Collection[int] | None = None,
    ) -> None:
        self.decoder: Decoder = decoder_of(model)
        if any(parameter.is_meta for parameter in model.parameters()):
            # Products with weights on "meta" give numbers that mean nothing, without an error.
            raise UnsupportedModelError(
                f"{type(model).__name__} does not fit in the memory that is free (or allowed by max_memory_gb), so "
                "removed and shared blocks cannot be measured. The selectors bi, angular, last and random need less."
            )
        if ids_WT.ndim != 2 or 0 in ids_WT.shape:
            raise UsageError(f"windows must be token ids of shape [windows, tokens], got {list(ids_WT.shape)}.")
        vocabulary = self.decoder.config.vocab_size
        if int(ids_WT.max()) >= vocabulary or int(ids_WT.min()) < 0:
            raise UsageError(
                f"the windows hold ids outside the model's vocabulary of {vocabulary:,}. "
                "Was the text tokenized for another model?"
            )
        self.model = model.eval()
        self.ids_WT = ids_WT
        self.batch_size = max(1, 2048 // ids_WT.shape[1]) if batch_size is None else batch_size
        self.num_block_calls = 0.0
        self._boundaries = {0, *(range(self.num_blocks + 1) if boundaries is None else boundaries)}
        self._body = self.decoder.body
        self._arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._tail: list[nn.Module] = []
        self.states: dict[int, Tensor] = self._record()

    @property
    def num_blocks(self) -> int:
        """Blocks of the model."""
        return len(self.decoder.blocks)

    @property
    def num_windows(self) -> int:
        """Windows that were recorded."""
        return len(self.ids_WT)

    @property
    def end_WTH(self) -> Tensor:
        """h_N, which leaves the last block; it must have been recorded."""
        return self.states[self.num_blocks]

    def batches(self) -> Iterator[slice]:
        """The windows of each micro-batch."""
        for start in range(0, self.num_windows, self.batch_size):
            yield slice(start, min(start + self.batch_size, self.num_windows))

    def split(self, stream_WTH: Tensor) -> list[Tensor]:
        """A stream of all windows as its micro-batches."""
        return [stream_WTH[rows] for rows in self.batches()]

    def block(self, index: int, hidden_BTH: Tensor, *, without: Sublayer | None = None) -> Tensor:
        """What block `index` makes of a residual stream [B, T, H]; gradients flow if they are enabled.

        Args:
            index: source index of the block.
            hidden_BTH: the stream that enters it.
            without: a sublayer that contributes nothing, as in a model folded without it.

        Raises:
            UsageError: B is not the size of a recorded micro-batch.
            UnsupportedModelError: `without` is asked for, and the family's sublayers are not known.
        """
        args, kwargs = self._arguments_for(len(hidden_BTH))[index]
        self.num_block_calls += len(hidden_BTH) / self.num_windows
        if without is None:
            return _tensor_of(self.decoder.blocks[index](hidden_BTH, *args, **kwargs))
        with self._without(index, without) as block:
            return _tensor_of(block(hidden_BTH, *args, **kwargs))

    def run(self, hidden_BTH: Tensor, blocks: Sequence[int]) -> Tensor:
        """Pass a stream [B, T, H] through the given blocks in order."""
        for index in blocks:
            hidden_BTH = self.block(index, hidden_BTH)
        return hidden_BTH

    def finish(self, hidden_BTH: Tensor) -> Tensor:
        """What the model does after its last block, up to the head's input (the final norm, usually)."""
        for module in self._tail:
            hidden_BTH = module(hidden_BTH)
        return hidden_BTH

    @contextmanager
    def _without(self, index: int, sublayer: Sublayer) -> Iterator[nn.Module]:
        """The block while one sublayer is out of it, with the norms that serve it alone (as `fold_` does it)."""
        block, norms = self.decoder.blocks[index], self._sublayers.norms(sublayer)
        attention = sublayer == "attention"
        *before, output = self.decoder.modules(index, sublayer)
        originals = {name: block.get_submodule(name) for name in (*before, output, *norms)}
        try:
            for name in originals:
                block.set_submodule(name, Absent(returns_pair=attention) if name == output else nn.Identity())
            yield block
        finally:
            for name, module in originals.items():
                block.set_submodule(name, module)

    @property
    def _sublayers(self) -> Sublayers:
        if self.decoder.sublayers is None:
            raise UnsupportedModelError(
                f"the sublayers of model type {self.decoder.model_type!r} are not known (with this config), so nothing "
                "can be measured of attention and MLP apart. Add a row to foldgpt/families/table.py."
            )
        return self.decoder.sublayers

    @torch.no_grad()
    def _record(self) -> dict[int, Tensor]:
        states: dict[int, list[Tensor]] = {boundary: [] for boundary in sorted(self._boundaries)}
        deepest = max(states)
        blocks = self.decoder.blocks
        for windows in self.batches():
            seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
            tail: list[nn.Module] = []
            last: list[Tensor] = []
            size = windows.stop - windows.start
            # What blocks are called with depends on the micro-batch's shape alone.
            known = self._arguments.get(size)

            def before(
                _: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                seen: list[Any] = seen,
                known: list[Any] | None = known,
            ) -> None:
                boundary = len(seen)
                if boundary in states:
                    # Copied: some families update their tensors in place.
                    states[boundary].append((args[0] if args else kwargs["hidden_states"]).clone())
                beside = _beside_stream(args, kwargs)
                if known is not None and not _same(known[boundary], beside):
                    raise self._called_with_text()
                seen.append(beside)
                if known is not None and boundary == deepest:
                    raise _Stop

            def after_last(_: nn.Module, args: Any, output: Any, last: list[Tensor] = last) -> None:
                last.append(_tensor_of(output).clone())

            def in_tail(module: nn.Module, args: Any, tail: list[Any] = tail, last: list[Tensor] = last) -> None:
                if last:
                    tail.append(module)

            others = [child for child in self._body.children() if child is not blocks]
            handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
            handles.append(blocks[-1].register_forward_hook(after_last))
            handles += [child.register_forward_pre_hook(in_tail) for child in others]
            try:
                output = self._body(input_ids=self.ids_WT[windows].to(self._device), use_cache=False)
            except _Stop:
                continue
            finally:
                for handle in handles:
                    handle.remove()
            if self.num_blocks in states:
                states[self.num_blocks] += last
            self._tail = tail
            self._arguments[size] = seen
            if windows.start == 0:
                self._check(states, output.last_hidden_state)
        if self.model not in _SEEN_ON_TWO_TEXTS:
            first_BT, *other_texts = [self.ids_WT[windows] for windows in self.batches()]
            if all(ids_BT.shape != first_BT.shape or torch.equal(ids_BT, first_BT) for ids_BT in other_texts):
                # No two different micro-batches of one size were compared.
                self._check_other_text(self.ids_WT[: self.batch_size])
            _SEEN_ON_TWO_TEXTS.add(self.model)
        # Let go one by one: all parts beside all that is made of them would take twice the memory.
        return {boundary: torch.cat(states.pop(boundary)) for boundary in sorted(states)}

    def _check(self, states: Mapping[int, list[Tensor]], last_BTH: Tensor) -> None:
        try:
            replayed = self.finish(self.run(states[0][0], range(self.num_blocks)))
        except TypeError:
            # What follows the last block takes more than its output.
            raise self._cannot_replay() from None
        self.num_block_calls = 0.0
        largest = float(last_BTH.abs().max())
        if not math.isfinite(largest):
            for name, parameter in self.model.named_parameters():
                if not bool(parameter.isfinite().all()):
                    raise FoldGPTError(f"{name} holds values that are not finite; the weights may be damaged")
            raise FoldGPTError("the model's own predictions are not finite; load it in float32 or bfloat16 (--dtype)")
        if not torch.allclose(replayed.float(), last_BTH.float(), rtol=1e-3, atol=1e-3 * largest):
            raise self._cannot_replay()

    def _check_other_text(self, ids_BT: Tensor) -> None:
        """Refuse blocks that are called with anything else when the text is another one than this.

        It is read backwards; a text that stays the same is one of other tokens.
        """
        known = iter(self._arguments[len(ids_BT)])
        backwards_BT = ids_BT.flip(-1)
        is_same = torch.equal(backwards_BT, ids_BT)
        other_BT = (ids_BT + 1) % self.decoder.config.vocab_size if is_same else backwards_BT
        blocks = self.decoder.blocks

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not _same(next(known), _beside_stream(args, kwargs)):
                raise self._called_with_text()
            if block is blocks[-1]:
                raise _Stop

        handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
        try:
            self._body(input_ids=other_BT.to(self._device), use_cache=False)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def _called_with_text(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"the blocks of {type(self.model).__name__} are called with more of the text than the hidden states, so "
            "they cannot be replayed; searches that measure removed blocks are not possible for it. BI, angular and "
            "last still are."
        )

    def _cannot_replay(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"what {type(self.model).__name__} does between its blocks cannot be replayed block by block; "
            "searches that measure removed blocks are not possible for it. BI, angular and last still are."
        )

    def _arguments_for(self, num_windows: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        if num_windows not in self._arguments:
            raise UsageError(
                f"micro-batches of {num_windows} windows were not recorded; use those of `batches` "
                f"({sorted(self._arguments)})"
            )
        return self._arguments[num_windows]

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        return device


class _Stop(Exception):
    """Ends a pass of the body where no more of it is needed."""


def _beside_stream(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a block is called with beside the hidden states."""
    return args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _tensor_of(output: Any) -> Tensor:
    """A block's or sublayer's hidden states; some return them alone, some first in a tuple."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _same(one: Any, other: Any) -> bool:
    """Whether tensors that blocks were called with are the same, in whatever they are packed."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return isinstance(other, (list, tuple)) and len(one) == len(other) and all(map(_same, one, other))
    return True
