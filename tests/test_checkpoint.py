"""What appears under the final name is whole, is what it says, and loads; what fails leaves nothing."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from checkpoint_case import LARGE, edit_weights, folded
from foldgpt.artifacts import read_json
from foldgpt.errors import ArtifactError, FoldGPTError, UnsupportedModelError, VerificationError
from foldgpt.families import decoder_of
from foldgpt.folding import (
    fold_,
    predicted_parameters,
    save_folded,
    source_model_of,
    verify_checkpoint,
)
from foldgpt.modeling import configuration_foldgpt, modeling_foldgpt
from foldgpt.plan import FoldPlan, Group
from foldgpt.rehearsal.tiny import config_of, shrunk
from foldgpt.sources import load_config, load_source
from models import tiny_model, token_ids
from tiny import tiny_tokenizer


@pytest.mark.parametrize("shared", [False, True])
def test_a_checkpoint_comes_with_plan_and_verification(tmp_path: Path, shared: bool) -> None:
    model, plan = folded(shared=shared)
    verification = save_folded(model, plan, tmp_path / "folded")
    files = {path.name for path in (tmp_path / "folded").iterdir()}
    code = {"configuration_foldgpt.py", "modeling_foldgpt.py"}
    ordinary = {"config.json", "generation_config.json", "model.safetensors", "plan.json", "verification.json"}
    assert files == (ordinary | code if shared else ordinary)
    assert [path.name for path in tmp_path.iterdir()] == ["folded"]
    assert FoldPlan.load(tmp_path / "folded") == plan
    assert read_json(tmp_path / "folded" / "verification.json") == asdict(verification)
    assert verification.model_class == ("FoldedLlamaForCausalLM" if shared else "LlamaForCausalLM")
    assert verification.logits_identical and verification.reload_error == 0
    assert 0 <= verification.cache_error < 1e-4
    assert verification.num_parameters == sum(p.numel() for p in model.parameters())
    assert verification.weight_bytes == 4 * verification.num_parameters
    assert len({path.stat().st_mode for path in (tmp_path / "folded").iterdir() if path.is_file()}) == 1, "as readable"


def test_the_plan_is_in_the_config_of_a_model_that_shares(tmp_path: Path) -> None:
    model, plan = folded(shared=True)
    save_folded(model, plan, tmp_path / "folded")
    config = read_json(tmp_path / "folded" / "config.json")
    assert (config["model_type"], config["source_model_type"]) == ("foldgpt", "llama")
    assert FoldPlan.from_json_dict(config["fold_plan"]) == plan
    removal, plan = folded()
    save_folded(removal, plan, tmp_path / "removal")
    config = read_json(tmp_path / "removal" / "config.json")
    assert config["model_type"] == "llama"
    assert not {"fold_plan", "fold_layout", "auto_map", "source_model_type"} & set(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("shared", [False, True])
def test_bytes_on_disk_are_those_of_the_unique_parameters(
    tmp_path: Path, family: str, shared: bool, dtype: torch.dtype
) -> None:
    model = tiny_model(family, **LARGE).to(dtype)
    groups = [Group(blocks=(3, 4, 5), donor="mean")] if shared else []
    plan = FoldPlan.create(source_model_of(model), removed=[1], groups=groups)
    expected = predicted_parameters(model, plan)
    fold_(model, plan)
    save_folded(model, plan, tmp_path / "folded", expected_parameters=expected)
    on_disk = (tmp_path / "folded" / "model.safetensors").stat().st_size
    assert on_disk == pytest.approx(expected * dtype.itemsize, rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
def test_a_sharded_save_is_verified_and_loads(tmp_path: Path, shared: bool) -> None:
    model, plan = folded(shared=shared)
    verification = save_folded(model, plan, tmp_path / "folded", max_shard_size="60KB")
    shards = list((tmp_path / "folded").glob("model-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "folded" / "model.safetensors.index.json").is_file()
    assert verification.weight_bytes == 4 * sum(p.numel() for p in model.parameters())
    ids = token_ids(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    shards[0].unlink()
    with pytest.raises(VerificationError, match="cannot be loaded"):
        verify_checkpoint(tmp_path / "folded", model)


@pytest.mark.parametrize("shared", [False, True])
def test_tokenizer_and_generation_config_come_along(tmp_path: Path, shared: bool) -> None:
    model, plan = folded(shared=shared)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.25, top_k=7, eos_token_id=[2, 5])
    tokenizer = tiny_tokenizer(128, bos=True)
    save_folded(model, plan, tmp_path / "folded", tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "folded")
    assert again.chat_template == tokenizer.chat_template
    messages = [{"role": "user", "content": "to the end"}]
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert again("a text")["input_ids"] == tokenizer("a text")["input_ids"]
    generation = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").generation_config
    assert (generation.temperature, generation.top_k, generation.eos_token_id) == (0.25, 7, [2, 5])


def test_an_upload_while_saving_has_the_code_that_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers uploads what is newer than what lay there when it began; the code is written before."""
    uploaded: set[str] = set()

    class Hub:
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, operations: Any, **_: Any) -> None:
            uploaded.update(operation.path_in_repo for operation in operations)

    monkeypatch.setattr(transformers.modeling_utils, "hf_api", Hub)
    monkeypatch.setattr(transformers.utils.hub, "hf_api", Hub)
    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    monkeypatch.setattr(transformers.modeling_utils, "create_and_tag_model_card", lambda *_, **__: card)
    model, _ = folded(shared=True)
    (tmp_path / "mine.txt").write_text("")
    written = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    code = {"configuration_foldgpt.py", "modeling_foldgpt.py"}
    for _ in range(2):  # the second time, all of it lies there already
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="owner/name")
        assert uploaded == written | code
        uploaded.clear()


