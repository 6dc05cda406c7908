"""Folded models in other forms: nothing shared, and for llama.cpp, whose program is stood in for by one like it."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from foldgpt.artifacts import alone
from foldgpt.cli import app
from foldgpt.errors import ArtifactError, FoldGPTError, UnsupportedModelError, UsageError, VerificationError
from foldgpt.export import dense, export_dense, export_gguf, gguf, llama_cpp
from foldgpt.export.llama_cpp import LlamaCpp
from foldgpt.folding import fold_, save_folded, source_model_of
from foldgpt.history import history_of
from foldgpt.plan import FoldPlan, Group
from foldgpt.recovery_result import RecoveryResult
from foldgpt.report import write_model_card
from models import tiny_model, token_ids
from tiny import tiny_tokenizer


def _folded(folder: Path, family: str = "llama", **plan: Any) -> Path:
    model = tiny_model(family, vocab_size=128)
    made = FoldPlan.create(source_model_of(model, name="tiny"), **plan)
    fold_(model, made)
    notes = {"compensation.json": {"kept": False}, "sharing.json": {"of": "groups"}}
    save_folded(model, made, folder, tokenizer=tiny_tokenizer(128), notes=notes)
    write_model_card(folder)
    return folder


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A model without block 1 in which blocks 3 and 4 share their weights."""
    return _folded(tmp_path / "shared", removed=[1], groups=[Group(blocks=(3, 4))])


def _logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(token_ids(model, (2, 16))).logits


# ------------------------------------------------------------------------------------------------ dense


def test_a_dense_checkpoint_is_one_of_the_source_s_own_class_and_predicts_the_same(
    shared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "dense"
    export_dense(shared, out)
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert not {"fold_layout", "fold_plan", "auto_map"} & set(config) and not list(out.glob("*.py"))
    torch.testing.assert_close(_logits(out), _logits(shared), rtol=0, atol=0)
    weights = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (out, shared)]
    assert weights[0] > weights[1]
    plan = FoldPlan.load(out)
    assert plan.removed == (1,) and not plan.groups
    # What was said of what is shared holds no longer, and the rest does.
    assert (out / "compensation.json").is_file() and not (out / "sharing.json").exists()


def test_a_dense_checkpoint_was_recovered_once(shared: Path, tmp_path: Path) -> None:
    """The record of its recovery goes along, so the history must not tell of it as well."""
    text = {"texts": ["a.txt"], "context": 16, "num_held_out": 32}
    result = RecoveryResult({"loss": 2.0}, {"loss": 1.0}, 4, 4, 256, "tokens", 10, 1.0, [], {}, text)
    (shared / "recovery.json").write_text(json.dumps(result.to_json_dict()))
    export_dense(shared, tmp_path / "dense")
    assert history_of(tmp_path / "dense") == history_of(shared)
    assert not (tmp_path / "dense" / "history.json").exists()


def test_where_nothing_is_shared_a_dense_checkpoint_is_the_same_again(tmp_path: Path) -> None:
    folder = _folded(tmp_path / "folded", removed=[1, 2])
    export_dense(folder, tmp_path / "again")
    first, second = ((each / "model.safetensors").read_bytes() for each in (folder, tmp_path / "again"))
    assert first == second


def test_a_dense_checkpoint_has_the_tokenizer_s_sentencepiece_model_too(shared: Path, tmp_path: Path) -> None:
    # Some converters read nothing else; what it holds is not looked into where there is a tokenizer.json.
    (shared / "tokenizer.model").write_bytes(b"pieces")
    export_dense(shared, tmp_path / "dense")
    assert (tmp_path / "dense" / "tokenizer.model").read_bytes() == b"pieces"
    # One that only lies in the same folder, as beside a GGUF file, is another's.
    tokenizer = tiny_tokenizer(128)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "tokenizer.model").write_bytes(b"others")
    tokenizer.name_or_path = str(tmp_path / "downloads")
    model = tiny_model("llama", vocab_size=128)
    plan = FoldPlan.create(source_model_of(model, name="tiny"), removed=[1])
    fold_(model, plan)
    save_folded(model, plan, tmp_path / "folded", tokenizer=tokenizer)
    assert not (tmp_path / "folded" / "tokenizer.model").exists()


