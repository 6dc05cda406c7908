"""The sweep against a plain fp64 reference that reads the residual stream in its own way."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor, nn

from foldgpt.analysis import Analysis, CalibrationIdentity, SourceIdentity, analyze, sweep
from foldgpt.analysis.moments import Moments
from foldgpt.errors import ArtifactError, FoldGPTError, UsageError
from foldgpt.families import decoder_of
from models import model_of_an_unknown_family, tiny_model, token_ids

# One of each kind: pre-norm, tuple outputs and parallel sublayers, flattened MLP, post-norm, sandwich norms.
FAMILIES = ["llama", "gemma3", "falcon", "falcon-parallel", "opt", "gpt2", "olmo2", "granite", "gpt_neox"]
PARALLEL = {"falcon", "falcon-parallel", "gpt_neox"}


# ---------------------------------------------------------------- the reference


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def residual_streams(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> tuple[list, list, list]:
    """Inputs, attention sublayer updates and outputs of each block, fp64 [tokens, hidden], padding left out.

    The attention's update is caught where it is added: at the output of the attention, or of the norm that
    follows it inside the sublayer (Gemma, OLMo 2).
    """
    decoder = decoder_of(model)
    inputs: dict[int, Tensor] = {}
    updates: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    post_norm = decoder.model_type in ("gemma3_text", "olmo2")
    handles = []
    for index, block in enumerate(decoder.blocks):
        attention = (
            block.post_attention_layernorm if post_norm else block.get_submodule(decoder.sublayers.attention[-1])
        )
        handles += [
            block.register_forward_pre_hook(
                lambda _, args, kwargs, i=index: inputs.update(
                    {i: (args[0] if args else kwargs["hidden_states"]).clone()}
                ),
                with_kwargs=True,
            ),
            attention.register_forward_hook(lambda _, __, out, i=index: updates.update({i: _first(out).clone()})),
            block.register_forward_hook(lambda _, __, out, i=index: outputs.update({i: _first(out).clone()})),
        ]
    with torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    kept = torch.ones_like(ids).bool() if mask is None else mask.bool()
    scale = getattr(decoder.config, "residual_multiplier", 1.0)
    order = range(len(decoder.blocks))
    return (
        [inputs[i][kept].double() for i in order],
        [updates[i][kept].double() * scale for i in order],
        [outputs[i][kept].double() for i in order],
    )


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def reference(model: nn.Module, ids: Tensor, parallel: bool = False, mask: Tensor | None = None) -> dict[str, Any]:
    """Every measure, written as its definition."""
    inputs, updates, outputs = residual_streams(model, ids, mask)
    h = [*inputs, outputs[-1]]
    lengths = torch.full((len(ids),), ids.shape[1]) if mask is None else mask.sum(1)
    last = lengths.cumsum(0) - 1
    n = len(inputs)

    def angle(i: int, j: int) -> Tensor:
        return torch.arccos(cosine(h[i], h[j]).clamp(-1, 1)) / math.pi

    between = [x + a for x, a in zip(inputs, updates, strict=True)]
    mlp_inputs = inputs if parallel else between
    mlp_outputs = [y - a if parallel else y for y, a in zip(outputs, updates, strict=True)]
    return {
        "bi": [float((1 - cosine(h[i], h[i + 1])).mean()) for i in range(n)],
        "relative_update": [float(((h[i + 1] - h[i]).norm(dim=-1) / h[i].norm(dim=-1)).mean()) for i in range(n)],
        "cosine": [[float(cosine(a, b).mean()) for a in h] for b in h],
        "angular": [[float(angle(i, i + k).mean()) for i in range(n - k + 1)] for k in range(1, n + 1)],
        "angular_last_token": [
            [float(angle(i, i + k)[last].mean()) for i in range(n - k + 1)] for k in range(1, n + 1)
        ],
        "attention": {
            "bi": [float((1 - cosine(x, m)).mean()) for x, m in zip(inputs, between, strict=True)],
            "relative_update": [
                float(((m - x).norm(dim=-1) / x.norm(dim=-1)).mean()) for x, m in zip(inputs, between, strict=True)
            ],
        },
        "mlp": {
            "bi": [float((1 - cosine(x, y)).mean()) for x, y in zip(mlp_inputs, mlp_outputs, strict=True)],
            "relative_update": [
                float(((y - x).norm(dim=-1) / x.norm(dim=-1)).mean())
                for x, y in zip(mlp_inputs, mlp_outputs, strict=True)
            ],
        },
    }


MEASURES = ("bi", "relative_update", "cosine", "angular", "angular_last_token", "attention", "mlp")


def assert_equal(found: Any, expected: Any, relative: float, absolute: float, place: str = "") -> None:
    """Compare nested numbers, naming the first that is off."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            assert_equal(found[name], value, relative, absolute, f"{place}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for index, value in enumerate(expected):
            assert_equal(found[index], value, relative, absolute, f"{place}[{index}]")
    elif expected is not None:
        assert found == pytest.approx(expected, rel=relative, abs=absolute), place