@torch.no_grad()
def test_a_pickled_model_can_be_read_where_nothing_has_been_imported(tmp_path: Path) -> None:
    model, _ = folded(shared=True)
    ids = token_ids(model)
    (tmp_path / "pickle").write_bytes(pickle.dumps((model, copy.deepcopy(model.config))))
    reading = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    model, config = pickle.load(file)
import torch
print(type(model).__name__, type(config).__name__, type(model).__bases__[1].__name__)
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[2])
"""
    torch.save(ids, tmp_path / "tensor")
    command = [sys.executable, "-c", reading, str(tmp_path / "pickle"), str(tmp_path / "tensor")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["FoldedLlamaForCausalLM", "FoldedLlamaConfig", "LlamaForCausalLM"]
    assert torch.equal(torch.load(tmp_path / "tensor"), model(ids).logits)


@pytest.mark.parametrize("module", [configuration_foldgpt, modeling_foldgpt])
def test_classes_that_no_folded_model_has_are_not_made(module: Any) -> None:
    for name in ("FoldedNonsense", "FoldedPreTrainedModel", "FoldedPreTrainedConfig", "LlamaConfig"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(module, name)


@torch.no_grad()
def test_code_that_a_source_names_but_was_loaded_without_is_not_named_again(tmp_path: Path) -> None:
    """Whoever trusts remote code would be sent to files that are not there."""
    source = tiny_model("phi3")
    source.config.auto_map = {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    }
    source.save_pretrained(tmp_path / "source")
    with pytest.raises(OSError, match=r"configuration_phi3\.py"):  # so it would go with the folded one
        AutoModelForCausalLM.from_pretrained(tmp_path / "source", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval()
    assert model.config.auto_map
    plan = FoldPlan.create(source_model_of(model), removed=[1])
    fold_(model, plan)
    save_folded(model, plan, tmp_path / "folded")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", trust_remote_code=True)
    ids = token_ids(model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("training", [False, True])
def test_a_save_leaves_the_model_as_it_was(tmp_path: Path, training: bool) -> None:
    model, plan = folded("gpt2", shared=True)  # it has dropout, which must be off while it is verified
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    save_folded(model, plan, tmp_path / "folded")
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    model, plan = folded()
    save_folded(model, plan, tmp_path / "folded")
    other, other_plan = folded(removed=(1, 2))
    with pytest.raises(ArtifactError, match="already exists"):
        save_folded(other, other_plan, tmp_path / "folded")
    assert FoldPlan.load(tmp_path / "folded") == plan
    save_folded(other, other_plan, tmp_path / "folded", replace=True)
    assert FoldPlan.load(tmp_path / "folded") == other_plan
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "folded").config.num_hidden_layers == 4
    assert [path.name for path in tmp_path.iterdir()] == ["folded"]


def test_a_failed_verification_leaves_nothing(tmp_path: Path) -> None:
    model, plan = folded()
    count = sum(p.numel() for p in model.parameters())
    message = f"the plan foretold {count + 1:,} unique parameters; the saved model has {count:,}"
    with pytest.raises(VerificationError, match=message):
        save_folded(model, plan, tmp_path / "folded", expected_parameters=count + 1)
    assert list(tmp_path.iterdir()) == []
    save_folded(model, plan, tmp_path / "folded")
    with pytest.raises(VerificationError):
        save_folded(model, plan, tmp_path / "folded", expected_parameters=count + 1, replace=True)
    assert FoldPlan.load(tmp_path / "folded") == plan, "a failed replacement leaves the old checkpoint"
    assert [path.name for path in tmp_path.iterdir()] == ["folded"]


@pytest.mark.parametrize("failing", ["model", "tokenizer"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = folded()
    tokenizer = tiny_tokenizer()

    def full(folder: Any, *_: Any, **__: Any) -> None:
        (Path(folder) / "half").write_text("")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(model if failing == "model" else tokenizer, "save_pretrained", full)
    with pytest.raises(ArtifactError, match=r"cannot write .*folded: No space left on device\. Nothing was left"):
        save_folded(model, plan, tmp_path / "folded", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; needs the right to mount one."""
    (tmp_path / "small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "small")]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield tmp_path / "small"
    subprocess.run(["umount", str(tmp_path / "small")], check=True)


def test_a_really_full_disk_leaves_nothing(small_disk: Path) -> None:
    model, plan = folded()
    with pytest.raises(ArtifactError, match=r"cannot write .*folded: .*No space left on device"):
        save_folded(model, plan, small_disk / "folded")
    assert list(small_disk.iterdir()) == []


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_is_offloaded_whole_is_saved_and_verified(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model("llama").to(dtype).save_pretrained(tmp_path / "source")
    device_map = dict.fromkeys(("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb"), "disk")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", device_map={**device_map, "lm_head": "cpu"}, offload_folder=tmp_path / "offload"
    )
    assert next(model.parameters()).is_meta
    plan = FoldPlan.create(source_model_of(model), removed=[1, 2])
    fold_(model, plan)
    verification = save_folded(model, plan, tmp_path / "folded")
    assert verification.logits_identical
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    ids = token_ids(loaded)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(UnsupportedModelError, match="is offloaded; load the whole model in memory to give it another"):
        save_folded(model, plan, tmp_path / "halves", dtype=torch.float16)
    if dtype == torch.bfloat16:
        # What passes for rounding there is looked at again in fp32; the hooks bring the weights in that.
        edit_weights(tmp_path / "folded", lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].mul_(1.02))
        with pytest.raises(VerificationError, match="computes something else"):
            verify_checkpoint(tmp_path / "folded", model)


