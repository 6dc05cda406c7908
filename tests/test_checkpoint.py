"""What appears under the final name has been loaded, run and compared; what fails leaves nothing."""

from __future__ import annotations

import copy
import errno
import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import gguf
import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.llama import modeling_llama

from foldgpt.artifacts import read_json
from foldgpt.errors import ArtifactError, FoldGPTError, PlanError, UnsupportedModelError, VerificationError
from foldgpt.families import decoder_of
from foldgpt.folding import (
    DONORS,
    fold_,
    predicted_parameters,
    save_folded,
    source_model_of,
    unfold_,
    verify_checkpoint,
)
from foldgpt.modeling import configuration_foldgpt, modeling_foldgpt
from foldgpt.plan import Donor, FoldPlan, Group, SourceModel
from foldgpt.rehearsal.tiny import config_of, shrunk
from foldgpt.sources import load_config, load_source
from models import tiny_model, token_ids
from tiny import tiny_tokenizer

#: Large enough that the header of a safetensors file does not matter.
LARGE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}


def folded(family: str = "llama", removed: tuple[int, ...] = (1,), shared: bool = False, **changes: Any) -> Any:
    """A folded tiny model and its plan."""
    model = tiny_model(family, **changes)
    groups = [Group(blocks=(3, 4, 5), donor="mean")] if shared else []
    plan = FoldPlan.create(source_model_of(model), removed=removed, groups=groups)
    fold_(model, plan)
    return model, plan


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    """A folded model and the folder of its checkpoint."""
    model, plan = folded()
    save_folded(model, plan, tmp_path / "folded")
    return model, tmp_path / "folded"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ------------------------------------------------------------------------------------- what a save leaves


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


# ---------------------------------------------------------------------------------- failures leave nothing


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


# --------------------------------------------------------------------- each way in which it can be wrong


def test_an_untouched_checkpoint_passes(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    assert verify_checkpoint(folder, model).logits_identical


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # A stale num_hidden_layers (field note R2), both ways.
        (lambda folder: edit_config(folder, num_hidden_layers=6), r"missing keys on loading: model\.layers\.5\."),
        (lambda folder: edit_config(folder, num_hidden_layers=4), r"unexpected keys on loading: model\.layers\.4\."),
        (
            lambda folder: edit_weights(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight")),
            r"missing keys on loading: model\.layers\.2\.mlp\.up_proj\.weight",
        ),
        (
            lambda folder: edit_weights(folder, lambda tensors: tensors.update(stray=torch.ones(3))),
            "unexpected keys on loading: stray",
        ),
        (
            lambda folder: edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)})),
            "cannot be loaded",
        ),
        (
            lambda folder: edit_weights(folder, lambda tensors: tensors["model.layers.3.mlp.up_proj.weight"].zero_()),
            "computes something else than the one in memory",
        ),
        (
            lambda folder: edit_weights(folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan)),
            r"computes something else than the one in memory \(relative error inf",
        ),
        (
            lambda folder: edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
            "computes something else than the one in memory",
        ),
        (
            lambda folder: os.truncate(folder / "model.safetensors", 5000),
            "the saved model cannot be loaded: ",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "the saved model cannot be loaded: "),
        (lambda folder: (folder / "model.safetensors").unlink(), "the saved model cannot be loaded: "),
        # Weights stored twice, as a file of an older save would be.
        (
            lambda folder: save_file({"x": torch.ones(1000)}, folder / "old.safetensors"),
            r"stores 191,776 bytes for 187,776 bytes of unique parameters",
        ),
    ],
    ids=[
        "too many blocks in the config",
        "too few blocks in the config",
        "a key is missing",
        "a key too many",
        "another shape",
        "another value",
        "not a number",
        "another config field",
        "truncated weights",
        "corrupt config",
        "no weights",
        "weights stored twice",
    ],
)
def test_a_damaged_checkpoint_does_not_pass(
    saved: tuple[Any, Path], change: Callable[[Path], object], message: str
) -> None:
    model, folder = saved
    change(folder)
    with pytest.raises(VerificationError, match=message):
        verify_checkpoint(folder, model)
    assert not model.training


