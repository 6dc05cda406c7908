"""The report opens with what matters, shows what the run holds, loads nothing, and answers to mouse and keys."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from browser import Page, in_browser
from foldgpt import pipeline
from foldgpt.artifacts import write_json, write_text
from foldgpt.errors import ArtifactError, FoldGPTError
from foldgpt.evaluation import Evaluation, Measured
from foldgpt.formats import block_ranges
from foldgpt.plan import FoldPlan, Group, SourceModel
from foldgpt.report import REPORT, build_report
from foldgpt.report.headline import headlines, short_name
from report_inputs import (
    analysis,
    compensated,
    compensation,
    evaluation,
    plan,
    recovery,
    without_tasks,
    write_run,
)

pytestmark = pytest.mark.paints


def text_of(page: str) -> str:
    """What a reader sees, roughly: no styles, scripts, tags."""
    body = re.sub(r"<(style|script)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("report") / "run")
    build_report(folder)
    return folder


def test_it_opens_with_how_much_smaller_what_was_lost_and_what_was_cut(run: Path) -> None:
    text = text_of((run / REPORT).read_text("utf-8"))
    places = [
        text.index(part)
        for part in (
            "tiny-llama 12 → 10 blocks",
            "How much smaller? −16.7 % parameters 120.0 M → 100.0 M",
            "240.0 MB → 200.0 MB on disk",
            "What was lost? 1.25× perplexity perplexity 20 → 25 on a.txt",
            "on 4 tasks:",
            "last words found: 40.0 % → 34.0 %",
            "What was cut? 2 of 12 blocks removed: 4 and 5 4 blocks share 2 sets of weights chosen by gates",
            "Comparison",
        )
    ]
    assert places == sorted(places)


def test_it_shows_what_the_artefacts_hold(run: Path) -> None:
    page = (run / REPORT).read_text("utf-8")
    text, data = text_of(page), data_of(page)
    for part in (
        "perplexity 20 25 1.25×",
        "Perplexity in float32: texts a.txt",
        "there was a house, and a house",
        "The <b>sun</b> & the moon",
        "model: someone/tiny-llama",
        "gpu none",
    ):
        assert part in text
    assert 'aria-label="block 8: shares weights with 7"' in page
    measured = analysis()
    assert data["cosine"] == [[round(value, 5) for value in row] for row in measured.cosine]
    assert [curve["name"] for curve in data["curves"]] == ["block", "attention", "MLP"]
    assert data["curves"][0]["values"] == [round(value, 5) for value in measured.bi]
    assert [unit["removed"] for unit in data["gates"]["units"]] == [block in (4, 5) for block in range(12)]


def test_positions_that_start_at_zero_are_told_from_groups_of_kept_blocks(tmp_path: Path) -> None:
    group = Group(blocks=(3, 4, 5), donor="owner", owner=3, start="zero", private=("norms", "scales"))
    started = plan(removed=[9], groups=[group])
    page = build_report(write_run(tmp_path / "run", plan=started, recovery=None)).read_text("utf-8")
    borrows = "removed, but for its position, which borrows the weights of 3 and started at zero"
    for block, said in ((3, "lends its weights to the positions of 4, 5"), (4, borrows), (5, borrows)):
        assert f'aria-label="block {block}: {said}"' in page
    told = "What was cut? 3 of 12 blocks removed: 9 only positions left, with the weights of 3: 4 and 5 chosen by gates"
    assert told in text_of(page)


def test_without_a_script_it_sends_nobody_to_pictures_that_are_not_there(run: Path, tmp_path: Path) -> None:
    """figures/ holds no chart of the recovery: its losses are in its record alone."""
    without = write_run(tmp_path / "run", recovery=None)
    for folder, recovered in ((run, True), (without, False)):
        [said] = re.findall(r"<noscript>(.*?)</noscript>", build_report(folder).read_text("utf-8"), re.DOTALL)
        assert "those of blocks and gates as pictures" in said
        assert ("recovered/recovery.json" in said) is recovered


def test_it_loads_nothing(run: Path) -> None:
    page = (run / REPORT).read_text("utf-8")
    assert "default-src 'none'" in page
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", page))
    # The name of SVG's namespace, which is not an address that anything is loaded from.
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"<(?:link|img|iframe|script[^>]+src)\b|@import|url\(", page)


def test_parts_that_are_missing_leave_no_hole(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", plan=plan(origin={}), analysis=None, evaluation=None, recovery=None)
    page = build_report(folder).read_text("utf-8")
    text = text_of(page)
    assert "−16.7 % blocks 12 → 10 blocks" in text
    for absent in (
        "What was lost?",
        "Comparison",
        "Tasks",
        "Block influence",
        "Gates",
        "Recovery",
        "Environment",
        "Recipe",
    ):
        assert absent not in text
    assert data_of(page)["cosine"] is None


def test_an_evaluation_without_tasks_or_baseline(tmp_path: Path) -> None:
    older = without_tasks(evaluation())
    text = text_of(build_report(write_run(tmp_path / "older", evaluation=older)).read_text("utf-8"))
    assert "1.25× perplexity" in text and "Tasks" not in text and "What the models write" not in text
    alone = Evaluation(evaluation().folded, None, None)
    text = text_of(build_report(write_run(tmp_path / "alone", evaluation=alone)).read_text("utf-8"))
    assert "What was lost?" not in text and "arc_easy (acc) 25.0 %" in text


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    source = SourceModel(model='</title></script><script>alert("x")</script>', model_type="llama", num_blocks=4)
    folder = write_run(
        tmp_path / "run", plan=FoldPlan.create(source, removed=[1]), analysis=analysis(4), evaluation=None
    )
    write_text(folder / "recipe.yaml", "</pre><script>alert(1)</script>")
    page = build_report(folder).read_text("utf-8")
    assert "alert" in page and "<script>alert" not in page


def test_long_gate_paths_are_thinned_to_their_end(tmp_path: Path) -> None:
    trace = [{"step": step, "cost": 1.0, "keep": [step / 1000] * 12} for step in range(1000)]
    long = plan(origin={"selector": "gates", "report": {"trace": trace}})
    gates = data_of(build_report(write_run(tmp_path / "run", plan=long)).read_text("utf-8"))["gates"]
    assert gates["steps"][0] == 0 and gates["steps"][-1] == 999
    assert len(gates["steps"]) <= 301
    assert gates["units"][3]["keep"][-1] == 0.999


def test_gates_of_sublayers_are_named_and_judged_apart(tmp_path: Path) -> None:
    trace = [{"step": 0, "cost": 1.0, "keep": [0.5] * 24}]
    origin = {"selector": "gates", "report": {"trace": trace}}
    apart = plan(removed=[3], removed_attention=[6], removed_mlp=[8], groups=[], origin=origin)
    units = data_of(build_report(write_run(tmp_path / "run", plan=apart)).read_text("utf-8"))["gates"]["units"]
    assert [unit["name"] for unit in units if unit["removed"]] == ["attention 3", "MLP 3", "attention 6", "MLP 8"]


def test_gates_of_blocks_that_came_back_as_positions_are_those_of_removed_ones(tmp_path: Path) -> None:
    trace = [{"step": 0, "cost": 1.0, "keep": [0.5] * 12}]
    origin = {"selector": "gates", "report": {"trace": trace}}
    zero = Group(blocks=(3, 4, 5), donor="owner", owner=3, start="zero", private=("norms", "scales"))
    back = plan(removed=[8], groups=[zero], origin=origin)
    units = data_of(build_report(write_run(tmp_path / "run", plan=back)).read_text("utf-8"))["gates"]["units"]
    assert [unit["name"] for unit in units if unit["removed"]] == ["block 4", "block 5", "block 8"]


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="run folder not found"):
        build_report(tmp_path / "none")
    with pytest.raises(ArtifactError, match=r"holds no plan\.json"):
        build_report(tmp_path)
    folder = write_run(tmp_path / "run")
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(FoldGPTError, match="not valid JSON"):
        build_report(folder)
    assert not (folder / REPORT).exists()
    with pytest.raises(ArtifactError, match="analysis of 5 blocks and a plan for a model of 12"):
        build_report(write_run(tmp_path / "mixed", analysis=analysis(5)))
    (write_run(tmp_path / "odd") / "environment.json").write_text("[]")
    with pytest.raises(ArtifactError, match="not a description of an environment"):
        build_report(tmp_path / "odd")


def test_recovery_is_drawn_over_tokens(run: Path) -> None:
    page = (run / REPORT).read_text("utf-8")
    training = data_of(page)["training"]
    assert training["tokens"] == [0, 20_000, 40_000, 60_000]
    assert training["lines"] == [
        {"name": "held-out loss", "values": [1.0, 0.6, 0.4, 0.45]},
        {"name": "held-out KL", "values": [0.9, 0.5, 0.3, 0.35]},
    ]
    assert training["best"] == 2
    assert (training["steps"]["tokens"][0], training["steps"]["values"][0]) == (1000, 0.99)
    assert "from 1.0000 to 0.4000; the state after step 40 of 60 is the one that was saved" in text_of(page)


def test_recovery_that_is_long_short_or_broken(tmp_path: Path) -> None:
    history = [{"loss": 1.0, "step": step} for step in range(1, 1001)]
    long = {**recovery(), "history": history, "num_steps": 1000, "best_step": 0}
    page = build_report(write_run(tmp_path / "long", recovery=long)).read_text("utf-8")
    training = data_of(page)["training"]
    assert len(training["steps"]["tokens"]) <= 300 and training["best"] == 0
    assert "nothing was better than the start" in text_of(page)
    # One loss alone is one line, under the name that says what it is.
    alone = {**recovery(), "history": [], "before": {"loss": 0.9, "kl": 0.9}}
    lines = data_of(build_report(write_run(tmp_path / "alone", recovery=alone)).read_text("utf-8"))["training"]["lines"]
    assert [line["name"] for line in lines] == ["held-out KL"]
    with pytest.raises(ArtifactError, match="not the record of a recovery"):
        build_report(write_run(tmp_path / "broken", recovery={"history": 3}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"before": None}, "before: Input should be a valid dictionary"),
        ({"after": {"kl": 1.0}}, "after: there is no loss"),
        ({"history": [{"loss": "low", "step": 1}]}, r"history\.0\.loss.*: Input should be a valid"),
        ({"history": [{"loss": 1.0}]}, "history: an entry has no step"),
        ({"num_steps": "many"}, "num_steps: Input should be a valid integer"),
        ({"num_trained": -1}, "num_trained: Input should be greater than or equal to 0"),
        ({"best_step": 61}, "best_step: beyond the last step"),
    ],
    ids=str,
)
def test_an_edited_record_of_a_recovery_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"recovery\.json is not the record of a recovery: .*{message}"):
        build_report(write_run(tmp_path / "run", recovery={**recovery(), **change}))


@pytest.mark.parametrize(
    "trace", [None, [], {}, [1], [{"keep": [0.5] * 12}], [{"step": 0, "keep": [0.5]}], [{"step": 0, "keep": None}]]
)
def test_an_edited_origin_costs_the_gates_alone(trace: Any, tmp_path: Path) -> None:
    edited = plan(origin={"selector": "gates", "report": {"trace": trace}})
    assert data_of(build_report(write_run(tmp_path / "run", plan=edited)).read_text("utf-8"))["gates"] is None


def test_it_reads_the_files_that_a_run_writes(tmp_path: Path) -> None:
    names = {path.name for path in write_run(tmp_path / "run").iterdir()}
    assert {pipeline.ANALYSIS, pipeline.PLAN, pipeline.EVALUATION, pipeline.ENVIRONMENT} < names


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [([], ""), ([3], "3"), ([3, 4], "3 and 4"), ([9, 3, 4, 5], "3–5 and 9"), ([1, 2, 4, 6, 7, 8], "1, 2, 4 and 6–8")],
)
def test_block_ranges(blocks: list[int], expected: str) -> None:
    assert block_ranges(blocks) == expected


@pytest.mark.parametrize(
    ("model", "expected"), [("a/b", "b"), ("/x/y/z/", "z"), ("demo:m", "demo:m"), ("m.gguf", "m.gguf")]
)
def test_short_names(model: str, expected: str) -> None:
    assert short_name(model) == expected


def test_a_plan_that_only_shares_or_does_nothing() -> None:
    source = SourceModel(model="m", model_type="llama", num_blocks=4)
    shared = headlines(FoldPlan.create(source, groups=[Group(blocks=(1, 2))]), None)[-1]
    assert (shared.answer, shared.unit) == ("2", "of 4 blocks share")
    assert headlines(FoldPlan.create(source), None)[-1].answer == "nothing"


def test_what_is_shared_is_said_by_sublayer_and_not_as_a_number_of_blocks() -> None:
    source = SourceModel(model="m", model_type="llama", num_blocks=6)
    apart = [
        Group(blocks=(1, 2), sublayers=("attention",)),
        Group(blocks=(2, 3, 4), sublayers=("mlp",)),
        Group(blocks=(4, 5), sublayers=("attention",)),
    ]
    [cut] = headlines(FoldPlan.create(source, groups=apart), None)
    assert cut.question == "What was cut?"
    assert cut.details == ["4 attentions share 2 sets of weights", "3 MLPs share 1 set of weights"]
    smaller, cut = headlines(FoldPlan.create(source, removed=[0], groups=apart), None)
    assert (smaller.answer, smaller.unit) == ("−16.7 %", "blocks")


def test_a_fit_that_was_left_out_is_not_claimed(tmp_path: Path) -> None:
    for kept in (False, True):
        folder = write_run(tmp_path / str(kept), plan=plan(compensation=compensation()))
        plan(compensation=compensation()).save(folder / "folded" / "plan.json")
        write_json(folder / "folded" / "compensation.json", compensated(kept))
        text = text_of(build_report(folder).read_text("utf-8"))
        assert ("kept blocks were fitted to make up for it" in text) is kept


@pytest.mark.parametrize(
    ("parameters", "expected"), [(103_000_000, "+3.0 %"), (100_000_000, "±0.0 %"), (97_000_000, "−3.0 %")]
)
def test_a_model_that_grew_is_said_to_have_grown(parameters: int, expected: str) -> None:
    whole = evaluation()
    assert whole.baseline is not None

    def sized(model: Measured, parameters: int) -> Measured:
        return replace(model, size=replace(model.size, unique_parameters=parameters))

    both = Evaluation(sized(whole.folded, parameters), sized(whole.baseline, 100_000_000), None)
    assert headlines(plan(), both)[0].answer == expected


def test_tasks_alone_tell_what_was_lost() -> None:
    whole = evaluation()
    assert whole.retained is not None
    lost = headlines(plan(), Evaluation(whole.folded, whole.baseline, None, whole.retained))[1]
    assert lost.unit == "points of accuracy"
    assert float(lost.answer.replace("−", "-")) == round(100 * whole.retained["average"].difference, 1)


# ------------------------------------------------------------------------------------- in a real browser


def said(page: Page, chart: str) -> str:
    text: str = page.run(f"document.querySelector('{chart} .readout').textContent")
    return text


@in_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 390])
def test_it_loads_without_complaint_and_fits(width: int, dark: bool, page: Page, run: Path) -> None:
    page.complaints.clear()
    page.requests.clear()
    page.open(run / REPORT, width=width, dark=dark)
    assert page.complaints == []
    assert [request for request in page.requests if not request.startswith("file:")] == []
    assert len(page.requests) == 1
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("document.querySelectorAll('#heatmap rect').length") > 169


@in_browser
@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out(dark: bool, page: Page, run: Path) -> None:
    """WCAG AA: a contrast of 4.5 between text and what is behind it."""
    page.open(run / REPORT, dark=dark)
    worst = page.run(
        """(() => {
          const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
          const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
            .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
          const behind = (e) => { for (; e; e = e.parentElement) {
            const c = parse(getComputedStyle(e).backgroundColor);
            if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
          const texts = "h1, h2, h3, p, li, th, td, dt, dd, summary, pre, .cell, .index";
          const ratios = [...document.querySelectorAll(texts)]
            .filter((e) => e.textContent.trim() && e.offsetParent)
            .map((e) => [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((a, b) => b - a))
            .map(([high, low]) => (high + 0.05) / (low + 0.05));
          return Math.min(...ratios);
        })()"""
    )
    assert worst >= 4.5


@in_browser
def test_the_heatmap_answers_to_mouse_and_keys(page: Page, run: Path) -> None:
    page.open(run / REPORT)
    # The middle of the cell in row 5 and column 3, with the margins of the drawing.
    box = page.run(
        "(({width, height}) => [width, height])(document.querySelector('#heatmap svg').getBoundingClientRect())"
    )
    size = (min(box[0], 640) - 48) / 13
    page.point_at("#heatmap svg", (42 + 3.5 * size) / box[0], (6 + 5.5 * size) / box[1])
    assert said(page, "#heatmap") == f"After block 2 and after block 4: {analysis().cosine[5][3]:.3f}"
    page.run("document.querySelector('#heatmap svg').focus()")
    page.press("ArrowRight")
    assert said(page, "#heatmap") == f"After block 3 and after block 4: {analysis().cosine[5][4]:.3f}"
    page.press("ArrowDown")
    page.press("Home")
    assert said(page, "#heatmap") == f"After the embedding and after block 5: {analysis().cosine[6][0]:.3f}"


@in_browser
def test_the_curves_answer_to_mouse_and_keys(page: Page, run: Path) -> None:
    page.open(run / REPORT)
    page.point_at("#curves svg", 0.999)
    values = analysis().bi
    assert said(page, "#curves").startswith(f"Block 11: block {values[11]:.3f} · attention {values[11] / 2:.3f}")
    page.run("document.querySelector('#curves svg').focus()")
    for _ in range(7):
        page.press("ArrowLeft")
    assert said(page, "#curves").startswith(f"Block 4 (removed): block {values[4]:.3f}")


@in_browser
def test_the_strip_is_one_stop_of_the_tab_key_with_arrows_inside(page: Page, run: Path) -> None:
    page.open(run / REPORT)
    page.run("document.querySelector('.strip li').focus()")
    for _ in range(8):
        page.press("ArrowRight")
    told = page.run("document.getElementById('strip-readout').textContent")
    assert told == f"Block 8: shares weights with 7. Block influence {analysis().bi[8]:.3f}."
    page.press("Tab")
    assert page.run("document.activeElement.closest('.strip') === null")


@in_browser
def test_each_of_two_strips_is_always_one_stop_of_the_tab_key(page: Page, tmp_path: Path) -> None:
    """Arrows also lead from one strip to the other; neither may lose its stop, nor get a second one."""
    folder = write_run(tmp_path / "run", plan=plan(removed=[], removed_attention=[4], removed_mlp=[5], groups=[]))
    page.open(build_report(folder))
    stops = (
        "[...document.querySelectorAll('.strip')].map((strip) => "
        "[...strip.children].flatMap((cell, index) => (cell.tabIndex === 0 ? [index] : [])))"
    )
    page.run("document.querySelector('.strip li').focus()")
    assert page.run(stops) == [[0], [0]]
    for key, expected in (
        ("ArrowRight", [[1], [0]]),
        ("ArrowDown", [[1], [1]]),
        ("End", [[1], [11]]),
        ("ArrowUp", [[11], [11]]),
    ):
        page.press(key)
        assert page.run(stops) == expected


@in_browser
def test_gates_answer_to_keys(page: Page, run: Path) -> None:
    page.open(run / REPORT)
    page.run("document.querySelector('#gates svg').focus()")
    page.press("End")
    trace = plan().origin["report"]["trace"]
    assert said(page, "#gates") == (
        f"Step 39. Block 4: kept with probability {trace[39]['keep'][4]:.3f}; in the end removed."
    )


@in_browser
def test_training_curves_answer_to_mouse_and_keys(page: Page, run: Path) -> None:
    page.open(run / REPORT)
    page.point_at("#training svg", 0.999)
    assert said(page, "#training") == (
        "After 60,000 tokens: held-out loss 0.450 · held-out KL 0.350 · training loss 0.400."
    )
    page.run("document.querySelector('#training svg').focus()")
    page.press("ArrowLeft")
    assert said(page, "#training").startswith("After 40,000 tokens (saved): held-out loss 0.400")
    page.press("Home")
    assert said(page, "#training") == "After 0 tokens: held-out loss 1.000 · held-out KL 0.900."


@in_browser
def test_nothing_moves_for_those_who_want_no_motion(page: Page, run: Path) -> None:
    page.open(run / REPORT)
    duration = "getComputedStyle(document.querySelector('.strip .cell')).transitionDuration"
    moving = page.run(duration)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    assert (moving, page.run(duration)) == ("0.12s", "0s")
