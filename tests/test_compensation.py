"""Compensation: what is fitted is what the merged and folded model computes, and it does what it promises."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from compensation_case import correction
from foldgpt.compensation import Compensator, Correction, compensate, merge_
from foldgpt.errors import UnsupportedModelError
from foldgpt.families import decoder_of
from foldgpt.families.norms import effective_scale, weight_for
from foldgpt.folding import fold_, save_folded, source_model_of
from foldgpt.folding.kinds import scale_leaves
from foldgpt.objectives import Head, forward_kl
from foldgpt.plan import FoldPlan
from foldgpt.replay import Replay
from models import CONFIGS, tiny_model, token_ids
from reference import blocks_of


def folded(model: Any, plan: FoldPlan, corrections: dict[int, Correction]) -> Any:
    """A merged and folded copy."""
    model = copy.deepcopy(model)
    merge_(model, corrections)
    fold_(model, plan)
    return model


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("features", ["inner", "output"])
@pytest.mark.parametrize(
    "removal",
    [
        {"removed": [2, 4]},
        {"removed": [1, 2, 5]},
        {"removed": [3], "removed_mlp": [1], "removed_attention": [4]},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_corrected_stream_is_that_of_the_merged_and_folded_model(
    family: str, removal: dict[str, list[int]], features: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    ids = token_ids(model, (6, 30))
    plan = FoldPlan.create(source_model_of(model), **removal)
    streams: dict[int, torch.Tensor] = {}
    correct = Compensator.correct

    def recorded(self: Compensator, block: int, *args: Any, **kwargs: Any) -> Any:
        corrected, found = correct(self, block, *args, **kwargs)
        streams[block] = corrected
        return corrected, found

    monkeypatch.setattr(Compensator, "correct", recorded)
    corrections = compensate(model, plan, ids, features=features)
    small = folded(model, plan, corrections)
    seen: dict[int, torch.Tensor] = {}
    for block in corrections:

        def record(_module: Any, _args: Any, output: Any, block: int = block) -> None:
            seen[block] = (output[0] if isinstance(output, tuple) else output).clone()

        decoder_of(small).blocks[plan.position_of[block]].register_forward_hook(record)
    small(input_ids=ids)
    expected = {1, 3} if removal["removed"] == [2, 4] else {0, 4} if "removed_mlp" not in removal else {1, 2, 4}
    assert set(seen) == expected
    for block, stream in streams.items():
        assert not torch.allclose(stream, Replay(model, ids).states[block + 1], atol=1e-3), "nothing was corrected"
        torch.testing.assert_close(seen[block], stream, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma3", "olmo2", "opt", "qwen3_moe", "granite"])
@torch.no_grad()
def test_held_out_windows_come_nearer_to_the_source(family: str) -> None:
    model = tiny_model(family)
    # Small blocks, as in a trained model: removing one is a small change.
    for block in blocks_of(model)[2:4]:
        for parameter in block.parameters():
            parameter.mul_(0.5)
    fit_on, judged_on = token_ids(model, (40, 30), seed=1), token_ids(model, (8, 30), seed=2)
    plan = FoldPlan.create(source_model_of(model), removed=[2, 3])
    expected = Replay(model, judged_on).states[4]
    plain = Replay(model, judged_on).states[2]
    corrections = compensate(model, plan, fit_on)
    merged = copy.deepcopy(model)
    merge_(merged, corrections)
    corrected = Replay(merged, judged_on).states[2]
    report = corrections[1].report

    def relative_error(stream: torch.Tensor) -> float:
        return float(((stream - expected).square().sum(-1) / expected.square().sum(-1)).mean())

    assert relative_error(corrected) < 0.98 * relative_error(plain)
    # The report's held-out error is an honest forecast for other windows.
    assert report.before == pytest.approx(relative_error(plain), rel=0.15)
    assert report.after == pytest.approx(relative_error(corrected), rel=0.25)
    assert report.fitted <= report.after * 1.05


@torch.no_grad()
def test_a_block_that_is_linear_in_its_predecessors_mlp_can_be_removed_without_loss() -> None:
    model = tiny_model("opt")
    decoder = decoder_of(model)
    ids = token_ids(model, (8, 30))
    # A block that adds A M, with M what the MLP before it put out.
    matrix = torch.randn(32, 32) * 0.3
    last: list[torch.Tensor] = []
    decoder.blocks[2].fc2.register_forward_hook(lambda _module, _args, output: last.append(output))
    decoder.blocks[3].forward = lambda hidden, *args, **kwargs: hidden + (last[-1] @ matrix).view(hidden.shape)
    expected = model(input_ids=ids).logits
    plan = FoldPlan.create(source_model_of(model), removed=[3])
    corrections = compensate(model, plan, ids, ridge=0.0)
    decoder.blocks[2].fc2._forward_hooks.clear()
    torch.testing.assert_close(folded(model, plan, corrections)(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_fewer_tokens_than_channels_do_no_harm(family: str) -> None:
    model = tiny_model(family)
    ids = token_ids(model, (1, 20))
    for ridge in (0.0, "auto"):
        corrections = compensate(model, [2], ids, ridge=ridge)  # type: ignore[arg-type]
        assert corrections[1].map_KH.isfinite().all()
    # Too few to learn from: the held-out tokens choose a strong ridge, and so a small change.
    report = corrections[1].report
    assert report.tokens == 20
    assert report.after < 1.3 * report.before
    assert report.ridge >= 0.1


@torch.no_grad()
def test_a_cut_at_the_first_block_has_nothing_to_carry_it() -> None:
    model = tiny_model("llama")
    ids = token_ids(model, (4, 20))
    assert compensate(model, [0, 1], ids) == {}
    corrections = compensate(model, [0, 4], ids)
    assert list(corrections) == [3]
    # The carrier saw the student's stream, which began at block 1 with the embeddings.
    replay = Replay(model, ids)
    stream = torch.cat([replay.run(replay.states[0][rows], [1, 2]) for rows in replay.batches()])
    compensator = Compensator(replay)
    inner: list[torch.Tensor] = []
    output, mlp, inner = compensator.run(3, replay.split(stream), inner=True)
    expected = compensator.correct(3, output, mlp, replay.states[5], inner_RI=inner)[1]
    torch.testing.assert_close(corrections[3].map_KH, expected.map_KH)


@torch.no_grad()
def test_a_cut_at_the_end_aims_at_what_leaves_the_last_block() -> None:
    model = tiny_model("llama")
    ids = token_ids(model, (8, 30))
    replay = Replay(model, ids)
    corrections = compensate(model, [4, 5], ids, replay=replay, ridge=0.1, features="output")
    compensator = Compensator(replay, ridge=0.1)
    output, mlp, _ = compensator.run(3, replay.split(replay.states[3]))
    _, expected = compensator.correct(3, output, mlp, replay.states[6])
    assert list(corrections) == [3]
    torch.testing.assert_close(corrections[3].map_KH, expected.map_KH)


@torch.no_grad()
def test_only_the_carriers_matrices_change_and_the_source_does_not() -> None:
    model = tiny_model("gpt2")
    before = copy.deepcopy(model.state_dict())
    corrections = compensate(model, [2, 4], token_ids(model, (4, 20)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merge_(model, corrections)
    after = model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {f"transformer.h.{i}.mlp.c_proj.{p}" for i in (1, 3) for p in ("weight", "bias")}
    assert all(after[name].shape == value.shape and after[name].dtype == value.dtype for name, value in before.items())


@torch.no_grad()
def test_a_matrix_of_a_class_derived_from_conv1d_is_corrected_along_its_outputs() -> None:
    model = tiny_model("gpt2")

    class Derived(Conv1D):
        pass

    expected = copy.deepcopy(model)
    blocks_of(model)[1].mlp.c_proj.__class__ = Derived
    ids = token_ids(model, (4, 20))
    for changed in (model, expected):
        merge_(changed, compensate(changed, [2], ids))
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["quantised", "offloaded"])
def test_c1_what_is_no_plain_matrix_in_memory_is_not_corrected(kind: str) -> None:
    """Field note C1: corrections are merged into full-precision weights, and quantised last."""
    model = tiny_model("llama")
    down = blocks_of(model)[1].mlp.down_proj
    weight = (down.weight * 100).to(torch.int8) if kind == "quantised" else down.weight.to("meta")
    down.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"mlp of block 1 .* is offloaded or quantised; correct the plain"):
        merge_(model, {1: correction(block=1)})


@torch.no_grad()
def test_a_matrix_that_is_not_there_by_its_name_is_refused() -> None:
    model = tiny_model("llama")
    mlp = blocks_of(model)[1].mlp

    class Packed(torch.nn.Module):
        def __init__(self, plain: torch.nn.Linear) -> None:
            super().__init__()
            self.packed = torch.nn.Parameter(plain.weight.detach().clone())

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(rows, self.packed)

    mlp.down_proj = Packed(mlp.down_proj)
    with pytest.raises(UnsupportedModelError, match=r"mlp of block 1 .* has no output matrix of a known name"):
        compensate(model, [2], token_ids(model, (4, 20)))
    with pytest.raises(UnsupportedModelError, match=r"mlp of block 1 .* ends in no matrix of a known name"):
        scale_leaves(decoder_of(model), 1, ("mlp",))


@torch.no_grad()
def test_a_merge_is_made_in_fp32_and_cast_once() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    weight = blocks_of(model)[2].mlp.down_proj.weight
    before = weight.float()
    change = correction()
    merge_(model, {2: change})
    exact = ((torch.eye(32) + change.map_KH).T.double() @ before.double()).to(torch.bfloat16)
    assert weight.dtype == torch.bfloat16
    # A product in bf16 would differ in most places; rounding ties may differ in a few.
    assert (weight != exact).float().mean() < 0.01


@torch.no_grad()
def test_a_merge_into_a_model_in_fp64_is_exact() -> None:
    model = tiny_model("gpt_neox").double()
    block = blocks_of(model)[2]
    rows = torch.randn(5, 32, dtype=torch.float64)
    before = block.mlp(rows)
    change = correction(bias_H=torch.randn(32))
    merge_(model, {2: change})
    expected = before + before @ change.map_KH.double() + change.bias_H.double()  # type: ignore[union-attr]
    torch.testing.assert_close(block.mlp(rows), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_a_corrected_model_saves_and_loads_like_any_other(family: str, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model(family)
    ids = token_ids(model, (4, 20))
    plan = FoldPlan.create(source_model_of(model), removed=[2, 4])
    small = folded(model, plan, compensate(model, plan, ids))
    save_folded(small, plan, tmp_path / "folded")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded(input_ids=ids).logits, small(input_ids=ids).logits)


# ------------------------------------------------------------------------------------------- through a norm


@pytest.mark.parametrize("family", ["gemma3", "olmo2"])
def test_scales_are_the_multipliers_of_either_kind_of_norm(family: str) -> None:
    norm = blocks_of(tiny_model(family))[0].post_feedforward_layernorm
    scale = effective_scale(norm)
    torch.testing.assert_close(scale, norm.weight.detach() + (1 if family == "gemma3" else 0))
    torch.testing.assert_close(weight_for(norm, scale), norm.weight.detach())


def test_another_norm_behind_a_sublayer_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="LayerNorm"):
        effective_scale(torch.nn.LayerNorm(8))


# ------------------------------------------------------------------------------------------- least squares


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_refitting_the_matrix_gives_more_than_mapping_its_output(family: str) -> None:
    model = tiny_model(family)
    ids = token_ids(model, (40, 30))
    mapped = compensate(model, [2, 3], ids, features="output")[1]
    refitted = compensate(model, [2, 3], ids)[1]
    assert (mapped.map_KH.shape, refitted.map_KH.shape) == ((32, 32), (48, 32))
    assert refitted.report.after < mapped.report.after


@torch.no_grad()
def test_a_mixture_of_experts_is_mapped() -> None:
    model = tiny_model("qwen3_moe")  # block 1 is dense, block 3 a mixture
    corrections = compensate(model, [2, 4], token_ids(model, (8, 30)))
    assert {index: found.features for index, found in corrections.items()} == {1: "inner", 3: "output"}


@torch.no_grad()
def test_compensation_brings_predictions_nearer() -> None:
    model = tiny_model("gpt2")
    ids = token_ids(model, (40, 30))
    plan = FoldPlan.create(source_model_of(model), removed=[2, 4])
    head, source = Head(model), Replay(model, ids)

    def divergence(corrections: dict[int, Correction]) -> float:
        small = folded(model, plan, corrections)
        hidden = small.transformer(input_ids=ids).last_hidden_state
        return float(forward_kl(head, source.finish(source.end_WTH).flatten(0, 1), hidden.flatten(0, 1)).mean())

    assert divergence(compensate(model, plan, ids)) < 0.9 * divergence({})