def measures(analysis: Analysis) -> dict[str, Any]:
    values = analysis.to_json_dict()
    return {name: values[name] for name in MEASURES}


# ---------------------------------------------------------------- the measures


@pytest.mark.parametrize("family", FAMILIES)
def test_every_measure_equals_its_definition(family: str) -> None:
    model = tiny_model(family)
    ids = token_ids(model, (5, 20))
    analysis = analyze(model, ids, batch_size=2)
    assert analysis.num_tokens == 100
    assert_equal(measures(analysis), reference(model, ids, family in PARALLEL), relative=1e-4, absolute=1e-6)


@pytest.mark.parametrize("family", ["gemma3", "opt", "falcon"])
def test_right_padded_batch_equals_unpadded_windows(family: str) -> None:
    model = tiny_model(family)
    ids = token_ids(model, (3, 20))
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    mask[2, 17:] = 0
    padded = analyze(model, ids, attention_mask=mask, batch_size=3)
    assert padded.num_tokens == 11 + 20 + 17
    # Each window alone, without its padding, weighted by its tokens.
    alone = [analyze(model, ids[i : i + 1, : int(mask[i].sum())]) for i in range(3)]
    for block in range(padded.num_blocks):
        expected = sum(a.bi[block] * a.num_tokens for a in alone) / 48
        assert padded.bi[block] == pytest.approx(expected, rel=1e-4)
        expected = sum(a.angular_last_token[0][block] for a in alone) / 3
        assert padded.angular_last_token[0][block] == pytest.approx(expected, rel=1e-4)
    assert_equal(measures(padded), reference(model, ids, family in PARALLEL, mask), relative=1e-4, absolute=1e-6)


def test_last_block_is_measured_before_the_final_norm() -> None:
    """M1: the last of `output_hidden_states` is normed, and would give another score."""
    model = tiny_model("llama")
    ids = token_ids(model)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    normed = float((1 - cosine(states[-2].double(), states[-1].double())).mean())
    found = analyze(model, ids).bi[-1]
    assert found == pytest.approx(reference(model, ids)["bi"][-1], rel=1e-4)
    assert abs(found - normed) > 1e-3


def test_all_batch_items_count() -> None:
    """M2: `output[0]` of a bare tensor is batch item 0."""
    model = tiny_model("llama")
    ids = token_ids(model, (4, 16))
    together = analyze(model, ids, batch_size=4)
    one_by_one = [analyze(model, ids[i : i + 1]).bi[-1] for i in range(4)]
    assert together.bi[-1] == pytest.approx(sum(one_by_one) / 4, rel=1e-5)
    assert together.bi[-1] != pytest.approx(one_by_one[0], rel=1e-3)


