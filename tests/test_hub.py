"""Uploading, with a stand-in for the hub: what is sent, where to, and what is said when it is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from typer.testing import CliRunner

from foldgpt.artifacts import write_json, write_text
from foldgpt.cli import app
from foldgpt.errors import ArtifactError, FoldGPTError, UsageError
from foldgpt.evaluation import Measured
from foldgpt.history import History, Training
from foldgpt.hub import check_upload, push
from foldgpt.plan import Compensation, FoldPlan, SourceModel
from foldgpt.report import write_model_card
from report_inputs import evaluation, plan


class StandIn:
    """Notes what it is asked for."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    error: ClassVar[Exception | None] = None
    sent: ClassVar[dict[str, str]] = {}
    came_from: ClassVar[set[Path]] = set()
    there: ClassVar[list[str]] = []

    def create_repo(self, repo_id: str, **arguments: Any) -> huggingface_hub.RepoUrl:
        if StandIn.error is not None:
            raise StandIn.error
        StandIn.calls.append(("create_repo", {"repo_id": repo_id, **arguments}))
        # As the hub does, which puts the account before a name alone.
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else f'me/{repo_id}'}")

    def create_branch(self, repo_id: str, **arguments: Any) -> None:
        StandIn.calls.append(("create_branch", {"repo_id": repo_id, **arguments}))

    def list_repo_refs(self, repo_id: str) -> Any:
        return SimpleNamespace(branches=[SimpleNamespace(name="main")])

    def list_repo_files(self, repo_id: str, **arguments: Any) -> list[str]:
        return StandIn.there

    def upload_folder(self, **arguments: Any) -> None:
        folder = arguments["folder_path"]
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        StandIn.sent = {name: path.read_text("utf-8") for name, path in files.items()}
        StandIn.came_from = {path.resolve().parent for path in files.values() if path.is_symlink()}
        StandIn.calls.append(("upload_folder", arguments))


class Refused(HfHubHTTPError):
    """An answer of the hub, without one."""

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setattr(huggingface_hub, "HfApi", StandIn)
    StandIn.calls, StandIn.error, StandIn.there = [], None, []
    return StandIn


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in ("folded", "recovered"):
        plan().save(tmp_path / "run" / name / "plan.json")
        write_text(tmp_path / "run" / name / "config.json", "{}")
        write_model_card(tmp_path / "run" / name, evaluation=evaluation())
    return tmp_path / "run"


def test_arguments_are_those_the_real_api_takes() -> None:
    """The stand-in takes anything; the real one must take what it is given."""
    import inspect

    real = huggingface_hub.HfApi
    for method, names in {
        "create_repo": ("repo_type", "private", "exist_ok"),
        "create_branch": ("branch", "repo_type", "exist_ok"),
        "list_repo_files": ("repo_id", "revision"),
        "list_repo_refs": ("repo_id",),
        "upload_folder": ("repo_id", "folder_path", "repo_type", "revision", "commit_message", "delete_patterns"),
    }.items():
        assert set(names) <= set(inspect.signature(getattr(real, method)).parameters)


def test_a_checkpoint_goes_up_with_its_card(hub: type[StandIn], run: Path) -> None:
    assert push(run / "folded", "me/small", private=True) == "https://huggingface.co/me/small"
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]
    assert hub.calls[0][1] == {"repo_id": "me/small", "repo_type": "model", "private": True, "exist_ok": True}
    assert hub.came_from == {run / "folded"} and hub.calls[1][1]["revision"] is None
    assert hub.sent["README.md"] == (run / "folded" / "README.md").read_text("utf-8")


def test_of_a_run_the_final_model_goes_up(hub: type[StandIn], run: Path) -> None:
    push(run, "me/small", revision="rank-16")
    assert hub.calls[1] == (
        "create_branch",
        {"repo_id": "me/small", "branch": "rank-16", "repo_type": "model", "exist_ok": True},
    )
    assert hub.came_from == {run / "recovered"} and hub.calls[2][1]["revision"] == "rank-16"


def test_a_name_without_an_owner_goes_where_the_repository_was_made(hub: type[StandIn], run: Path) -> None:
    assert push(run, "small", revision="x") == "https://huggingface.co/me/small"
    assert [arguments["repo_id"] for _, arguments in hub.calls] == ["small", "me/small", "me/small"]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (LocalTokenNotFoundError("x"), FoldGPTError, "hf auth login"),
        (Refused("403 Forbidden: no rights"), FoldGPTError, "the hub refuses me/small: 403 Forbidden"),
        (ConnectionError("no route"), FoldGPTError, "cannot reach the hub: no route"),
    ],
)
def test_refusals_are_one_message(
    hub: type[StandIn], run: Path, error: Exception, kind: type[Exception], message: str
) -> None:
    hub.error = error
    with pytest.raises(kind, match=message):
        push(run, "me/small")


