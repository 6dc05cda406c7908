"""The docs say what the code does: examples run, tables are complete, links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from foldgpt.families import FAMILIES, config_fields
from foldgpt.folding import DONORS
from foldgpt.plan import FoldPlan
from foldgpt.selection import SELECTORS
from foldgpt.sources import DTYPES
from foldgpt.tables import plan_strip
from models import CONFIGS

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "README.md"]


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def blocks_of(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def rows_of(text: str) -> list[list[str]]:
    """The cells of all table rows."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).is_file(), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    for name in re.findall(r"`((?:src|tests|benchmarks)/[\w/.]+\.py)`", path.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_examples_are_python(path: Path) -> None:
    for code in blocks_of(path.read_text(encoding="utf-8"), "python"):
        compile(code, path.name, "exec")


def test_every_page_is_on_the_first_one() -> None:
    linked = set(re.findall(r"\]\((\w[\w-]*)\.md\)", page("index")))
    assert linked == {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}


def test_the_plan_of_the_docs_is_a_plan_and_looks_as_shown() -> None:
    (example,) = blocks_of(page("plan"), "json")
    plan = FoldPlan.from_json_dict(json.loads(example))
    assert plan_strip(plan).plain in page("plan")


def test_the_plan_in_python_does_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks_of(page("plan"), "python")
    exec(code, {})
    plan = FoldPlan.load("plan.json")
    assert [plan.position_of[index] for index in (0, 1, 8, 11)] == [0, 1, 8, 9]


def test_the_table_of_families_is_the_one_in_the_code() -> None:
    rows = [row for row in rows_of(page("families")) if len(row) == 4 and row[2].startswith("in ")]
    written = {row[0].strip("`"): row[1:] for row in rows}
    tested = {model_type for model_type, _ in CONFIGS.values()}
    expected = {}
    for name, family in FAMILIES.items():
        parallel = {variant.sublayers.between is None for variant in family.variants}
        order = "in parallel or in turn, by config" if len(parallel) == 2 else "in turn"
        expected[name] = [f"`{family.blocks}`", order, "yes" if name in tested else ""]
        assert parallel != {True}
    assert written == expected
    assert list(written) == sorted(written)


def test_every_config_field_with_a_rule_is_in_the_docs() -> None:
    table = page("families").partition("## Config fields")[2]
    named = set(re.findall(r"`(\w+)`", table.partition("A refusal is deliberate")[0]))
    known = {*config_fields.RULES, *config_fields.GENERATORS, *config_fields.NEUTRAL}
    assert known <= named
    assert named <= known


def test_every_selector_in_the_docs_exists() -> None:
    named = {row[0].strip("`") for row in rows_of(page("selection")) if row[0].startswith("`") and "--" not in row[0]}
    assert named and named <= set(SELECTORS)


@pytest.mark.parametrize(("name", "choices"), [("plan", DONORS), ("sources", DTYPES)])
def test_every_choice_is_in_the_docs(name: str, choices: dict[str, object]) -> None:
    assert not [choice for choice in choices if f"`{choice}`" not in page(name)]