def test_scores_are_means_not_sums() -> None:
    """M4: the same windows twice give the same scores."""
    model = tiny_model("qwen3")
    ids = token_ids(model, (3, 16))
    once, twice = analyze(model, ids, batch_size=2), analyze(model, ids.repeat(2, 1), batch_size=2)
    assert twice.num_tokens == 2 * once.num_tokens
    assert_equal(measures(twice), measures(once), relative=1e-5, absolute=1e-7)


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_bfloat16_model_loses_nothing_in_the_measures(family: str) -> None:
    """M3: computed in bf16, 1 − cos of such states is rounding noise."""
    model = tiny_model(family).to(torch.bfloat16)
    ids = token_ids(model, (3, 20))
    expected = reference(model, ids, family in PARALLEL)
    if family == "llama":
        # The reference adds input and update in fp64, the model in bf16: compare what does not depend on it.
        expected["attention"] = expected["mlp"] = None
    assert_equal(measures(analyze(model, ids)), expected, relative=1e-4, absolute=1e-6)


@pytest.mark.parametrize("angle", [0.3, 0.0141, 1e-3])
@pytest.mark.parametrize("massive", [False, True])
def test_nearly_parallel_states_keep_their_digits(angle: float, massive: bool) -> None:
    """BI from 0.045 down to 5e-7, with and without one huge channel, is right to better than 1 %."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(200, 576, generator=generator, dtype=torch.float64)
    if massive:
        before[:, 7] = 3000
    noise = torch.randn(200, 576, generator=generator, dtype=torch.float64)
    noise -= before * (noise * before).sum(-1, keepdim=True) / before.square().sum(-1, keepdim=True)
    update = noise * (math.tan(angle) * before.norm(dim=-1) / noise.norm(dim=-1))[:, None]
    states = torch.stack([before, (before + update) * 1.3], dim=1).float()
    exact = states.double()
    moments = Moments(1, None)
    moments.add_tokens(states)
    moments.add_last_tokens(states)
    means = moments.means()
    bi = float((1 - cosine(exact[:, 0], exact[:, 1])).mean())
    assert bi == pytest.approx(1 - math.cos(angle), rel=0.05)
    assert float(means["distance"][0, 1]) == pytest.approx(bi, rel=2e-3)
    theta = float((torch.arccos(cosine(exact[:, 0], exact[:, 1])) / math.pi).mean())
    assert float(means["angle"][0, 1]) == pytest.approx(theta, rel=2e-3)


def test_family_without_an_entry_has_no_sublayer_measures() -> None:
    model = model_of_an_unknown_family(4)
    assert decoder_of(model).sublayers is None
    ids = token_ids(model)
    analysis = analyze(model, ids)
    assert analysis.attention is None and analysis.mlp is None
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    # The last of these states is after the final norm.
    boundaries = [state.double() for state in states[:-1]]
    expected = [float((1 - cosine(a, b)).mean()) for a, b in itertools.pairwise(boundaries)]
    assert_equal(analysis.bi[:-1], expected, relative=1e-4, absolute=1e-7)


# ---------------------------------------------------------------- the sweep


def test_stored_states_do_not_grow_with_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    put = sweep._Recorder.put

    def spy(self: sweep._Recorder, slot: int, state: Tensor) -> None:
        put(self, slot, state)
        sizes.append(self._buffer.numel() * self._buffer.element_size())

    monkeypatch.setattr(sweep._Recorder, "put", spy)
    model = tiny_model("llama")
    peaks = []
    for num_windows in (2, 16):
        sizes.clear()
        analyze(model, token_ids(model, (num_windows, 16)), batch_size=2)
        peaks.append(max(sizes))
    slots = 2 * 6 + 1
    assert peaks == [2 * 16 * slots * 32 * 4] * 2


def test_default_micro_batch_keeps_stored_states_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    decoder = decoder_of(model)
    bytes_per_token = 13 * 32 * 4
    monkeypatch.setattr(sweep, "_STATE_MEMORY", 3 * 16 * bytes_per_token + 1)
    assert sweep._batch_size(decoder, 16) == 3
    assert sweep._batch_size(decoder, 1000) == 1


@pytest.mark.parametrize("family", ["llama", "falcon", "opt", "gpt2"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_model_equals_the_model_in_memory(family: str, where: str, tmp_path: Any) -> None:
    model = tiny_model(family)
    ids = token_ids(model, (3, 16))
    expected = measures(analyze(model, ids, batch_size=2))
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path / "weights", execution_device=torch.device("cpu"))
    assert any(parameter.is_meta for parameter in model.parameters())
    assert measures(analyze(model, ids, batch_size=2)) == expected


def test_streams_and_what_comes_between_may_be_in_different_formats() -> None:
    """As where a model keeps its residual stream in float32 and its sublayers in 16 bits."""
    model, exact = tiny_model("llama"), tiny_model("llama")
    ids = token_ids(model, (4, 16))
    for block in model.model.layers:
        norm, weight = block.post_attention_layernorm, block.post_attention_layernorm.weight
        block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
        norm.register_forward_hook(lambda _, args, output: output.float())
        assert weight.dtype == torch.float32
    found, expected = (analyze(each, ids).bi for each in (model, exact))
    assert found == pytest.approx(expected, rel=0.05)


def test_model_is_left_as_it_was() -> None:
    model = tiny_model("llama")
    model.train()
    model.model.layers[2].eval()
    before = [module.training for module in model.modules()]
    analyze(model, token_ids(model))
    assert [module.training for module in model.modules()] == before
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())


class _Killed(Exception):
    pass


def _kill_at_micro_batch(model: nn.Module, number: int) -> Any:
    """Raise when the decoder starts its micro-batch `number`; returns the hook's handle."""
    seen = 0

    def hook(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            raise _Killed

    return model.model.embed_tokens.register_forward_pre_hook(hook)


def test_interrupted_sweep_goes_on_where_it_was(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_CHECKPOINT_SECONDS", 0.0)
    model = tiny_model("llama")
    ids = token_ids(model, (7, 16))
    expected = measures(analyze(model, ids, batch_size=2))
    checkpoint = tmp_path / "partial.json"
    handle = _kill_at_micro_batch(model, 3)
    with pytest.raises(_Killed):
        analyze(model, ids, batch_size=2, checkpoint=checkpoint)
    handle.remove()
    assert json.loads(checkpoint.read_text())["windows_done"] == 4

    batches: list[int] = []
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    resumed = analyze(model, ids, batch_size=2, checkpoint=checkpoint)
    handle.remove()
    assert batches == [2, 1]
    assert measures(resumed) == expected
    # Until the caller has saved the result, it is worth as much as that.
    handle = _kill_at_micro_batch(model, 1)
    assert measures(analyze(model, ids, batch_size=2, checkpoint=checkpoint)) == expected
    handle.remove()


def test_a_checkpoint_that_cannot_be_written_is_refused_before_the_sweep(tmp_path: Any) -> None:
    model = tiny_model("llama")
    (tmp_path / "file").write_text("")
    handle = _kill_at_micro_batch(model, 1)
    with pytest.raises(ArtifactError, match=r"cannot write .*partial\.json: Not a directory"):
        analyze(model, token_ids(model, (2, 16)), checkpoint=tmp_path / "file" / "partial.json")
    handle.remove()


@pytest.mark.parametrize("change", ["windows", "weights", "source", "mask", "version", "damaged"])
def test_checkpoint_of_another_request_is_not_used(change: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_CHECKPOINT_SECONDS", 0.0)
    model = tiny_model("llama")
    ids = token_ids(model, (4, 16))
    checkpoint = tmp_path / "partial.json"
    handle = _kill_at_micro_batch(model, 3)
    with pytest.raises(_Killed):
        analyze(model, ids, batch_size=1, checkpoint=checkpoint)
    handle.remove()
    request: dict[str, Any] = {}
    if change == "windows":
        ids = token_ids(model, (4, 16), seed=1)
    elif change == "weights":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    elif change == "source":
        request["source"] = SourceIdentity(spec="other", fingerprint="0")
    elif change == "mask":
        request["attention_mask"] = (torch.arange(16) < 9).long().expand(4, 16)
    elif change == "version":
        # Sums of another version are not taken over, whatever they are.
        checkpoint.write_text(checkpoint.read_text().replace('"windows_done": ', '"windows_done": 1'))
        monkeypatch.setattr("foldgpt.__version__", "0.0.0")
    else:
        checkpoint.write_text('{"format": "foldgpt.analysis-check')
    found = analyze(model, ids, batch_size=1, checkpoint=checkpoint, **request)
    assert measures(found) == measures(analyze(model, ids, batch_size=1, **request))


def test_a_sweep_goes_on_where_the_same_model_is_named_otherwise(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_CHECKPOINT_SECONDS", 0.0)
    model = tiny_model("llama")
    ids, checkpoint = token_ids(model, (4, 16)), tmp_path / "partial.json"
    handle = _kill_at_micro_batch(model, 3)
    first = SourceIdentity(spec="m", fingerprint="ab")
    with pytest.raises(_Killed):
        analyze(model, ids, batch_size=1, checkpoint=checkpoint, source=first)
    handle.remove()
    seen: list[int] = []
    counting = model.model.register_forward_pre_hook(lambda *_: seen.append(1))
    other = SourceIdentity(spec="./m", revision="main", fingerprint="ab")
    model.config._name_or_path = "./m"
    found = analyze(model, ids, batch_size=1, checkpoint=checkpoint, source=other)
    counting.remove()
    assert len(seen) == 2 and found.source == other
    assert measures(found) == measures(analyze(model, ids, batch_size=1))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_states_that_are_not_finite_name_the_block(value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(FoldGPTError, match="block 3 "):
        analyze(model, token_ids(model))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"ids": torch.zeros(8, dtype=torch.long)}, r"\[num_windows, context\], got \[8\]"),
        ({"ids": torch.zeros(0, 8, dtype=torch.long)}, r"got \[0, 8\]"),
        ({"ids": torch.full((1, 8), 128)}, "token id 128 .* 0 to 127"),
        ({"attention_mask": torch.ones(2, 7)}, r"\[2, 7\], the windows \[2, 8\]"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]] * 2)}, "pad on the right"),
        ({"attention_mask": torch.tensor([[1] * 8, [0] * 8])}, "window 1 is padding only"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_requests_are_refused(request_: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    ids = request_.pop("ids", torch.zeros(2, 8, dtype=torch.long))
    with pytest.raises(UsageError, match=message):
        analyze(model, ids, **request_)


# ---------------------------------------------------------------- the result


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    model = tiny_model("llama")
    return analyze(
        model,
        token_ids(model),
        source=SourceIdentity(spec="tiny", revision=None, fingerprint="ab"),
        calibration=CalibrationIdentity(protocol={"context": 20}, fingerprint="cd"),
    )


def test_result_survives_json(analysis: Analysis) -> None:
    text = json.dumps(analysis.to_json_dict(), allow_nan=False)
    assert Analysis.from_json_dict(json.loads(text)) == analysis
    assert analysis.source.fingerprint == "ab" and analysis.calibration.protocol == {"context": 20}


def test_views_of_the_result(analysis: Analysis) -> None:
    assert analysis.similarity == [1 - bi for bi in analysis.bi]
    for n in (1, 4, 6):
        spans = analysis.angular_span(n)
        assert len(spans) == 7 - n
        assert spans[analysis.best_angular_span(n)] == min(spans)
    assert analysis.angular_span(2, last_token=True) != analysis.angular_span(2)
    for n in (0, 7):
        with pytest.raises(UsageError, match=f"no run of {n} blocks"):
            analysis.angular_span(n)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "foldgpt.plan"}, "foldgpt.plan"),
        ({"version": 2}, "version 2"),
        ({"bi": [0.1]}, "bi has 1 entries for 6 blocks"),
        ({"cosine": [[1.0]]}, "cosine is not a matrix"),
        ({"angular": []}, "angular must have rows"),
        ({"unknown": 1}, "unknown"),
        ({"num_tokens": "many"}, "num_tokens"),
        ({"relative_update": [math.nan] * 6}, "relative_update"),
    ],
)
def test_damaged_result_is_refused(analysis: Analysis, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Analysis.from_json_dict({**analysis.to_json_dict(), **change})


def test_something_else_is_not_an_analysis() -> None:
    with pytest.raises(ArtifactError, match="not an analysis"):
        Analysis.from_json_dict([1, 2])