def test_a_model_that_lacks_sublayers_has_no_dense_form(tmp_path: Path) -> None:
    folder = _folded(tmp_path / "folded", removed_mlp=[2])
    with pytest.raises(UnsupportedModelError, match="lack an attention or an MLP, and no ordinary class"):
        export_dense(folder, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_what_is_no_folded_model_and_a_place_that_is_taken_are_refused(shared: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    for folder, why in ((tmp_path / "source", "holds no plan.json"), (tmp_path / "none", "is no folder")):
        with pytest.raises(UsageError, match=f"{why}.*nothing to export"):
            export_dense(folder, tmp_path / "out")
    with pytest.raises(ArtifactError, match="is the model"):
        export_dense(shared, shared, replace=True)


# ------------------------------------------------------------------------------------------------- GGUF


class _LlamaCpp:
    """Stands in for the programs: a converter that says nothing of patterns, and one that predicts.

    As llama.cpp does, it takes every third block for one with full attention, unless the file says which ones are.

    Attributes:
        adds_bos: whether each window begins with token 1.
        noise: added to logits.
        writes_pattern: whether the converter says which blocks slide.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.adds_bos, self.noise, self.writes_pattern = False, 0.0, False
        folder.mkdir()
        (folder / "convert_hf_to_gguf.py").write_text("")
        program = folder / "build" / "bin" / "llama-perplexity"
        program.parent.mkdir(parents=True)
        program.write_text("")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def run(self, command: Sequence[str], what: str) -> None:
        named = {command[i].lstrip("-"): command[i + 1] for i in range(1, len(command) - 1)}
        if command[0] == sys.executable:
            self._convert(Path(command[2]), Path(named["outfile"]))
        else:
            self._predict(Path(named["m"]), Path(named["f"]), int(named["c"]), Path(named["save-all-logits"]))

    def _convert(self, checkpoint: Path, out: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        writer = GGUFWriter(out, arch="gemma3")
        writer.add_string("test.checkpoint", str(checkpoint))
        writer.add_bos_token_id(1)
        writer.add_add_bos_token(self.adds_bos)
        if self.writes_pattern:
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
        writer.add_tensor("token_embd.weight", numpy.arange(6, dtype="float32").reshape(2, 3))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _predict(self, model: Path, text: Path, context: int, out: Path) -> None:
        fields = GGUFReader(model).fields
        checkpoint = fields["test.checkpoint"].contents()
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        config = model.config
        if "layer_types" in config:
            told = fields.get("gemma3.attention.sliding_window_pattern")
            slides = told.contents() if told else [(index + 1) % 3 != 0 for index in range(config.num_hidden_layers)]
            config.layer_types = ["sliding_attention" if each else "full_attention" for each in slides]
            model = type(model).from_pretrained(checkpoint, config=config, dtype=torch.float32)
        tokens = AutoTokenizer.from_pretrained(checkpoint)(text.read_text())["input_ids"]
        assert len(tokens) >= 2 * context
        seen = torch.tensor([[1, *tokens[1:context]] if self.adds_bos else tokens[:context]])
        with torch.no_grad():
            logits = model(seen).logits[0, context // 2 : -1]
        logits = (logits + self.noise * torch.randn(logits.shape)).numpy()
        most, width = logits.max(1), logits.shape[1] + logits.shape[1] % 2 + 4
        least = numpy.maximum(logits.min(1), most - 16)
        rows = numpy.zeros((len(logits), width), "<u2")
        scale = ((most - least) / 65535).astype("<f4")
        total = numpy.log(numpy.exp(logits - most[:, None]).sum(1))
        rows[:, :2] = scale[:, None].view("<u2")
        rows[:, 2:4] = (least - most - total).astype("<f4")[:, None].view("<u2")
        rows[:, 4 : 4 + logits.shape[1]] = numpy.rint((logits - least[:, None]) / scale[:, None]).clip(0)
        head = numpy.array([context, logits.shape[1], 1, *tokens[:context]], "<i4")
        out.write_bytes(b"_logits_" + head.tobytes() + rows.tobytes())


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _LlamaCpp:
    made = _LlamaCpp(tmp_path / "llama.cpp")
    monkeypatch.setattr(llama_cpp, "_run", made.run)
    return made


@pytest.mark.parametrize("adds_bos", [False, True])
def test_what_slides_is_written_into_the_file_where_removal_broke_the_pattern(
    tools: _LlamaCpp, tmp_path: Path, adds_bos: bool
) -> None:
    folder, out = _folded(tmp_path / "folded", "gemma3", removed=[1]), tmp_path / "model.gguf"
    tools.adds_bos = adds_bos
    found = export_gguf(folder, out, tools.folder)
    assert found.pattern == (True, False, True, True, False)
    assert 0 <= found.divergence < 1e-5 and found.num_bytes == out.stat().st_size
    reader = GGUFReader(out)
    assert reader.fields["gemma3.attention.sliding_window_pattern"].contents() == list(found.pattern)
    assert reader.fields["test.checkpoint"].contents() == str(folder), "all else is as it was"
    assert reader.tensors[0].data.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folded", "llama.cpp", "model.gguf"]


@pytest.mark.parametrize("removed", [(2, 5), (0, 1, 3, 4)], ids=["all slide", "none slides"])
def test_a_pattern_of_one_kind_is_told_as_well(tools: _LlamaCpp, tmp_path: Path, removed: tuple[int, ...]) -> None:
    folder = _folded(tmp_path / "folded", "gemma3", removed=removed)
    found = export_gguf(folder, tmp_path / "model.gguf", tools.folder)
    assert set(found.pattern) == {removed == (2, 5)} and found.divergence < 1e-5


def test_a_file_that_is_no_gguf_is_said(tools: _LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _folded(tmp_path / "folded", "gemma3", removed=[1])
    monkeypatch.setattr(tools, "_convert", lambda checkpoint, out: out.write_bytes(b"no such thing" * 99))
    with pytest.raises(FoldGPTError, match="wrote a file that cannot be read: GGUF magic"):
        export_gguf(folder, tmp_path / "model.gguf", tools.folder)


def test_what_a_config_says_of_its_text_is_read_and_chunks_slide(tools: _LlamaCpp, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    tools._convert(_folded(tmp_path / "folded", removed=[1]), file)
    kinds = ["chunked_attention", "full_attention"]
    assert gguf._with_pattern(file, {"text_config": {"layer_types": kinds}}) == (True, False)
    assert gguf._with_pattern(file, {"text_config": {"layer_types": kinds}}) is None, "it is there now"
    assert gguf._with_pattern(file, {"layer_types": kinds[1:]}) is None


def test_the_floor_of_what_is_stored_is_no_difference_and_rows_may_be_missing() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 12 * torch.randn(70, 400, generator=generator)
    stored = logits.maximum(logits.amax(-1, keepdim=True) - 16).log_softmax(-1)
    assert gguf._divergence(logits, stored) < 1e-9
    # Of the model's own predictions, in that order, row by row.
    other = torch.randn(70, 400, generator=generator).log_softmax(-1)
    own = torch.randn(70, 400, generator=generator).log_softmax(-1)
    expected = torch.nn.functional.kl_div(other, own, log_target=True, reduction="batchmean")
    reverse = torch.nn.functional.kl_div(own, other, log_target=True, reduction="batchmean")
    assert (
        gguf._divergence(own, other)
        == pytest.approx(float(expected), rel=1e-4)
        != pytest.approx(float(reverse), rel=1e-3)
    )
    assert gguf._divergence(torch.cat([own, own], 1), own) < 1e-9


@pytest.mark.parametrize("positions", [24, 4096])
def test_the_window_that_is_compared_is_no_longer_than_the_model_s(
    tools: _LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positions: int
) -> None:
    folder, lengths = _folded(tmp_path / "folded", removed=[1]), []
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
    predict = tools._predict
    monkeypatch.setattr(tools, "_predict", lambda *asked: (lengths.append(asked[2]), predict(*asked)))
    export_gguf(folder, tmp_path / "model.gguf", tools.folder)
    assert lengths == [min(positions, 1024)]


def test_another_tokenizer_is_said(tools: _LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _folded(tmp_path / "folded", removed=[1])
    assert export_gguf(folder, tmp_path / "a.gguf", tools.folder).same_tokens
    split = LlamaCpp.predictions

    def otherwise(*arguments: Any) -> Any:
        tokens_T, _ = split(*arguments)
        ids_1T = tokens_T.roll(1)[None]
        with torch.no_grad():
            logits_RV = AutoModelForCausalLM.from_pretrained(folder)(ids_1T).logits[0, ids_1T.shape[1] // 2 : -1]
        return ids_1T[0], logits_RV.log_softmax(-1)

    monkeypatch.setattr(LlamaCpp, "predictions", otherwise)
    written = _export(folder, "--to", "gguf", "--out", tmp_path / "b.gguf", "--llama-cpp", tools.folder)
    assert written.exit_code == 0 and "llama.cpp splits text into other tokens" in written.stdout


def test_a_converter_that_says_it_is_left_alone_and_where_all_blocks_attend_alike_nothing_is_said(
    tools: _LlamaCpp, tmp_path: Path
) -> None:
    tools.writes_pattern = True
    folder = _folded(tmp_path / "gemma", "gemma3", removed=[1])
    assert export_gguf(folder, tmp_path / "a.gguf", tools.folder).pattern is None
    tools.writes_pattern = False
    found = export_gguf(_folded(tmp_path / "llama", removed=[1]), tmp_path / "b.gguf", tools.folder)
    assert found.pattern is None and found.divergence < 1e-5
    assert "gemma3.attention.sliding_window_pattern" not in GGUFReader(tmp_path / "b.gguf").fields


def test_a_program_that_computes_something_else_leaves_no_file(
    tools: _LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = _folded(tmp_path / "folded", "gemma3", removed=[1]), tmp_path / "model.gguf"
    monkeypatch.setattr(gguf, "_with_pattern", lambda file, config: None)
    with pytest.raises(VerificationError, match=r"computes something else than the model: a KL divergence of \d"):
        export_gguf(folder, out, tools.folder)
    assert not out.exists()
    with pytest.raises(VerificationError):
        export_gguf(folder, tmp_path / "new" / "folder" / "model.gguf", tools.folder)
    assert not (tmp_path / "new").exists()
    # Unless it is not asked to.
    assert export_gguf(folder, out, tools.folder, verify=False).divergence is None
    monkeypatch.undo()


def test_rounding_passes_and_more_does_not(tools: _LlamaCpp, tmp_path: Path) -> None:
    folder = _folded(tmp_path / "folded", removed=[1])
    torch.manual_seed(0)
    tools.noise = 0.1  # half of its square, in nats
    found = export_gguf(folder, tmp_path / "a.gguf", tools.folder)
    assert found.divergence == pytest.approx(0.005, rel=0.2)
    tools.noise = 0.25
    with pytest.raises(VerificationError, match=r"tolerance 0.02"):
        export_gguf(folder, tmp_path / "b.gguf", tools.folder)
    export_gguf(folder, tmp_path / "b.gguf", tools.folder, outtype="q8_0")


def test_what_is_shared_is_copied_before_it_is_converted(
    tools: _LlamaCpp, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    convert = tools._convert
    monkeypatch.setattr(
        tools,
        "_convert",
        lambda checkpoint, out: (
            seen.append(json.loads((checkpoint / "config.json").read_text())["model_type"]),
            convert(checkpoint, out),
        ),
    )
    assert export_gguf(shared, tmp_path / "model.gguf", tools.folder).divergence < 1e-5
    assert seen == ["llama"]


def test_the_model_that_is_read_and_the_files_of_a_run_are_not_written_over(
    tools: _LlamaCpp, shared: Path, tmp_path: Path
) -> None:
    weights = (shared / "model.safetensors").read_bytes()
    with pytest.raises(ArtifactError, match="lies inside the model"):
        export_gguf(shared, shared / "model.safetensors", tools.folder, replace=True)
    assert (shared / "model.safetensors").read_bytes() == weights
    run = tmp_path / "run"
    run.mkdir()
    for name in ("run.json", "plan.json"):
        (run / name).write_text("{}")
    asked = ("--to", "gguf", "--out", run / "plan.json", "--llama-cpp", tools.folder, "--overwrite")
    assert _export(shared, *asked).exit_code != 0 and (run / "plan.json").read_text() == "{}"


def test_two_processes_do_not_write_one_file(tools: _LlamaCpp, shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    with alone(out), pytest.raises(ArtifactError):
        export_gguf(shared, out, tools.folder)
    assert export_gguf(shared, out, tools.folder).num_bytes == out.stat().st_size


def test_a_model_that_does_not_fit_in_memory_is_compared_as_well(
    tools: _LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _folded(tmp_path / "folded", removed=[1])
    load, loaded = gguf.load_source, []
    monkeypatch.setattr(
        gguf, "load_source", lambda *a, **k: loaded.append(load(*a, **{**k, "max_memory_gb": 1e-6})) or loaded[0]
    )
    assert export_gguf(folder, tmp_path / "model.gguf", tools.folder).divergence < 1e-5
    assert loaded[0].offloaded and loaded[0].model.get_input_embeddings().weight.is_meta


def test_what_is_missing_is_said_before_anything_is_converted(tools: _LlamaCpp, shared: Path, tmp_path: Path) -> None:
    def refused(match: str, kind: type[Exception] = UsageError, **changes: Any) -> None:
        asked: dict[str, Any] = {"folder": shared, "out": tmp_path / "model.gguf", "llama_cpp": tools.folder}
        with pytest.raises(kind, match=match):
            export_gguf(**{**asked, **changes})

    refused("no convert_hf_to_gguf.py in", llama_cpp=tmp_path)
    refused(r"unknown outtype 'q8'. Did you mean 'q8_0'\?", outtype="q8")
    refused("already exists", kind=ArtifactError, out=tools.folder / "convert_hf_to_gguf.py")
    tools.folder.joinpath("build/bin/llama-perplexity").unlink()
    refused("llama-perplexity is neither in .* nor on the PATH.*build it")


def _program(path: Path, code: str) -> Callable[[], None]:
    path.write_text(code)
    return lambda: llama_cpp._run([sys.executable, str(path)], "it refuses")


def test_a_program_that_fails_is_told_by_its_last_line(tmp_path: Path) -> None:
    _program(tmp_path / "good.py", "print('fine')")()
    with pytest.raises(FoldGPTError, match=r"^it refuses: ValueError: not this one$"):
        _program(tmp_path / "bad.py", "print('so far so good')\nraise ValueError('not this one')")()
    with pytest.raises(FoldGPTError, match=r"^it refuses: exit code 3$"):
        _program(tmp_path / "silent.py", "raise SystemExit(3)")()
    with pytest.raises(FoldGPTError, match=r"^it refuses: it was killed by signal 9, as where memory runs out$"):
        _program(tmp_path / "killed.py", "import os\nprint('all fine', flush=True)\nos.kill(os.getpid(), 9)")()
    with pytest.raises(FoldGPTError, match=r"it refuses: .*none cannot be run"):
        llama_cpp._run([str(tmp_path / "none")], "it refuses")


@pytest.mark.parametrize("spoil", [lambda c: c[:-2], lambda c: b"_" + c, lambda c: b"", lambda c: c + c])
def test_predictions_in_another_form_are_refused(
    tools: _LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[bytes], bytes]
) -> None:
    folder = _folded(tmp_path / "folded", removed=[1])
    predict = tools._predict

    def spoiled(model: Path, text: Path, context: int, out: Path) -> None:
        predict(model, text, context, out)
        out.write_bytes(spoil(out.read_bytes()))

    monkeypatch.setattr(tools, "_predict", spoiled)
    with pytest.raises(FoldGPTError, match="in a form that foldgpt does not know"):
        export_gguf(folder, tmp_path / "model.gguf", tools.folder)
    assert not (tmp_path / "model.gguf").exists()


# ----------------------------------------------------------------------------------------- command line


def _export(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_the_verb_writes_either_form(tools: _LlamaCpp, shared: Path, tmp_path: Path) -> None:
    dense = _export(shared, "--to", "dense", "--out", tmp_path / "dense", "-q")
    assert dense.exit_code == 0 and "loads as LlamaForCausalLM" in dense.stdout
    assert "removed" in (tmp_path / "dense" / "README.md").read_text()
    folder = _folded(tmp_path / "gemma", "gemma3", removed=[1])
    asked = (folder, "--to", "gguf", "--out", tmp_path / "m.gguf", "--llama-cpp", tools.folder)
    written = _export(*asked, "-q")
    assert written.exit_code == 0 and "full (F) or sliding (s), added to the file: sFssF" in written.stdout
    assert "KL divergence of llama.cpp's predictions: " in written.stdout
    assert "already exists" in _export(*asked).output
    values = json.loads(_export(*asked, "--overwrite", "--unverified", "--json", "-q").stdout)
    assert values["divergence"] is None and values["pattern"] == [True, False, True, True, False]


def test_the_verb_loads_as_it_is_told(
    tools: _LlamaCpp, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    for module in (gguf, dense):
        load = module.load_source
        monkeypatch.setattr(module, "load_source", lambda *a, load=load, **k: asked.append(k) or load(*a, **k))
    told = ("--device", "cpu", "--max-memory-gb", 2, "--trust-remote-code", "-q")
    _export(shared, "--to", "gguf", "--out", tmp_path / "m.gguf", "--llama-cpp", tools.folder, *told)
    _export(shared, "--to", "dense", "--out", tmp_path / "dense", *told)
    loading = {"device": "cpu", "max_memory_gb": 2, "trust_remote_code": True}
    assert asked == [loading, {"dtype": "float32", **loading}, loading]
    refused = _export(shared, "--to", "dense", "--out", tmp_path / "other", "--max-memory-gb", 1e-6)
    assert refused.exit_code != 0 and "does not fit in the memory that its weights may take" in refused.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "gguf"), "give a checkout of it (--llama-cpp)"),
        (("--to", "ggf"), "unknown form 'ggf' (--to). Did you mean 'gguf'?"),
        (("--to", "dense", "--outtype", "f16"), "--outtype with --to dense, which needs none: leave them out"),
    ],
)
def test_what_the_verb_cannot_do_is_refused(
    shared: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    refused = _export(shared, *arguments, "--out", tmp_path / "out")
    assert refused.exit_code == 2 and words in refused.output
    assert not (tmp_path / "out").exists()
