"""Models come whole or not at all, and what cannot be folded is refused by name."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from foldgpt.demo import demo_text
from foldgpt.errors import SourceError, UnsupportedModelError, UsageError
from foldgpt.evaluation.memory import peak_memory
from foldgpt.folding import fold_, save_folded, source_model_of
from foldgpt.plan import FoldPlan, Group
from foldgpt.sources import (
    load,
    load_gguf,
    load_source,
    load_tokenizer,
    locate,
    model_fingerprint,
    resolve,
    weights,
)
from tiny import tiny_tokenizer


def _tiny_config(**changes: Any) -> LlamaConfig:
    values = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**{**values, **heads, "tie_word_embeddings": False, **changes})


@pytest.fixture(scope="module")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    LlamaForCausalLM(_tiny_config()).save_pretrained(folder)
    tiny_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(_saved: Path, tmp_path: Path) -> Path:
    """A tiny Llama of four blocks with its tokenizer; each test gets its own copy."""
    return shutil.copytree(_saved, tmp_path / "tiny-llama")


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------ loading


def test_a_local_folder_loads_as_it_was_saved(folder: Path) -> None:
    source = load_source(str(folder), device="cpu")
    assert not source.model.training
    assert source.model.dtype == torch.float32
    assert (source.revision, source.offloaded) == (None, False)
    stored = load_file(folder / "model.safetensors")
    loaded = source.model.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[key], loaded[key]) for key in stored)


def test_the_dtype_can_be_chosen(folder: Path) -> None:
    model = load_source(str(folder), dtype="bfloat16", device="cpu").model
    assert model.dtype == torch.bfloat16
    # Chosen while it is made: a model that is converted has rounded rotary frequencies.
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    with pytest.raises(UsageError, match="Did you mean 'bfloat16'"):
        load_source(str(folder), dtype="bfloat6", device="cpu")


@pytest.mark.parametrize(
    ("cpu", "dtype", "says"), [("AVX2", "bfloat16", 1), ("AVX2", "float32", 0), ("AVX512", "bfloat16", 0)]
)
def test_formats_that_a_cpu_has_no_instructions_for_are_pointed_out_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cpu: str, dtype: str, says: int
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    load._say_if_slow.cache_clear()
    for _ in range(2):
        load_source(str(folder), dtype=dtype, device="cpu")
    assert capsys.readouterr().err.count("this CPU is likely to be slow in bfloat16") == says
    load._say_if_slow.cache_clear()


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"device 'xpu:3' is not available"):
        load_source(str(folder), device="xpu:3")
    # Not a list of all that torch has names for.
    for name, near in (
        ("nonsense", r"Valid choices: auto, cpu, cuda"),
        ("gpu", "Did you mean 'cuda'"),
        ("cudo:0", "'cuda'"),
    ):
        with pytest.raises(UsageError, match=rf"unknown device '{name}'.*{near}"):
            load_source(str(folder), device=name)


def test_a_device_without_float64_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fitted and verified in it would end in a TypeError, after all the work."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("mps"))
    assert load.device_of("auto") == torch.device("cpu")
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    with pytest.raises(UsageError, match="'mps' has no float64"):
        load.device_of("mps")


def test_the_tokenizer_is_saved_with_its_chat_template(folder: Path, tmp_path: Path) -> None:
    source = load_source(str(folder), device="cpu")
    (tmp_path / "out").mkdir()
    _edit_config(folder)
    shutil.copy(folder / "config.json", tmp_path / "out")
    source.tokenizer.save_pretrained(tmp_path / "out")
    again = load_tokenizer(str(tmp_path / "out"))
    assert again.chat_template == source.tokenizer.chat_template is not None
    text = "Hello wörld\n\n 12"
    assert (
        again(text)["input_ids"] == source.tokenizer(text)["input_ids"] == tiny_tokenizer(bos=True)(text)["input_ids"]
    )


def test_a_model_may_be_named_by_a_path(folder: Path) -> None:
    assert load_source(folder).spec == str(folder)
    assert load_tokenizer(folder).vocab_size == load_source(str(folder)).tokenizer.vocab_size


def test_an_adapter_is_not_put_on_a_model_in_silence(folder: Path) -> None:
    """transformers would: the model would be another, by an identity that says nothing of it."""
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(folder), LoraConfig(target_modules="all-linear"))
    adapted.save_pretrained(folder)
    with pytest.raises(SourceError, match=r"holds an adapter \(adapter_config.json\) beside the model. Merge it"):
        load_source(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"has no config.json\. It holds an adapter alone: merge it into its"):
        load_source(str(folder))


def test_what_is_kept_beside_the_device_counts_as_offloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an accelerator is the main device, accelerate calls what does not fit there "cpu"."""
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained

    def apart(*args: Any, **kwargs: Any) -> Any:
        model, report = from_pretrained(*args, **kwargs)
        accelerate.cpu_offload(model.model.layers[1], torch.device("cpu"))
        return model, report

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", apart)
    assert load_source(str(folder), device="cpu").offloaded


