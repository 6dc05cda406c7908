"""The page of a comparison: what it says, that it loads nothing, and that it fits and can be read."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest

from browser import Page, in_browser
from comparison_inputs import comparison
from foldgpt import report
from foldgpt.comparison import Agreement, agreement_of, agreement_table
from foldgpt.evaluation import Interval
from foldgpt.figures import draw_agreement
from foldgpt.report import as_markdown, write_comparison
from foldgpt.report.comparison_page import _chart
from foldgpt.report.rows import rows_of

pytestmark = pytest.mark.paints


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(comparison(), tmp_path_factory.mktemp("comparison"))["html"]


def text_of(page: str) -> str:
    body = re.sub(r"<style\b.*?</style>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_it_says_who_is_better_and_who_is_not(path: Path) -> None:
    text = text_of(path.read_text("utf-8"))
    for part in (
        "tiny-llama 6 runs",
        "gates 113.0 M 85.0 M 226.0 MB 61.1 44.5 % 85.6 % 55.9 % 24.5 % 6 min 1.22×",
        "gates −4.30 [−5.60, −3.10] better +0.50 [−1.00, +2.00] unclear",
        "gates + sharing † −5.40 [−6.00, −5.00] other budget +1.00 [+0.50, +2.00] other budget",
        "gates + recovery −3.50 [−3.90, −3.00] better +1.50 [+0.40, +2.60] better",
        "chance 50.0 % 25.0 %",
        "bi's, by more than 1.0 %: gates + sharing: −5.00 %.",
        "the same 1,000,000 tokens",
        "4, 5, 14 and 16–18",
    ):
        assert part in text


def test_markdown_tables_are_tables() -> None:
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", as_markdown(comparison()), re.MULTILINE)]
    assert [len(table) for table in tables] == [9, 6, 10, 6]
    for table in tables:
        assert len({line.count("|") for line in table}) == 1


def test_an_arrow_points_to_the_end_that_is_cut() -> None:
    good, cut = Interval(-1.0, -1.2, -0.8), Interval(-0.1, -1.0, 9.0)
    methods = [(method, each) for method, each in zip(comparison().methods, (good, cut), strict=False)]
    rows = _chart("Perplexity", "less is better", list(methods), less_is_better=True)["rows"]  # type: ignore[index]
    assert [row["is_cut"] for row in rows] == [False, True] and rows[1]["is_high"]


def test_every_verdict_has_a_dot() -> None:
    css = (Path(report.__file__).parent / "templates" / "report.css").read_text("utf-8")
    for verdict in ("better", "worse", "unclear", "other-budget", "unequal-training"):
        assert f".dot.{verdict}" in css


@in_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 390])
def test_it_loads_without_complaint_and_fits(width: int, dark: bool, page: Page, path: Path) -> None:
    page.complaints.clear()
    page.requests.clear()
    page.open(path, width=width, dark=dark)
    assert page.complaints == []
    assert len(page.requests) == 1 and page.requests[0].startswith("file:")
    assert page.run("document.documentElement.scrollWidth") <= width


@in_browser
def test_intervals_lie_where_they_say(page: Page, path: Path) -> None:
    page.open(path)
    places = page.run(
        """[...document.querySelector(".intervals").querySelectorAll(".task")].map((row) => {
          const track = row.querySelector(".track").getBoundingClientRect();
          const bar = row.querySelector(".interval").getBoundingClientRect();
          return [row.querySelector(".task-name").textContent, bar.left < track.left + track.width / 2,
                  bar.right > track.left + track.width / 2, bar.right <= track.right + 1];
        })"""
    )
    assert places == [
        # Far worse: cut at the edge, and still on the page.
        ["random", False, True, True],
        ["gates", True, False, True],
        ["gates + sharing †", True, False, True],
        ["gates + recovery", True, False, True],
    ]


@in_browser
def test_rows_lead_to_their_reports(page: Page, path: Path) -> None:
    page.open(path)
    links = page.run(
        "[...document.querySelectorAll('table')[0].querySelectorAll('a')].map((a) => a.getAttribute('href'))"
    )
    assert links == [f"{method.run}/report.html" for method in comparison().methods if method.run]


def test_where_methods_agree_is_counted_and_shown() -> None:
    whole = comparison()
    methods = [
        replace(method, removed=[4, 5, 6, 7] if method.name == "random" else method.removed) for method in whole.methods
    ]
    agreement = agreement_of(replace(whole, methods=methods))
    assert agreement is not None and agreement.num_blocks == 24
    # Rows with recovery remove what those without do.
    assert list(agreement.removed) == ["random", "bi", "gates", "gates + sharing"]
    assert agreement.overlap("bi", "gates") == 1
    assert agreement.overlap("random", "bi") == agreement.overlap("bi", "random") == pytest.approx(2 / 8)
    assert [agreement.votes[block] for block in (3, 4, 6, 14)] == [0, 4, 1, 3]
    table = rows_of(agreement_table(agreement))
    assert table is not None and table.cells[0] == ["1 random", "100.0 %", "25.0 %", "25.0 %", "25.0 %"]
    page = as_markdown(replace(whole, methods=methods))
    assert "## Removed in common" in page and "| 1 random | 100.0 % | 25.0 % |" in page


def test_one_method_agrees_with_nobody() -> None:
    whole = comparison()
    alone = [method for method in whole.methods if method.name in ("source", "bi")]
    assert agreement_of(replace(whole, methods=alone)) is None
    assert "Removed in common" not in as_markdown(replace(whole, methods=alone))


def test_the_page_shows_which_blocks_each_method_removes(tmp_path: Path) -> None:
    page = write_comparison(comparison(), tmp_path)["html"].read_text(encoding="utf-8")
    rows = page.split('class="strip dense"')[1:]
    assert len(rows) == 5  # four methods, and how many remove each block
    assert rows[0].count('class="removed"') == 6 and rows[0].count('class="kept"') == 18
    assert rows[4].partition("</ol>")[0].count("<li") == 24 and ">4</li>" in rows[4]


def test_the_picture_of_agreement_is_drawn(tmp_path: Path) -> None:
    agreement = Agreement(12, {"bi": [1, 2], "gates": [2, 3], "nothing": []})
    png, svg = draw_agreement(agreement, tmp_path / "agreement")
    assert png.stat().st_size > 1000
    text = svg.read_text(encoding="utf-8")
    # The share of each pair in percent, and the names.
    assert ">33</text>" in text and ">gates</text>" in text and text.count(">100</text>") == 3