def test_layer_types_of_other_blocks_do_not_pass(tmp_path: Path) -> None:
    """Field note R3, seen from the checkpoint: no key is wrong, only what the blocks compute."""
    model, plan = folded("gemma3", removed=(0,))
    save_folded(model, plan, tmp_path / "folded")
    types = read_json(tmp_path / "folded" / "config.json")["layer_types"]
    assert len(set(types)) == 2
    edit_config(tmp_path / "folded", layer_types=types[::-1])
    with pytest.raises(VerificationError, match="computes something else"):
        verify_checkpoint(tmp_path / "folded", model)


def test_a_checkpoint_of_another_class_does_not_pass(tmp_path: Path) -> None:
    model, _ = folded(shared=True)
    ordinary = copy.deepcopy(model)
    unfold_(ordinary)
    ordinary.save_pretrained(tmp_path / "ordinary")
    with pytest.raises(VerificationError, match="saved a FoldedLlamaForCausalLM, but it loads as LlamaForCausalLM"):
        verify_checkpoint(tmp_path / "ordinary", model)


def test_blocks_that_share_a_cache_slot_do_not_pass(saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Field note R1, as a class with a fault of its own would have it: without a cache all is well."""
    model, folder = saved
    build = modeling_llama.LlamaAttention.__init__

    def build_with_stale_index(self: Any, config: Any, layer_idx: int) -> None:
        build(self, config, min(layer_idx, 3))

    monkeypatch.setattr(modeling_llama.LlamaAttention, "__init__", build_with_stale_index)
    with pytest.raises(VerificationError, match="decoding with a KV cache differs from decoding without"):
        verify_checkpoint(folder, model)


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (lambda model, arguments: True, "the model in memory cannot be run: no such length"),
        (
            lambda model, arguments: model.config.name_or_path != "in memory",
            "the saved model cannot be run: no such length",
        ),
        (
            lambda model, arguments: arguments.get("use_cache"),
            "the saved model, decoding with a KV cache, cannot be run: no such length",
        ),
    ],
    ids=["in memory", "saved", "with a cache"],
)
def test_a_model_that_cannot_be_run_does_not_pass(
    saved: tuple[Any, Path], fails: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved
    model.config.name_or_path = "in memory"
    run = modeling_llama.LlamaForCausalLM.forward

    @functools.wraps(run)
    def run_or_fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        if fails(self, kwargs):
            raise ValueError("no such length\nand more")
        return run(self, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", run_or_fail)
    model.train()
    with pytest.raises(VerificationError, match=f"^{message}$"):
        verify_checkpoint(folder, model)
    assert model.training


def test_a_half_precision_checkpoint_is_held_to_its_own_precision(tmp_path: Path) -> None:
    model, plan = folded(shared=True)
    model.to(torch.bfloat16)
    verification = save_folded(model, plan, tmp_path / "folded")
    assert verification.weight_bytes == 2 * verification.num_parameters
    # Far less than 16 bits would take for rounding, but not rounding: in fp32 it shows.
    edit_weights(tmp_path / "folded", lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].mul_(1.02))
    with pytest.raises(VerificationError, match="computes something else"):
        verify_checkpoint(tmp_path / "folded", model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_buffers_that_a_change_of_format_rounded_are_no_other_model(dtype: torch.dtype, tmp_path: Path) -> None:
    """S8: `.to(bfloat16)` rounds the rotary frequencies in memory; those of the reloaded model are made anew."""
    model, plan = folded(shared=False, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    exact = model.model.rotary_emb.inv_freq.clone()
    model.to(dtype)
    assert not torch.equal(model.model.rotary_emb.inv_freq.float(), exact)
    verification = save_folded(model, plan, tmp_path / "folded")
    assert not verification.logits_identical and verification.reload_error < 1e-4


def test_buffers_of_another_config_are_another_model_in_16_bits_too(tmp_path: Path) -> None:
    model, plan = folded(shared=False)
    model.to(torch.bfloat16)
    save_folded(model, plan, tmp_path / "folded")
    edit_config(tmp_path / "folded", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(VerificationError, match="computes something else"):
        verify_checkpoint(tmp_path / "folded", model)


# ------------------------------------------------------------------------------- plans that do not fit


def refused(model: Any, plan: FoldPlan, error: type[Exception], message: str) -> None:
    """The plan is refused, and the model is as it was."""
    before = copy.deepcopy(model.config.to_dict())
    blocks = list(decoder_of(model).blocks)
    weights = {name: p.clone() for name, p in model.named_parameters() if not p.is_meta}
    model_class = type(model)
    with pytest.raises(error, match=message):
        fold_(model, plan)
    assert type(model) is model_class and model.config.to_dict() == before
    assert all(one is other for one, other in zip(decoder_of(model).blocks, blocks, strict=True))
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if not p.is_meta)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"num_blocks": 8}, r"the plan is for a model of 8 blocks \(some/model\); this LlamaForCausalLM has 6"),
        (
            {"model_type": "qwen3"},
            r"the plan is for model type 'qwen3' \(some/model\); this LlamaForCausalLM is 'llama'",
        ),
    ],
)
def test_a_plan_for_another_model_is_refused(source: dict[str, Any], message: str) -> None:
    values = {"model": "some/model", "model_type": "llama", "num_blocks": 6, **source}
    plan = FoldPlan.create(SourceModel(**values), removed=[1])
    model = tiny_model("llama")
    refused(model, plan, PlanError, message)
    with pytest.raises(PlanError, match=message):
        predicted_parameters(model, plan)


def test_each_donor_of_a_plan_can_be_made() -> None:
    """A name that plans take and folding does not know would end in a KeyError."""
    given = {"first", "last", "owner", "least_squares"}  # by a member, or by a fit
    assert set(get_args(Donor)) == given | DONORS.keys()


def test_a_group_of_mixed_kinds_changes_nothing() -> None:
    """Field note S6, after an earlier group that would have been fine."""
    model = tiny_model("gemma3")
    groups = [Group(blocks=(0, 1), donor="mean"), Group(blocks=(2, 3))]
    plan = FoldPlan.create(source_model_of(model), removed=[5], groups=groups)
    refused(model, plan, PlanError, r"group \[2, 3\] mixes kinds: layer_types is full_attention in block 2")


def test_a_folded_model_is_not_folded_again() -> None:
    model, plan = folded(removed=(), shared=True)
    with pytest.raises(PlanError, match="folded already; fold its source"):
        fold_(model, plan)
    unfold_(model)
    fold_(model, plan)


def test_an_unfolded_model_without_sublayers_says_what_it_is(tmp_path: Path) -> None:
    model = tiny_model("llama")
    groups = [Group(blocks=(4, 5), ranks=1, private=("norms", "scales"))]
    plan = FoldPlan.create(source_model_of(model), removed=[1], removed_mlp=[2], groups=groups)
    fold_(model, plan)
    again = "sublayers of this model are removed already; fold the source itself"
    refused(model, plan, PlanError, again)
    unfold_(model)
    rest = FoldPlan.create(plan.source, removed=[1], removed_mlp=[2])
    assert FoldPlan.from_json_dict(model.config.fold_plan) == rest
    assert not model.config.fold_layout["borrowed"] and not model.config.fold_layout["private"]
    refused(model, plan, PlanError, again)
    with pytest.raises(PlanError, match=r"cuts something else\. If it was unfolded, give the plan without groups"):
        save_folded(model, plan, tmp_path / "unfolded")
    assert save_folded(model, plan.model_copy(update={"groups": ()}), tmp_path / "unfolded").logits_identical


def test_an_ordinary_model_is_not_saved_with_a_plan_that_shares(tmp_path: Path) -> None:
    """`show` and `recover` read the plan beside it, and would look for groups that are not there."""
    model, plan = folded(removed=(1,), shared=True)
    unfold_(model)
    with pytest.raises(PlanError, match=r"it is of its source's own class.*If it was unfolded, give the plan without"):
        save_folded(model, plan, tmp_path / "unfolded")
    assert not list(tmp_path.iterdir())
    rest = plan.model_copy(update={"groups": ()})
    assert save_folded(model, rest, tmp_path / "unfolded").logits_identical
    lacking = FoldPlan.create(plan.source, removed=[1], removed_mlp=[2])
    with pytest.raises(PlanError, match="it is of its source's own class, and what shares weights or lacks sublayers"):
        save_folded(model, lacking, tmp_path / "lacking")


def test_a_model_that_shares_nothing_cannot_be_unfolded() -> None:
    model, _ = folded()
    with pytest.raises(PlanError, match="LlamaForCausalLM shares no weights; there is nothing to unfold"):
        unfold_(model)


def test_sublayers_of_an_unknown_family_are_refused_but_blocks_are_not() -> None:
    model = tiny_model("llama")
    model.config.model_type = "novel"
    source = source_model_of(model)
    for parts in ({"removed_mlp": [2]}, {"groups": [Group(blocks=(0, 1), sublayers=("mlp",))]}):
        plan = FoldPlan.create(source, removed=[5], **parts)  # type: ignore[arg-type]
        refused(model, plan, UnsupportedModelError, "sublayers of model type 'novel' are not known")
    fold_(model, FoldPlan.create(source, removed=[5]))
    assert len(decoder_of(model).blocks) == 5


def test_offloaded_weights_cannot_be_shared_and_nothing_is_changed(saved: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = saved
    device_map = {"model.layers.3": "disk", "model.layers.4": "disk"}
    device_map |= {f"model.layers.{index}": "cpu" for index in range(3)}
    device_map |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    groups = [Group(blocks=(0, 2), donor="last"), Group(blocks=(3, 4))]
    plan = FoldPlan.create(source_model_of(model), removed=[1], groups=groups)
    refused(model, plan, UnsupportedModelError, r"weights of blocks \[3, 4\] are offloaded")


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


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_is_not_saved_with_the_plan_of_another(tmp_path: Path, shared: bool) -> None:
    model, plan = folded(shared=shared)
    if shared:
        other = FoldPlan.create(plan.source, removed=plan.removed, groups=[Group(blocks=(2, 3), donor="mean")])
        says = r"another plan: the one in its config \(fold_plan\) cuts something else"
    else:
        other, says = FoldPlan.create(plan.source, removed=[1, 4]), "the plan keeps 4 blocks, the model has 5"
    with pytest.raises(PlanError, match=says):
        save_folded(model, other, tmp_path / "folded")
    assert list(tmp_path.iterdir()) == []
    save_folded(model, plan, tmp_path / "folded")


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


def test_a_model_that_puts_out_no_numbers_is_said_to(tmp_path: Path) -> None:
    model, plan = folded()
    decoder_of(model).blocks[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(VerificationError, match="not finite, in memory already"):
        save_folded(model, plan, tmp_path / "folded")
    assert list(tmp_path.iterdir()) == []


def test_a_wrapped_model_is_refused_as_it_is() -> None:
    model = tiny_model("llama")
    plan = FoldPlan.create(source_model_of(model), removed=[1], groups=[Group(blocks=(3, 4))])
    before = set(model.state_dict())
    for wrapped in (torch.compile(model), torch.nn.DataParallel(model)):
        with pytest.raises(UnsupportedModelError, match=r"(OptimizedModule|DataParallel) is no model of transformers"):
            fold_(wrapped, plan)
    assert type(model) is transformers.LlamaForCausalLM
    assert before == set(model.state_dict())
    assert type(model.config) is transformers.LlamaConfig


# ----------------------------------------------------------------------------------------- quantised sources


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
