"""The docs say what the code does: examples compile, tables are complete, links lead somewhere, options exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

from foldgpt.cli import app
from foldgpt.families import FAMILIES, config_fields
from foldgpt.families.table import INDEX_IN_CODE, SPECIAL_FIRST_BLOCK
from foldgpt.folding import DONORS
from foldgpt.history import history_of
from foldgpt.plan import Compensation, Fitting, FoldPlan, Group, SourceModel
from foldgpt.recipe import Recipe
from foldgpt.recovery import RecoverySettings
from foldgpt.selection import SELECTORS
from foldgpt.sources import DTYPES, load_source
from foldgpt.strip import plan_strip
from run_inputs import tiny_source, tiny_text
from test_family_rows import IN_CONTRACT, ROWS, WHOLE

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "README.md"]
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def blocks_of(text: str, *languages: str) -> list[str]:
    """The fenced blocks of some languages; "" is that of blocks without a name."""
    return [code for language, code in FENCED.findall(text) if language in languages]


def anchors_of(text: str) -> set[str]:
    """What links may name behind `#`, by GitHub's rule: a heading that comes again gets a number."""
    anchors: set[str] = set()
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#+ +(.+?) *$", FENCED.sub("", text), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        anchors.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return anchors


def commands_of(text: str) -> list[list[str]]:
    """Words of each `foldgpt VERB …`, in blocks of shell and in the running text."""
    lines = "\n".join(blocks_of(text, "", "bash", "sh", "shell", "console")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(foldgpt [^`\n]+)`", FENCED.sub("", text))
    found = [re.fullmatch(r"(?:\$ )?(foldgpt .*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


def rows_of(text: str) -> list[list[str]]:
    """The cells of all table rows."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", FENCED.sub("", path.read_text(encoding="utf-8"))):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.is_file(), link
        assert not anchor or anchor in anchors_of(target.read_text(encoding="utf-8")), link


def test_headings_have_the_anchors_that_github_gives_them() -> None:
    text = "# A `b_c`: d, e – f\n\n```\n# no heading\n```\n\n## It's [so](x.md)\n### Twice\n## Twice\n"
    assert anchors_of(text) == {"a-b_c-d-e--f", "its-so", "twice", "twice-1"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_options_on_the_command_line_exist(path: Path) -> None:
    for _, verb, *words in commands_of(path.read_text(encoding="utf-8")):
        if verb == "--help":
            continue
        assert verb in VERBS, verb
        options = {
            option for parameter in VERBS[verb].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        flags = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert flags <= options | {"--help"}, f"foldgpt {verb}"


def test_commands_are_found_wherever_they_stand() -> None:
    shell = "```\nfoldgpt plan M \\\n    --select 'a b'  # --why\nfoldgpt fold\n```\n"
    text = f"{shell}\nor `foldgpt run R --dry-run`, foldgpt itself\n"
    assert commands_of(text) == [
        ["foldgpt", "plan", "M", "--select", "a b"],
        ["foldgpt", "fold"],
        ["foldgpt", "run", "R", "--dry-run"],
    ]
    shown = [command[1] for path in PAGES for command in commands_of(path.read_text(encoding="utf-8"))]
    assert set(VERBS) <= set(shown)


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


@pytest.mark.parametrize("name", ["index", "selection"])
def test_examples_of_pages_run_on_a_tiny_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, text = tiny_source(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    *_, code = blocks_of(page(name), "python")
    for real, tiny in {
        "demo:smollm2-135m": str(source),
        "demo:wikipedia": str(text),
        "context=512": "context=16",
        "16_384": "256",
    }.items():
        assert real in code
        code = code.replace(real, tiny)
    exec(code, {})
    plan = FoldPlan.load("folded")
    assert len(plan.removed) == (3 if name == "index" else 2)
    assert load_source("folded", device="cpu").model.config.num_hidden_layers == len(plan.kept)
    if name == "selection":
        record = json.loads(Path("folded/compensation.json").read_text())
        assert plan.compensation is not None and record["kept"] in (True, False)
        assert history_of(Path("folded")).calibration == [str(text)] and Path("folded/README.md").is_file()


def test_the_table_of_families_is_the_one_in_the_code() -> None:
    rows = [row for row in rows_of(page("families")) if len(row) == 4 and row[2].startswith("in ")]
    written = {row[0].strip("`"): row[1:] for row in rows}
    orders = {
        (True,): "in parallel",
        (False,): "in turn",
        (False, True): "in parallel or in turn, by config",
        (): "in an order that is not known",
    }
    expected = {}
    for name, family in FAMILIES.items():
        order = orders[tuple(sorted({variant.sublayers.between is None for variant in family.variants}))]
        if any(variant.sublayers.mixers for variant in family.variants):
            order += "; some do not attend"
        tested = "contract" if name in IN_CONTRACT else "row" if name in {*ROWS, *WHOLE} else ""
        expected[name] = [f"`{family.blocks}`", order, tested]
    assert written == expected
    assert list(written) == sorted(written)


def test_every_config_field_with_a_rule_is_in_the_docs() -> None:
    table = page("families").partition("## Config fields")[2]
    named = set(re.findall(r"`(\w+)`", table.partition("A refusal is deliberate")[0]))
    known = {*config_fields.RULES, *config_fields.GENERATORS, *config_fields.NEUTRAL}
    assert known <= named
    assert named <= known


def test_every_family_that_is_refused_in_part_is_in_the_docs() -> None:
    behind = page("families").partition("A refusal is deliberate")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([\w-]+)`", behind)) - {"INDEX_IN_CODE", "SPECIAL_FIRST_BLOCK"}
    assert named == {*INDEX_IN_CODE, *SPECIAL_FIRST_BLOCK}


def test_the_selectors_in_the_docs_are_those_in_the_code() -> None:
    named = {row[0].strip("`") for row in rows_of(page("selection")) if row[0].startswith("`") and "--" not in row[0]}
    assert named == set(SELECTORS)


def test_the_keys_of_a_recipe_are_all_in_the_docs_with_their_defaults_and_what_they_are() -> None:
    text = page("recipes").partition("\n## Keys\n")[2].partition("\n## ")[0]
    top, *rest = re.split(r"^`(\w+)`: .*$", text, flags=re.MULTILINE)
    written = {"": rows_of(top), **{name: rows_of(rows) for name, rows in zip(rest[::2], rest[1::2], strict=True)}}
    sections = {"": Recipe, **{name: type(value) for name, value in Recipe(model="m") if isinstance(value, BaseModel)}}
    assert list(written) == list(sections)
    for name, section in sections.items():
        expected = []
        for key, field in section.model_fields.items():
            default = field.get_default()
            if isinstance(default, BaseModel):
                continue
            shown = "required" if field.is_required() else f"`{json.dumps(default)}`"
            expected.append([f"`{key}`", shown, " ".join((field.description or "").split())])
        assert [row for row in written[name] if row[0].startswith("`")] == expected


def test_the_benchmarks_are_all_listed_with_what_they_say_they_measure() -> None:
    folder = ROOT / "benchmarks"
    listed = {row[0].strip("`"): row[1] for row in rows_of((folder / "README.md").read_text()) if ".py" in row[0]}
    expected = {}
    for path in sorted(folder.glob("*.py")):
        code = path.read_text(encoding="utf-8")
        if "__main__" in code:
            purpose = (ast.get_docstring(ast.parse(code)) or "").partition("\n\n")[0]
            expected[path.name] = " ".join(purpose.split()).rstrip(".")
    assert listed == expected


def test_the_settings_of_a_recovery_are_all_in_the_docs_with_their_defaults() -> None:
    section = page("recovery").partition("\n## Settings\n")[2].partition("\n## ")[0]
    written = [(row[0], row[1]) for row in rows_of(section) if row[0].startswith("`")]
    assert written == [
        (f"`{field.name}`", "`" + repr(field.default).replace("'", '"') + "`") for field in fields(RecoverySettings)
    ]


@pytest.mark.parametrize("part", [FoldPlan, SourceModel, Group, Compensation, Fitting])
def test_every_key_of_a_plan_is_in_the_docs(part: type[FoldPlan]) -> None:
    named = set(re.findall(r"\"(\w+)\":|`(?:\w+(?:\[\])?\.)?(\w+)`", page("plan")))
    assert not set(part.model_fields) - {name for pair in named for name in pair}


@pytest.mark.parametrize(("name", "choices"), [("plan", DONORS), ("sources", DTYPES)])
def test_every_choice_is_in_the_docs(name: str, choices: dict[str, object]) -> None:
    assert not [choice for choice in choices if f"`{choice}`" not in page(name)]
