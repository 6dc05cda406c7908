"""Replaying a model block by block gives what the model itself gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foldgpt.compensation import why_not
from foldgpt.errors import UnsupportedModelError, UsageError
from foldgpt.families import decoder_of
from foldgpt.objectives import Head
from foldgpt.replay import Replay
from models import CONFIGS, tiny_model, token_ids
from reference import skipping


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_a_removed_set_replayed_equals_skipping_its_blocks(family: str) -> None:
    model = tiny_model(family)
    ids = token_ids(model, (5, 20))
    replay, head = Replay(model, ids, batch_size=2), Head(model)
    expected = skipping(model, [1, 3])(input_ids=ids, use_cache=False).logits
    kept = [2, 4, 5]
    got = [head.logits(replay.finish(replay.run(replay.states[1][rows], kept))) for rows in replay.batches()]
    torch.testing.assert_close(torch.cat(got), expected, rtol=1e-4, atol=1e-4)
    assert replay.num_block_calls == pytest.approx(3)


@torch.no_grad()
def test_states_are_those_at_the_block_boundaries() -> None:
    model = tiny_model("gpt2")
    ids = token_ids(model, (2, 12))
    replay = Replay(model, ids)
    seen: list[torch.Tensor] = []
    handle = decoder_of(model).blocks[4].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    model(input_ids=ids)
    handle.remove()
    assert torch.equal(replay.states[4], seen[0])
    assert len(replay.states) == 7


@torch.no_grad()
@pytest.mark.parametrize("boundaries", [[], [2], [3, 6]])
def test_some_boundaries_alone_are_those_of_a_full_recording(boundaries: list[int]) -> None:
    model = tiny_model("gemma3")
    ids = token_ids(model, (5, 12))
    calls: list[int] = []
    handle = decoder_of(model).blocks[5].register_forward_pre_hook(lambda *_: calls.append(1))
    full = Replay(model, ids, batch_size=2)
    assert len(calls) == 2 * 3 - 2, "three passes, and one call more for each of the two shapes"
    calls.clear()
    some = Replay(model, ids, batch_size=2, boundaries=boundaries)
    handle.remove()
    assert set(some.states) == {0, *boundaries}
    for boundary, states in some.states.items():
        assert torch.equal(states, full.states[boundary])
    if 6 not in boundaries:
        assert len(calls) == 3, "beyond the last boundary nothing runs but once for each shape, and to check the first"


def test_a_model_that_is_not_all_in_memory_is_refused() -> None:
    model = tiny_model("llama")
    decoder_of(model).blocks[3].to("meta")
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM does not fit in the memory.*bi, angular"):
        Replay(model, torch.ones((2, 4), dtype=torch.int64))
    assert why_not(model) is None, "folding tries it out, with the whole model"


def test_gradients_flow_through_a_block() -> None:
    model = tiny_model("llama").requires_grad_(False)
    replay = Replay(model, token_ids(model))
    gate = torch.tensor(0.5, requires_grad=True)
    before = replay.states[2]
    replay.finish(before + gate * (replay.block(2, before) - before)).square().sum().backward()
    assert gate.grad is not None and gate.grad.abs() > 0


def that_reads_ids() -> Any:
    """A model whose blocks are given the token ids beside the stream."""
    model = tiny_model("llama")
    body = model.model
    forward = body.forward

    def with_ids(input_ids: torch.Tensor, **options: Any) -> Any:
        hooks = [
            block.register_forward_pre_hook(
                lambda _, args, kwargs: (args, {**kwargs, "input_ids": input_ids}), with_kwargs=True, prepend=True
            )
            for block in body.layers
        ]
        try:
            return forward(input_ids=input_ids, **options)
        finally:
            for hook in hooks:
                hook.remove()

    body.forward = with_ids
    return model


@pytest.mark.parametrize("boundaries", [None, [0], [0, 3]])
def test_blocks_that_read_more_of_the_text_than_the_stream_are_refused(boundaries: Any) -> None:
    """Their arguments differ from micro-batch to micro-batch, and a replay would use those of another one."""
    model = that_reads_ids()
    # Of one micro-batch, of two of unlike sizes, and of two alike.
    for windows in (2, 3, 4):
        with pytest.raises(UnsupportedModelError, match="more of the text than the hidden states"):
            Replay(model, token_ids(model, (windows, 8)), batch_size=2, boundaries=boundaries)


@pytest.mark.parametrize("text", [[5, 5, 5, 5], [3, 7, 7, 3], [9]])
def test_a_text_that_is_the_same_backwards_does_not_hide_them(text: list[int]) -> None:
    model = that_reads_ids()
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="more of the text than the hidden states"):
            Replay(model, torch.tensor([text]))
        with pytest.raises(UnsupportedModelError, match="more of the text than the hidden states"):
            Replay(model, torch.tensor([[1, 2, 3, 4]] * 2), batch_size=1)
    assert "more of the text than the hidden states" in str(why_not(model))


def test_a_tail_that_takes_more_than_the_stream_is_refused() -> None:
    model = tiny_model("llama")
    body, norm = model.model, model.model.norm
    # As where the final norm is given the residual beside the stream.
    body.norm.forward = lambda hidden, residual: type(norm).forward(norm, hidden)
    forward = body.forward

    def with_residual(**options: Any) -> Any:
        hook = norm.register_forward_pre_hook(lambda _, args: (args[0], args[0]))
        try:
            return forward(**options)
        finally:
            hook.remove()

    body.forward = with_residual
    with pytest.raises(UnsupportedModelError, match="cannot be replayed block by block"):
        Replay(model, token_ids(model))


def test_windows_of_another_vocabulary_are_refused() -> None:
    with pytest.raises(UsageError, match="vocabulary of 128"):
        Replay(tiny_model("llama"), torch.full((1, 4), 128))


def test_other_batch_sizes_are_refused() -> None:
    model = tiny_model("llama")
    replay = Replay(model, token_ids(model, (4, 8)), batch_size=2)
    with pytest.raises(UsageError, match=r"\[2\]"):
        replay.block(0, replay.states[0])


def test_a_model_in_training_mode_is_replayed_without_dropout() -> None:
    model = tiny_model("gpt2").train()
    assert model.config.resid_pdrop > 0
    ids = token_ids(model, (2, 12))
    replay = Replay(model, ids)
    assert not model.training
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(Head(model).logits(replay.finish(replay.end_WTH)), expected, rtol=1e-4, atol=1e-4)
