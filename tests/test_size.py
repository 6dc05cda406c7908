"""Ties are counted once or at each place as said, and the KV cache is what the model really makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from foldgpt.errors import ArtifactError, SourceError
from foldgpt.evaluation import folder_bytes, size_of
from foldgpt.folding import fold_, source_model_of
from foldgpt.plan import FoldPlan, Group

VOCAB, HIDDEN, BLOCKS, HEADS = 61, 32, 3, 4
HEAD_SIZE = HIDDEN // HEADS


def llama(**fields: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=BLOCKS,
            num_attention_heads=HEADS,
            **fields,
        )
    )


def test_counts_of_an_untied_model() -> None:
    size = size_of(llama(tie_word_embeddings=False))
    block = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * 48 + 2 * HIDDEN
    assert size.num_blocks == BLOCKS
    assert size.block_parameters == BLOCKS * block
    assert size.unique_parameters == size.stored_parameters == BLOCKS * block + 2 * VOCAB * HIDDEN + HIDDEN
    assert size.unique_bytes == 4 * size.unique_parameters


def test_tied_embeddings_are_unique_once_and_stored_twice() -> None:
    size = size_of(llama(tie_word_embeddings=True))
    assert size.stored_parameters - size.unique_parameters == VOCAB * HIDDEN


def test_shared_block_parameters_are_counted_once() -> None:
    model = llama()
    before = size_of(model)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    after = size_of(model)
    assert before.block_parameters - after.block_parameters == 48 * HIDDEN
    assert before.unique_parameters - after.unique_parameters == 48 * HIDDEN
    assert after.stored_parameters == before.stored_parameters


@pytest.mark.parametrize("sublayers", [("attention", "mlp"), ("mlp",)], ids=str)
def test_what_is_borrowed_is_counted_at_each_of_its_places(sublayers: tuple[str, ...]) -> None:
    """A borrowed leaf is no module of the borrower, so a count by name meets it once, at its owner."""
    model = llama()
    whole = size_of(model).stored_parameters
    fold_(model, FoldPlan.create(source_model_of(model), groups=[Group(blocks=(0, 1, 2), sublayers=sublayers)]))
    by_name = sum(tensor.numel() for _, tensor in model.named_parameters(remove_duplicate=False))
    shared = (4 * HIDDEN * HIDDEN if "attention" in sublayers else 0) + 3 * HIDDEN * 48
    size = size_of(model)
    assert size.stored_parameters == whole
    assert size.unique_parameters == by_name == whole - 2 * shared
    # A term beside shared weights is one position's own.
    other = llama()
    group = Group(blocks=(0, 1), private=("norms", "scales"))
    fold_(other, FoldPlan.create(source_model_of(other), groups=[group]))
    assert size_of(other).stored_parameters == whole + size_of(other).private_parameters


def test_private_terms_are_counted_apart_and_among_the_rest() -> None:
    model = llama()
    group = Group(blocks=(0, 1), donor="mean", private=("norms", "scales"), ranks={"mlp.up_proj": 2})
    fold_(model, FoldPlan.create(source_model_of(model), groups=[group]))
    size = size_of(model.to(torch.bfloat16))
    assert size.private_parameters == 2 * (2 * HIDDEN + 2 * (HIDDEN + 48))
    assert size.private_bytes == 2 * size.private_parameters
    plain = llama()
    fold_(plain, FoldPlan.create(source_model_of(plain), groups=[Group(blocks=(0, 1))]))
    assert size_of(plain).private_bytes == 0
    assert size.unique_parameters - size_of(plain).unique_parameters == size.private_parameters
    assert size.block_parameters - size_of(plain).block_parameters == size.private_parameters


def test_unique_bytes_follow_the_dtype() -> None:
    size = size_of(llama().to(torch.bfloat16))
    assert size.unique_bytes == 2 * size.unique_parameters


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_kv_bytes_with_grouped_heads(kv_heads: int) -> None:
    assert size_of(llama(num_key_value_heads=kv_heads)).kv_bytes_per_token == BLOCKS * 2 * kv_heads * HEAD_SIZE * 4


def test_kv_bytes_halve_in_bfloat16() -> None:
    assert size_of(llama().to(torch.bfloat16)).kv_bytes_per_token == BLOCKS * 2 * HIDDEN * 2


def test_kv_bytes_of_gpt2() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=BLOCKS, n_head=HEADS, n_positions=8))
    assert size_of(model).kv_bytes_per_token == BLOCKS * 2 * HIDDEN * 4


@pytest.mark.parametrize(
    ("fields", "kv_heads"),
    [
        ({"multi_query": True, "new_decoder_architecture": False}, 1),
        ({"multi_query": False, "new_decoder_architecture": False}, HEADS),
    ],
)
def test_kv_bytes_of_falcon(fields: dict[str, bool], kv_heads: int) -> None:
    config = FalconConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=BLOCKS, num_attention_heads=HEADS, **fields
    )
    assert size_of(FalconForCausalLM(config)).kv_bytes_per_token == BLOCKS * 2 * kv_heads * HEAD_SIZE * 4


def test_sliding_blocks_are_counted_with_their_window() -> None:
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=HEAD_SIZE,
        sliding_window=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    model = Gemma3ForCausalLM(config)
    size = size_of(model)
    assert (size.num_sliding_blocks, size.sliding_window) == (2, 6)
    fold_(model, FoldPlan.create(source_model_of(model), removed_attention=[1]))
    without = size_of(model)
    assert without.num_sliding_blocks == 1
    assert without.kv_bytes_per_token == 2 * 2 * HEAD_SIZE * 4
    assert size.kv_bytes_per_token == 3 * 2 * HEAD_SIZE * 4


def test_training_flag_is_restored() -> None:
    model = llama().train()
    size_of(model)
    assert model.training


def test_folder_bytes_of_a_saved_model(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    size = size_of(model)
    assert folder_bytes(tmp_path) == (tmp_path / "model.safetensors").stat().st_size
    assert size.unique_bytes < folder_bytes(tmp_path) < 1.1 * size.unique_bytes


def test_folder_bytes_of_shards_count_only_what_the_index_names(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    expected = sum(shard.stat().st_size for shard in shards)
    save_file({"w": torch.zeros(99)}, tmp_path / "consolidated.safetensors")
    assert folder_bytes(tmp_path) == expected
    shards[0].unlink()
    with pytest.raises(ArtifactError, match=shards[0].name):
        folder_bytes(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(SourceError, match="not a safetensors index"):
        folder_bytes(tmp_path)


def test_folder_bytes_do_not_count_a_second_format(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(10)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 1000)
    assert folder_bytes(tmp_path) == (tmp_path / "model.safetensors").stat().st_size


def test_folder_bytes_of_one_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"x" * 123)
    assert folder_bytes(file) == folder_bytes(tmp_path) == 123


def test_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(ArtifactError, match="no weight files"):
        folder_bytes(tmp_path)