def test_a_model_larger_than_the_memory_stays_on_disk_and_computes_the_same(folder: Path) -> None:
    whole = load_source(str(folder), device="cpu")
    some_blocks = sum(p.numel() * 4 for p in whole.model.model.layers[:2].parameters())
    part = load_source(str(folder), device="cpu", max_memory_gb=(some_blocks + 2 * 128 * 32 * 4) / 1e9)
    assert part.offloaded
    assert any(parameter.is_meta for parameter in part.model.parameters())
    assert part._offload_folder is not None
    assert list(Path(part._offload_folder.name).iterdir()) == [], "blocks must be read from the checkpoint itself"
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(part.model(ids).logits, whole.model(ids).logits)
    assert part.fingerprint == whole.fingerprint


# -------------------------------------------------------------------------------------------- fingerprint


@pytest.mark.parametrize("whole", [True, False])
def test_the_fingerprint_is_of_the_content(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    if not whole:
        monkeypatch.setattr(weights, "_HASHED_WHOLE_BYTES", 0)
    first = model_fingerprint(folder)
    assert first.startswith("full:" if whole else "sampled:")
    assert model_fingerprint(shutil.copytree(folder, tmp_path / "elsewhere")) == first
    _edit_config(folder, transformers_version="0.0.0")
    assert model_fingerprint(folder) == first
    _edit_config(folder, rms_norm_eps=1.0)
    assert model_fingerprint(folder) != first
    elsewhere = tmp_path / "elsewhere"
    _edit_weights(elsewhere, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"][5, 5].add_(1))
    assert model_fingerprint(elsewhere) != first


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{parent}/tiny-lama", r"no model at .*Did you mean '.*tiny-llama'"),
        ("{parent}/nowhere/model.gguf", r"The folder .*nowhere does not exist"),
        ("./model.gguf", "no model at ./model.gguf"),
        ("{parent}", "has no config.json"),
        ("{parent}/tiny-llama/config.json", "not a GGUF file"),
        ("demo:smollm2", "Did you mean 'smollm2-135m'"),
    ],
)
def test_a_model_that_is_not_there(folder: Path, spec: str, message: str) -> None:
    with pytest.raises((SourceError, UsageError), match=message):
        resolve(spec.format(parent=folder.parent))


