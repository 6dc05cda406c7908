"""The model card is one that the Hub reads, and says how to load what it lies beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from foldgpt.artifacts import write_json
from foldgpt.errors import ArtifactError
from foldgpt.plan import FoldPlan, Group, SourceModel
from foldgpt.report import write_model_card
from report_inputs import compensated, compensation, evaluation, plan, recovery


def checkpoint(folder: Path, made: FoldPlan) -> Path:
    made.save(folder / "plan.json")
    return folder


def test_the_hub_reads_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage:\n- en\ntags: [a]\n---\n# Tiny\n---\n", "utf-8"
    )
    path = write_model_card(checkpoint(tmp_path / "folded", plan()), evaluation=evaluation(), source=source)
    assert path == tmp_path / "folded" / "README.md"
    card = ModelCard.load(path)
    assert card.data.base_model == "someone/tiny-llama"
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["en"]
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["foldgpt", "depth-pruning", "weight-sharing"]
    for part in (
        "# tiny-llama-folded",
        "████··█AABB█",
        "One set of weights each: attention and MLP of 7 and 8; attention and MLP of 9 and 10.",
        "| perplexity | 20 | 25 | 1.25× |",
        "| arc_easy (acc) | 25.0 % |",
        "Perplexity in float32: texts a.txt",
        "- **What was cut?** 2 of 12 blocks: removed: 4 and 5;",
    ):
        assert part in card.text


def test_a_fit_is_claimed_only_where_it_was_merged(tmp_path: Path) -> None:
    """The plan says what was asked for; folding leaves a fit out that makes predictions worse."""
    folder = checkpoint(tmp_path / "folded", plan(compensation=compensation()))
    recovered = checkpoint(tmp_path / "recovered", plan(compensation=compensation()))

    def claims(folder: Path) -> tuple[bool, bool]:
        text = write_model_card(folder).read_text("utf-8")
        return "fitted in closed form" in text, "fitted to make up for it" in text

    assert claims(folder) == claims(recovered) == (False, False)
    for kept in (False, True):
        write_json(folder / "compensation.json", compensated(kept))
        assert claims(folder) == (kept, kept)
    assert claims(recovered) == (False, False), "of a model without a record nothing is claimed"
    write_json(folder / "compensation.json", {})
    with pytest.raises(ArtifactError, match=r"compensation\.json is not the record of a compensation"):
        write_model_card(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            "After it was folded, 1.2 M parameters were trained on 60,000 tokens of demo:wikipedia + mine.txt, and "
            "merged; the state after 40,000 of them did best on held-out text, and is this one.",
        ),
        ({"best_step": 60}, "trained on 60,000 tokens of demo:wikipedia + mine.txt, and merged.\n"),
        (
            {"best_step": 0},
            "Training on 60,000 tokens of demo:wikipedia + mine.txt made nothing better, so the weights",
        ),
    ],
)
def test_it_says_on_what_weights_were_trained(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    made = plan()
    made = made.model_copy(update={"source": made.source.model_copy(update={"fingerprint": "abc"})})
    folder = checkpoint(tmp_path / "x", made)
    assert "trained" not in write_model_card(folder).read_text("utf-8").replace("pretrained", "")
    on = {"text": {"texts": ["demo:wikipedia", "/home/me/mine.txt"], "context": 512, "num_held_out": 64}}
    write_json(folder / "recovery.json", {**recovery(), **on, **changes})
    text = write_model_card(folder).read_text("utf-8")
    assert expected in text and "/home/me" not in text
    # A teacher that was not the source is named.
    teachers = {"the source": "abc", "another": "def"}
    for name, fingerprint in teachers.items():
        taught = {"teacher": {"model": name, "revision": None, "fingerprint": fingerprint}}
        write_json(folder / "recovery.json", {**recovery(), **on, **taught, **changes})
        said = f"by the predictions of {name}" in write_model_card(folder).read_text("utf-8")
        assert said == (name == "another" and changes.get("best_step") != 0)
    # A record of an earlier version names no text.
    write_json(folder / "recovery.json", {**recovery(), **changes})
    assert "60,000 tokens" in write_model_card(folder).read_text("utf-8")


@pytest.mark.parametrize(("groups", "code_needed"), [([], False), ([Group(blocks=(0, 1))], True)])
def test_how_to_load_depends_on_what_was_done(groups: list[Group], code_needed: bool, tmp_path: Path) -> None:
    text = write_model_card(checkpoint(tmp_path / "folded", plan(groups=groups))).read_text("utf-8")
    assert ("trust_remote_code=True" in text) is code_needed
    assert ("import foldgpt" in text) is code_needed
    assert "Nothing was measured" in text


def test_a_local_model_is_not_taken_for_one_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for name in ("models/mine", "demo:smollm2-135m", "/models/mine", "some/model.d/x"):
        made = FoldPlan.create(SourceModel(model=name, model_type="llama", num_blocks=3), removed=[1])
        card = ModelCard.load(write_model_card(checkpoint(tmp_path / "folded", made)))
        assert card.data.base_model is None
        assert card.data.license is None


def test_a_card_of_the_source_that_cannot_be_read_stops_nothing(tmp_path: Path) -> None:
    for number, written in enumerate(("license: [", "license: mit\ndate: 2024-02-30")):
        (tmp_path / "README.md").write_text(f"---\n{written}\n---\n", "utf-8")
        card = ModelCard.load(write_model_card(checkpoint(tmp_path / f"folded{number}", plan()), source=tmp_path))
        assert card.data.license is None


def test_tables_are_tables(tmp_path: Path) -> None:
    """Markdown shows a table only if its rule follows its heading and all rows have as many cells."""
    text = write_model_card(checkpoint(tmp_path / "folded", plan()), evaluation=evaluation()).read_text("utf-8")
    lines = text.splitlines()
    tables = [number for number, line in enumerate(lines) if line.startswith("|---")]
    assert len(tables) == 2
    for number in tables:
        width = lines[number].count("|")
        rows = lines[number - 1 : number + 4]
        assert [row.count("|") for row in rows] == [width] * 5
        assert lines[number - 2] == ""


def test_a_folder_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a folded checkpoint"):
        write_model_card(tmp_path)