def test_without_a_network_it_is_one_message(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    """The hub's own client, at an address where nobody answers."""
    real = functools.partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9", token="hf_none")
    monkeypatch.setattr(huggingface_hub, "HfApi", real)
    with pytest.raises(FoldGPTError, match="cannot reach the hub: "):
        push(run, "me/small")


def test_what_is_no_checkpoint_is_not_sent(hub: type[StandIn], run: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="neither a folded checkpoint nor"):
        push(tmp_path / "nothing", "me/small")
    (run / "recovered" / "README.md").unlink()
    with pytest.raises(ArtifactError, match=r"recovered lacks README\.md"):
        push(run, "me/small")
    write_text(run / "recovered" / "README.md", "# No metadata\n")
    with pytest.raises(ArtifactError, match="has no metadata"):
        push(run, "me/small")
    write_text(run / "recovered" / "README.md", "---\nlicense: [\n---\n# Broken\n")
    with pytest.raises(ArtifactError, match="could not read the model card"):
        push(run, "me/small")
    assert hub.calls == []


def test_on_the_command_line(hub: type[StandIn], run: Path) -> None:
    shown = CliRunner().invoke(app, ["push", str(run), "me/small", "--private", "--quiet"])
    assert shown.exit_code == 0 and "https://huggingface.co/me/small" in shown.output
    assert hub.calls[0][1]["private"] is True


def test_a_name_that_is_none_is_refused_before_the_hub_is_asked(hub: type[StandIn], run: Path) -> None:
    with pytest.raises(UsageError, match=r"'me/small/er' is not the name of a repository"):
        push(run, "me/small/er")
    assert hub.calls == []


def test_what_is_no_part_of_a_checkpoint_stays(hub: type[StandIn], run: Path) -> None:
    folder = run / "folded"
    for name in ("model.safetensors", "notes[1].txt", "report.html", ".foldgpt-partial-1", "weights.bak"):
        write_text(folder / name, "x")
    write_text(folder / "logs" / "events.json", "{}")
    write_text(folder / "additional_chat_templates" / "tool.jinja", "x")
    push(folder, "me/small")
    kept = set(hub.sent)
    assert kept == {
        "README.md",
        "config.json",
        "model.safetensors",
        "notes[1].txt",
        "plan.json",
        "additional_chat_templates/tool.jinja",
    }
    upload = check_upload(folder, "me/small")
    assert set(upload.files) == kept and upload.files["model.safetensors"] == 1
    assert upload.left == [".foldgpt-partial-1", "logs", "report.html", "weights.bak"]


def test_a_dry_run_lists_what_would_go_up_and_asks_nobody(hub: type[StandIn], run: Path) -> None:
    write_text(run / "recovered" / "model.safetensors", "x" * 2_000_000)
    write_text(run / "recovered" / "report.html", "x")
    shown = CliRunner().invoke(app, ["push", str(run), "me/small", "--dry-run"])
    assert shown.exit_code == 0 and hub.calls == []
    assert "2.0 MB  model.safetensors" in shown.output
    assert f"from {run / 'recovered'} to me/small" in shown.output and "left out" in shown.output
    assert CliRunner().invoke(app, ["push", str(run), "me//small", "--dry-run"]).exit_code == 2


def test_of_a_run_that_is_not_finished_no_model_goes_up(hub: type[StandIn], run: Path) -> None:
    """It may be one that was to be trained."""
    write_json(run / "run.json", {"format": "foldgpt.run", "stages": {}})
    # A page can be built of an unfinished run too.
    write_text(run / "report.html", "x")
    with pytest.raises(ArtifactError, match=r"is not finished.*foldgpt run .*recipe\.yaml --out"):
        push(run, "me/small")
    push(run / "folded", "me/small")
    assert hub.came_from == {run / "folded"}
    report = {"inputs": "i", "outputs": {}, "seconds": 1.0, "places": []}
    write_json(run / "run.json", {"format": "foldgpt.run", "stages": {"report": report}})
    push(run, "me/small")
    assert hub.came_from == {run / "recovered"}


def test_nothing_is_told_of_where_things_lie(hub: type[StandIn], run: Path, tmp_path: Path) -> None:
    folder, mine = run / "folded", str(tmp_path / "client" / "secret.txt")
    source = SourceModel(model=str(tmp_path / "client" / "model"), model_type="llama", num_blocks=12)
    origin = {"selector": "bi", "calibration": {"specs": [mine, "demo:wikipedia"], "fingerprint": "f"}}
    texts = Compensation(texts=(mine, "hub:name?split=train"), context=8, num_tokens=64, fingerprint="f")
    FoldPlan.create(source, removed=[4], compensation=texts, origin=origin).save(folder / "plan.json")
    told = json.loads((folder / "plan.json").read_text("utf-8"))
    write_json(folder / "config.json", {"model_type": "foldgpt_llama", "fold_plan": told, "texts": ["a/b"]})
    write_json(folder / "recovery.json", {"text": {"texts": [mine], "context": 8}, "num_steps": 3})
    history = History(calibration=[mine, "demo:wikipedia"], training=[Training([mine], 64)])
    write_json(folder / "history.json", history.to_json_dict())
    push(folder, "me/small")
    assert json.loads(hub.sent["history.json"])["calibration"] == ["secret.txt", "demo:wikipedia"]
    assert "client" not in "".join(hub.sent.values()) and str(tmp_path) not in "".join(hub.sent.values())
    plan = FoldPlan.from_json_dict(json.loads(hub.sent["plan.json"]), "plan.json")
    assert plan.source.model == "model" and plan.compensation is not None
    assert plan.compensation.texts == ("secret.txt", "hub:name?split=train")
    assert plan.origin["calibration"]["specs"] == ["secret.txt", "demo:wikipedia"]
    config = json.loads(hub.sent["config.json"])
    assert config["fold_plan"] == json.loads(hub.sent["plan.json"])
    # What a config says beside that is not ours.
    assert config["texts"] == ["a/b"]
    assert json.loads(hub.sent["recovery.json"]) == {"text": {"texts": ["secret.txt"], "context": 8}, "num_steps": 3}
    # On this machine they stay as they are.
    assert json.loads((folder / "plan.json").read_text("utf-8")) == told


def test_the_card_tells_texts_of_one_name_apart_without_their_folders(hub: type[StandIn], run: Path) -> None:
    made, (first, second) = evaluation(), ("/home/client/a/test.txt", "/home/client/b/test.txt")
    assert made.baseline is not None and made.ratios is not None and made.folded.perplexity is not None

    def measured(model: Measured) -> Measured:
        assert model.perplexity is not None
        scores = dataclasses.replace(model.perplexity, protocol={"texts": ["test.txt"], "context": 512})
        other = dataclasses.replace(scores, value=2 * scores.value)
        return dataclasses.replace(model, perplexity=scores, text=first, further_perplexities={second: other})

    reused = {second: ["training"]}
    write_model_card(
        run / "folded",
        evaluation=dataclasses.replace(
            made,
            folded=dataclasses.replace(measured(made.folded), reused=reused),
            baseline=measured(made.baseline),
            ratios={**made.ratios, f"perplexity.{second}": 1.5},
        ),
    )
    push(run / "folded", "me/small")
    card = hub.sent["README.md"]
    assert "client" not in card
    assert "| perplexity, test.txt (1) | 20 | 25 | 1.25× |" in card
    assert "| perplexity, test.txt (2) | 40 | 50 | 1.50× |" in card
    assert "texts test.txt (2)" in card and "test.txt (2) was also used for training" in card


@pytest.mark.parametrize(
    ("there", "is_ours"),
    [
        ([".gitattributes", "README.md", "LICENSE"], True),
        ([".gitattributes", "config.json", "plan.json", "model.safetensors"], True),
        ([".gitattributes", "config.json", "model.safetensors", "tokenizer.json", "vocab.json"], False),
    ],
)
def test_another_model_is_replaced_only_when_asked(
    hub: type[StandIn], run: Path, there: list[str], is_ours: bool
) -> None:
    hub.there = there
    if not is_ours:
        shown = CliRunner().invoke(app, ["push", str(run), "me/large"])
        assert shown.exit_code == 2
        assert "config.json, model.safetensors, tokenizer.json, …" in shown.output and "--overwrite" in shown.output
        assert [name for name, _ in hub.calls] == ["create_repo"]
        # A branch of its own replaces nothing.
        assert CliRunner().invoke(app, ["push", str(run), "me/large", "--revision", "folded"]).exit_code == 0
    shown = CliRunner().invoke(app, ["push", str(run), "me/large", *(() if is_ours else ("--overwrite",))])
    assert shown.exit_code == 0 and hub.calls[-1][0] == "upload_folder"


def test_weights_of_an_earlier_upload_do_not_stay_beside_those_of_this_one(hub: type[StandIn], run: Path) -> None:
    """transformers would load model.safetensors, which lies there from before, and not the shards."""
    push(run, "me/small")
    stale = hub.calls[-1][1]["delete_patterns"]
    there = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "recovery.json",
        "modeling_foldgpt.py",
    ]
    others = ["onnx/model.onnx", "picture.png", "LICENSE", "onnx/model.safetensors", "notes.json"]
    assert list(huggingface_hub.utils.filter_repo_objects([*there, *others], allow_patterns=stale)) == there