def test_a_revision_needs_a_hub_model(folder: Path) -> None:
    with pytest.raises(UsageError, match="is on this machine"):
        resolve(str(folder), revision="main")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            huggingface_hub.errors.LocalEntryNotFoundError("Got: no route to the hub\na page of advice"),
            "no route to the hub",
        ),
        (OSError(28, "No space left on device"), r"\[Errno 28\] No space left on device"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_what_cannot_be_fetched_is_one_short_message_with_its_reason(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(locate, "snapshot_download", failing)
    monkeypatch.chdir(tmp_path)
    expected = rf"no folder owner/name, and no model of this name could be fetched from the hub: {reason}\. Give"
    with pytest.raises(SourceError, match=expected) as caught:
        load_source("owner/name")
    assert "advice" not in str(caught.value)


def test_a_hub_model_may_have_the_name_of_a_folder_for_its_owner(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`a/b` may be a mistyped path as well, so an error names what lies in the folder."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = shutil.copytree(folder, tmp_path / "snapshots" / commit)
    (tmp_path / "owner" / "names").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locate, "snapshot_download", lambda *_, **__: str(snapshot))
    assert resolve("owner/name") == snapshot

    def failing(*_: Any, **__: Any) -> None:
        raise TimeoutError

    monkeypatch.setattr(locate, "snapshot_download", failing)
    with pytest.raises(SourceError, match=r"no folder owner/name, .* Did you mean 'owner/names'\?"):
        resolve("owner/name")


def test_a_hub_snapshot_gives_its_commit(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = shutil.copytree(folder, tmp_path / "snapshots" / commit)
    monkeypatch.setattr(locate, "snapshot_download", lambda *_, **__: str(snapshot))
    assert load_source("owner/name", device="cpu").revision == commit


class Hub:
    """A hub of one repository, whose files are those of a folder; what is fetched goes into a snapshot."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, files: Path, place: Path) -> None:
        self.files = files
        self.place = place / "snapshots" / self.commit
        self.revisions: list[str | None] = []

    def snapshot_download(self, repository: str, *, revision: str | None = None, **patterns: Any) -> str:
        self.revisions.append(revision)
        names = [str(path.relative_to(self.files)) for path in self.files.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, **patterns):
            (self.place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.files / name, self.place / name)
        return str(self.place)

    @property
    def fetched(self) -> set[str]:
        return {str(path.relative_to(self.place)) for path in self.place.rglob("*") if path.is_file()}


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with the tiny Llama, and beside it what other programs need of it."""
    hub = Hub(folder, tmp_path / "cache")
    for name in (
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "original/params.json",
        "original/tokenizer.model",
        "onnx/model.safetensors",
        "onnx/config.json",
        "checkpoint-500/model.safetensors",
        "checkpoint-500/trainer_state.json",
        "pytorch_model.bin",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"large")
    monkeypatch.setattr(locate, "snapshot_download", hub.snapshot_download)
    return hub


@pytest.mark.parametrize("sharded", [False, True])
def test_only_the_weights_that_are_read_are_fetched(folder: Path, hub: Hub, sharded: bool) -> None:
    if sharded:
        (folder / "model.safetensors").unlink()
        LlamaForCausalLM(_tiny_config()).save_pretrained(folder, max_shard_size="50KB")
        # An index may name files in a folder of their own.
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        last = sorted(set(index["weight_map"].values()))[-1]
        (folder / "shards").mkdir()
        (folder / last).rename(folder / "shards" / last)
        index["weight_map"] = {
            key: f"shards/{name}" if name == last else name for key, name in index["weight_map"].items()
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("additional_chat_templates/tools.jinja", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{{ messages }}")
    own = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    own = {name for name in own if not name.startswith(("consolidated", "original/", "onnx/", "checkpoint", "pytorch"))}
    source = load_source("owner/name", device="cpu", revision="main")
    assert source.revision == hub.commit
    assert hub.fetched == own
    assert hub.revisions == ["main", hub.commit], "a branch may move between the two"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "not a decoder-only language model"),
        ({"model_type": "no_such_type"}, "cannot read .*config.json"),
    ],
)
def test_what_the_config_refuses_is_refused_before_the_weights_are_fetched(
    folder: Path, hub: Hub, changes: dict[str, Any], message: str
) -> None:
    _edit_config(folder, **changes)
    with pytest.raises(SourceError, match=message):
        resolve("owner/name")
    assert "config.json" in hub.fetched
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]


def test_a_hub_model_with_its_own_code_is_fetched_with_it(folder: Path, hub: Hub) -> None:
    """Whether the code is trusted is asked when the model is loaded."""
    (folder / "own.py").write_text(OWN_CODE.replace('"llama"', '"my_own"'))
    (folder / "parts").mkdir()
    (folder / "parts" / "more.py").write_text("")
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    _edit_config(folder, model_type="my_own", auto_map=auto_map)
    assert {"own.py", "parts/more.py", "model.safetensors"} <= {
        str(path.relative_to(hub.place)) for path in resolve("owner/name").rglob("*")
    }
    with pytest.raises(UnsupportedModelError, match="--trust-remote-code"):
        load_source("owner/name")
    assert type(load_source("owner/name", trust_remote_code=True).model).__name__ == "OwnForCausalLM"


def test_a_hub_repository_without_a_config_is_no_model(folder: Path, hub: Hub) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"owner/name has no config\.json"):
        resolve("owner/name")


