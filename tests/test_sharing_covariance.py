"""Second moments of the inputs of linear layers, streamed block by block."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from foldgpt.errors import UnsupportedModelError
from foldgpt.families import decoder_of
from foldgpt.replay import Replay
from foldgpt.sharing.covariance import input_moments, weighted_gram
from foldgpt.sharing.linears import linears_of, weight_of
from models import tiny_model, token_ids


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "olmo2", "stablelm-parallel"])
@torch.no_grad()
def test_moments_are_those_of_the_inputs_in_the_untouched_model(family: str) -> None:
    model = tiny_model(family).double()
    ids = token_ids(model, (3, 20))
    decoder = decoder_of(model)
    linears = linears_of(decoder, 3)
    seen: dict[str, torch.Tensor] = {}
    stream: list[torch.Tensor] = []
    block = decoder.blocks[3]
    handles = [
        block.get_submodule(linear.name).register_forward_pre_hook(
            lambda _, args, name=linear.name: seen.update({name: args[0].flatten(0, -2)})
        )
        for linear in linears
    ]
    handles.append(
        block.register_forward_hook(lambda _, a, out: stream.append(out[0] if isinstance(out, tuple) else out))
    )
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    got = dict(input_moments(Replay(model, ids, batch_size=2, boundaries=[0]), [1, 3]))
    assert sorted(got) == [1, 3]
    relative = 1 / stream[0].float().flatten(0, 1).square().mean(-1)
    for linear in linears:
        weight = relative.double() if linear.writes else torch.ones(60, dtype=torch.float64)
        inputs = seen[linear.name]
        expected = (inputs.T * weight) @ inputs / weight.sum()
        torch.testing.assert_close(got[3][linear.name].second_KK, expected, rtol=1e-5, atol=1e-8)
        assert got[3][linear.name].num_tokens == 60
        weight_OI = weight_of(block.get_submodule(linear.name))
        error = got[3][linear.name].error(weight_OI)
        outputs = inputs @ weight_OI.T
        assert error == pytest.approx(float((outputs.square().sum(-1) * weight).sum() / weight.sum()), rel=1e-5)


def test_layers_with_one_input_share_its_moments() -> None:
    model = tiny_model("llama")
    [(_, moments)] = input_moments(Replay(model, token_ids(model, (2, 10))), [2])
    assert moments["self_attn.q_proj"] is moments["self_attn.v_proj"]
    assert moments["mlp.gate_proj"] is moments["mlp.up_proj"]
    assert len({id(value) for value in moments.values()}) == 4


def test_no_block_is_held_when_the_next_is_asked_for() -> None:
    model = tiny_model("llama")
    alive = []
    stream = input_moments(Replay(model, token_ids(model, (2, 10)), boundaries=[0]), range(6))
    for _, moments in stream:
        alive.append(weakref.ref(moments["mlp.down_proj"]))
        del moments
        gc.collect()
        assert sum(reference() is not None for reference in alive) <= 1


def test_the_pass_calls_each_block_once() -> None:
    model = tiny_model("llama")
    replay = Replay(model, token_ids(model, (8, 10)), batch_size=2, boundaries=[0])
    for _ in input_moments(replay, [0, 4]):
        pass
    assert replay.num_block_calls == pytest.approx(5)
    assert len(replay.states) == 1


@torch.no_grad()
def test_the_first_boundary_alone_is_that_of_a_full_recording() -> None:
    model = tiny_model("gemma3")
    ids = token_ids(model, (5, 12))
    full, first = Replay(model, ids, batch_size=2), Replay(model, ids, batch_size=2, boundaries=[0])
    assert torch.equal(first.states[0], full.states[0])
    end = torch.cat([first.run(first.states[0][rows], range(6)) for rows in first.batches()])
    assert torch.equal(end, full.end_WTH)
    torch.testing.assert_close(first.finish(end), full.finish(full.end_WTH))


def test_the_gram_matrix_is_weighted_and_goes_over_chunks() -> None:
    inputs = torch.randn(2500, 6, dtype=torch.float64)
    weight = torch.rand(2500)
    torch.testing.assert_close(
        weighted_gram(inputs, weight), (inputs.T * weight.double()) @ inputs, rtol=1e-9, atol=1e-9
    )


def test_experts_are_refused_by_name() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(UnsupportedModelError, match="block 2"):
        linears_of(decoder_of(model), 2, ("mlp",))