def test_a_generation_config_that_transformers_saves_is_no_obstacle_and_another_is_one_error(tmp_path: Path) -> None:
    """What was published with odd values can be saved again; what was changed into them cannot."""
    tiny_model("llama").save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    plan = FoldPlan.create(source_model_of(model), removed=[1])
    fold_(model, plan)
    save_folded(model, plan, tmp_path / "folded")
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.5
    with pytest.raises(FoldGPTError, match=r"transformers does not save this model: .*temperature"):
        save_folded(model, plan, tmp_path / "other")
    assert {entry.name for entry in tmp_path.iterdir()} == {"source", "folded"}


def tiny_gguf(path: Path) -> None:
    """A random Llama of three blocks, its matrices in 8 bits, with a byte-level tokenizer."""
    hidden, feed_forward, vocabulary = 64, 96, 160
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(3)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // 4)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    tokens = sorted(tiny_tokenizer(vocabulary).get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([token for token, _ in tokens[:-1]] + ["et"])
    writer.add_token_merges(["e t"])
    writer.add_token_types([3 if index < 3 else 1 for index in range(vocabulary)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = numpy.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = random.normal(0, 0.2, shape).astype(numpy.float32)
        if len(shape) == 1:
            writer.add_tensor(name, 1 + values)
            return
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", vocabulary, hidden)
    add("output_norm.weight", hidden)
    add("output.weight", vocabulary, hidden)
    for block in range(3):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{block}.{norm}.weight", hidden)
        for name, out in (
            ("attn_q", hidden),
            ("attn_k", hidden // 2),
            ("attn_v", hidden // 2),
            ("attn_output", hidden),
        ):
            add(f"blk.{block}.{name}.weight", out, hidden)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{block}.{name}.weight", feed_forward, hidden)
        add(f"blk.{block}.ffn_down.weight", hidden, feed_forward)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_c1_a_config_that_names_a_quantiser_is_refused_before_anything_is_changed() -> None:
    """Such a field outlives the quantised weights; saved, it would have them looked for in the quantiser's format."""
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(UnsupportedModelError, match=r"config of this LlamaForCausalLM .* delete that field first"):
        fold_(model, FoldPlan.create(source_model_of(model), removed=[0]))
    assert len(decoder_of(model).blocks) == model.config.num_hidden_layers == 6


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
def test_c1_a_gguf_source_is_dequantised_and_no_trace_of_it_is_saved(
    tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field note C1: cut full-precision weights; a stale quantization_config would make the save fail."""
    tiny_gguf(tmp_path / "tiny.gguf")
    assert load_config(tmp_path / "tiny.gguf").model_type == "llama"
    assert shrunk(config_of(str(tmp_path / "tiny.gguf"))).model_type == "llama"  # of a dry run
    parsed, parse = [], gguf.GGUFReader
    with monkeypatch.context() as patched:
        patched.setattr(gguf, "GGUFReader", lambda *args: parsed.append(1) or parse(*args))
        source = load_source(str(tmp_path / "tiny.gguf"), device="cpu")
    # For a large vocabulary it takes seconds.
    assert len(parsed) == 1 and gguf.GGUFReader is parse
    assert {p.dtype for p in source.model.parameters()} == {torch.bfloat16}
    groups = [Group(blocks=(1, 2), donor="mean")] if shared else []
    plan = FoldPlan.create(source_model_of(source.model), removed=[0], groups=groups)
    fold_(source.model, plan)
    save_folded(source.model, plan, tmp_path / "folded", tokenizer=source.tokenizer)
    assert "quantization_config" not in read_json(tmp_path / "folded" / "config.json")
    again = load_source(str(tmp_path / "folded"), device="cpu")
    ids = token_ids(again.model)
    assert torch.equal(again.model(ids).logits, source.model(ids).logits)