def test_a_broken_index_is_named_when_the_weights_are_read(folder: Path, hub: Hub) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(SourceError, match="is not a safetensors index"):
        load_source("owner/name", device="cpu")


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (transformers.BertConfig, transformers.BertForMaskedLM),
        (transformers.BertConfig, transformers.BertModel),
        (transformers.T5Config, transformers.T5ForConditionalGeneration),
        (transformers.BartConfig, transformers.BartForConditionalGeneration),
        (transformers.ViTConfig, transformers.ViTModel),
        (transformers.LlamaConfig, transformers.LlamaForSequenceClassification),
    ],
)
def test_what_is_not_a_decoder_is_refused(tmp_path: Path, config: type, model: type) -> None:
    config(architectures=[model.__name__]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"{model.__name__}.* is not a decoder-only language model"):
        load_source(str(tmp_path))


def test_gpt_neox_is_a_decoder_although_its_config_says_otherwise(tmp_path: Path) -> None:
    transformers.GPTNeoXConfig(architectures=["GPTNeoXForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="no weights in safetensors"):
        load_source(str(tmp_path))


def test_a_quantised_checkpoint_is_refused(folder: Path) -> None:
    _edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match=r"quantised \(gptq\)\. Fold full-precision weights"):
        load_source(str(folder))


@pytest.mark.parametrize("value", [{}, {"bits": 4}, ["gptq"]])
def test_a_checkpoint_quantised_in_an_unknown_way_is_refused(folder: Path, value: Any) -> None:
    _edit_config(folder, quantization_config=value)
    with pytest.raises(UnsupportedModelError, match=r"quantised \(unknown method\)"):
        load_source(str(folder))


def test_a_config_that_says_it_is_not_quantised_is_taken_at_its_word(folder: Path, tmp_path: Path) -> None:
    _edit_config(folder, quantization_config=None)
    source = load_source(str(folder), device="cpu")
    plan = FoldPlan.create(source_model_of(source.model), removed=[2])
    fold_(source.model, plan)
    save_folded(source.model, plan, tmp_path / "folded", tokenizer=source.tokenizer)
    assert load_source(str(tmp_path / "folded"), device="cpu").model.config.num_hidden_layers == 3


def test_a_checkpoint_with_its_own_code_is_refused_unless_trusted(folder: Path) -> None:
    _edit_config(folder, model_type="my_own", auto_map={"AutoConfig": "own.Config"})
    with pytest.raises(UnsupportedModelError, match="--trust-remote-code"):
        load_source(str(folder))


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_checkpoint_with_its_own_code_is_folded_saved_and_measured(folder: Path, tmp_path: Path) -> None:
    (folder / "own.py").write_text(OWN_CODE)
    _edit_config(folder, auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"})
    source = load_source(str(folder), trust_remote_code=True)
    assert type(source.model).__name__ == "OwnForCausalLM"
    plan = FoldPlan.create(source_model_of(source.model), removed=[2])
    fold_(source.model, plan)
    out = tmp_path / "folded"
    save_folded(source.model, plan, out, tokenizer=source.tokenizer)
    assert (out / "own.py").is_file()
    folded = load_source(str(out), trust_remote_code=True)
    assert type(folded.model).__name__ == "OwnForCausalLM" and folded.model.config.num_hidden_layers == 3
    assert peak_memory(out, trust_remote_code=True).peak_rss > 0
    again = load_source(str(folder), trust_remote_code=True).model
    shared = FoldPlan.create(source_model_of(again), groups=[Group(blocks=(0, 1))])
    with pytest.raises(UnsupportedModelError, match="code of its own"):
        fold_(again, shared)
    assert len({id(block.mlp.up_proj.weight) for block in again.model.layers}) == 4


def test_a_corrupt_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(SourceError, match=r"config\.json is not valid JSON"):
        load_source(str(folder))


@pytest.mark.parametrize("damage", ["truncated", "header", "length", "empty"])
def test_a_corrupt_safetensors_file_is_named(folder: Path, damage: str) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    damaged = {
        "truncated": content[:-100],
        "header": content[:8] + b"x" + content[9:],
        "length": struct.pack("<Q", 1 << 60) + content[8:],
        "empty": b"",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(SourceError, match=r"corrupt safetensors file .*model\.safetensors"):
        load_source(str(folder))


def test_a_missing_shard_is_named(folder: Path) -> None:
    model = LlamaForCausalLM(_tiny_config())
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    assert not load_source(str(folder), device="cpu").offloaded
    next(folder.glob("model-00002-*")).unlink()
    with pytest.raises(SourceError, match=r"incomplete: model-00002-of-\d+\.safetensors"):
        load_source(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"missing: model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda t: t.update({"model.layers.9.x": torch.ones(1)}), r"not part of the model: model\.layers\.9\.x"),
        (lambda t: t.update({"model.norm.weight": torch.ones(5)}), "cannot load|of another shape"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(folder: Path, change: Any, message: str) -> None:
    _edit_weights(folder, change)
    with pytest.raises(SourceError, match=message):
        load_source(str(folder), device="cpu")


def test_fewer_blocks_in_the_config_than_in_the_file_are_refused(folder: Path) -> None:
    _edit_config(folder, num_hidden_layers=3)
    with pytest.raises(SourceError, match=r"not part of the model: model\.layers\.3\..* and 6 more"):
        load_source(str(folder), device="cpu")


def test_a_model_without_a_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(SourceError, match="no tokenizer that can be read"):
        load_source(str(folder), device="cpu")


@pytest.mark.parametrize("content", [b"", b"not a GGUF file at all", b"GGUF" + bytes(40)])
def test_a_corrupt_gguf_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(SourceError, match=r"corrupt or truncated GGUF file .*model\.gguf"):
        load_source(str(tmp_path / "model.gguf"))


# --------------------------------------------------------------------------------------------- real models


@pytest.fixture(scope="module")
def smollm2_gguf() -> Path:
    folder = resolve("demo:smollm2-135m")
    return next(folder.parent.parent.glob("payloads/*/SmolLM2*.gguf"))


@pytest.mark.real_model
def test_a_gguf_model_can_be_saved_and_is_the_demo_model(smollm2_gguf: Path, tmp_path: Path) -> None:
    model, tokenizer = load_gguf(smollm2_gguf, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    demo = load_source("demo:smollm2-135m", device="cpu")
    ids = demo.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, demo.model(ids).logits)
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


@pytest.mark.real_model
def test_a_truncated_gguf_file_is_refused(smollm2_gguf: Path, tmp_path: Path) -> None:
    with smollm2_gguf.open("rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(50_000_000))
    with pytest.raises(SourceError, match=r"corrupt or truncated GGUF file .*cut\.gguf"):
        load_source(str(tmp_path / "cut.gguf"))


@pytest.mark.real_model
@pytest.mark.parametrize(("name", "adds_bos"), [("smollm2-135m", False), ("gemma3-270m", True)])
def test_a_demo_tokenizer_survives_save_and_load(tmp_path: Path, name: str, adds_bos: bool) -> None:
    tokenizer = load_tokenizer(f"demo:{name}")
    shutil.copy(resolve(f"demo:{name}") / "config.json", tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    text = demo_text("wikipedia")[0][:50_000] + "\n\n\n naïve — “日本語” 🙂\tdon't  1999   12"
    ids = tokenizer(text)["input_ids"]
    assert again(text)["input_ids"] == ids
    assert (ids[0] == tokenizer.bos_token_id) == adds_bos
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.real_model
def test_smollm2_cuts_blanks_before_digits_as_in_training() -> None:
    tokenizer = load_tokenizer("demo:smollm2-135m")
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


def test_each_process_of_several_takes_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert load.device_of("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert load.device_of("auto") == torch.device("cuda:1")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert load.device_of("auto") == torch.device("cpu")
