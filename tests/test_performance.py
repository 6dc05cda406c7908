"""The shape of a speed measurement; absolute times belong to benchmarks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from foldgpt.errors import UsageError
from foldgpt.evaluation import measure_speed, performance


def llama(num_blocks: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=num_blocks,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )


SHORT = {"prompt_tokens": 8, "decode_tokens": 3, "repeats": 3}


def test_models_take_turns_and_do_the_same_work() -> None:
    source, folded = llama(3), llama(1)
    calls: list[tuple[str, list[list[int]], int]] = []

    def record(name: str) -> Any:
        def hook(_module: Any, _arguments: Any, inputs: dict[str, Any], output: Any) -> None:
            calls.append((name, inputs["input_ids"].tolist(), output.logits.shape[1]))

        return hook

    source.register_forward_hook(record("source"), with_kwargs=True)
    folded.register_forward_hook(record("folded"), with_kwargs=True)
    measure_speed({"source": source, "folded": folded}, **SHORT)

    # One warm-up and three repeats; each turn is one prefill (last logits only) and three steps of one token.
    assert [name for name, _, _ in calls] == (["source"] * 4 + ["folded"] * 4) * 4
    turns = [calls[start : start + 4] for start in range(0, len(calls), 4)]
    assert all([len(ids[0]) for _, ids, _ in turn] == [8, 1, 1, 1] for turn in turns)
    assert all(num_logits == 1 for _, _, num_logits in calls)
    assert all([ids for _, ids, _ in turn] == [ids for _, ids, _ in turns[0]] for turn in turns)


def test_rates_and_paired_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    # Warm-up, then three pairs. The machine halves its speed in the last pair: the paired ratio stays 2.
    seconds = iter([(9, 9), (9, 9), (1, 2), (0.5, 1), (1, 2), (0.5, 1), (2, 4), (1, 2)])
    monkeypatch.setattr(performance, "prefill_and_decode", lambda *_: next(seconds))
    speeds = measure_speed({"a": llama(), "b": llama()}, batch_size=2, **SHORT)
    assert list(speeds) == ["a", "b"]
    assert speeds["a"].prefill == performance.Rate(median=16, minimum=8, maximum=16, ratio=1)
    assert speeds["b"].prefill == performance.Rate(median=32, minimum=16, maximum=32, ratio=2)
    assert speeds["b"].decode == performance.Rate(median=6, minimum=3, maximum=6, ratio=2)


def test_protocol_and_a_single_model() -> None:
    speed = measure_speed({"source": llama()}, seed=3, **SHORT)["source"]
    assert speed.prefill.ratio == speed.decode.ratio == 1
    assert 0 < speed.decode.minimum <= speed.decode.median <= speed.decode.maximum
    assert speed.protocol == SHORT | {
        "batch_size": 1,
        "seed": 3,
        "device": "cpu",
        "dtype": "float32",
        "num_threads": torch.get_num_threads(),
    }


def test_training_flag_is_restored() -> None:
    model = llama().train()
    measure_speed({"source": model}, **SHORT)
    assert model.training


def with_positions(num: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=num))


@pytest.mark.parametrize(("positions", "tokens"), [(11, (8, 3)), (10, (7, 3)), (3, (1, 2)), (2, (1, 1))])
def test_few_positions_shorten_the_prompt_of_all_models(positions: int, tokens: tuple[int, int]) -> None:
    speeds = measure_speed({"source": llama(), "small": with_positions(positions)}, **SHORT)
    for speed in speeds.values():
        assert (speed.protocol["prompt_tokens"], speed.protocol["decode_tokens"]) == tokens


def test_rates_count_the_tokens_of_the_shortened_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performance, "prefill_and_decode", lambda *_: (1.0, 1.0))
    speed = measure_speed({"small": with_positions(10)}, **SHORT)["small"]
    assert (speed.prefill.median, speed.decode.median) == (7, 3)


def test_a_model_without_positions_for_a_step_is_refused() -> None:
    with pytest.raises(UsageError, match=r"small has 1 position\(s\).*--no-speed.*evaluate.speed: false"):
        measure_speed({"source": llama(), "small": with_positions(1)}, **SHORT)


@pytest.mark.parametrize("name", ["prompt_tokens", "decode_tokens", "repeats", "batch_size"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is 0"):
        measure_speed({"source": llama()}, **(SHORT | {name: 0}))


def test_no_model_is_refused() -> None:
    with pytest.raises(UsageError, match="no model"):
        measure_speed({})
