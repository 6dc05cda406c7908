"""Pictures are written whole, show what they should, and say so when they cannot be written."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from foldgpt import figures
from foldgpt.analysis.result import Analysis, SublayerMeasures
from foldgpt.errors import ArtifactError
from foldgpt.plan import FoldPlan, Group, SourceModel
from foldgpt.steps import draw

pytestmark = pytest.mark.paints


def analysis(num_blocks: int, *, sublayers: bool = True, bi: list[float] | None = None) -> Analysis:
    bi = bi or [0.5 * math.exp(-index) + 0.02 for index in range(num_blocks)]
    depths = range(num_blocks + 1)
    spans = [[0.1] * (num_blocks - span) for span in range(num_blocks)]
    measures = SublayerMeasures(bi=[value / 2 for value in bi], relative_update=bi)
    return Analysis(
        model_type="llama",
        num_blocks=num_blocks,
        num_windows=1,
        num_tokens=8,
        seconds=0.1,
        bi=bi,
        relative_update=bi,
        cosine=[[math.exp(-abs(i - j) / num_blocks) for j in depths] for i in depths],
        angular=spans,
        angular_last_token=spans,
        attention=measures if sublayers else None,
        mlp=measures if sublayers else None,
    )


def plan(num_blocks: int, **parts: Any) -> FoldPlan:
    return FoldPlan.create(SourceModel(model="m", model_type="llama", num_blocks=num_blocks), **parts)


def check_written(paths: tuple[Path, Path], stem: Path) -> str:
    """Both files are whole and alone in their folder; the SVG's text."""
    png, svg = paths
    assert (png, svg) == (stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg"))
    assert sorted(stem.parent.iterdir()) == [png, svg]
    assert imread(png).std() > 0.01
    text = svg.read_text()
    assert text.rstrip().endswith("</svg>")
    return text


@pytest.mark.parametrize("num_blocks", [1, 18, 80])
@pytest.mark.parametrize("sublayers", [True, False])
def test_redundancy(tmp_path: Path, num_blocks: int, sublayers: bool) -> None:
    stem = tmp_path / "figures" / "redundancy"
    text = check_written(figures.draw_redundancy(analysis(num_blocks, sublayers=sublayers), stem), stem)
    assert "Block influence" in text
    assert (">MLP<" in text) is sublayers


def test_redundancy_of_a_block_that_does_nothing(tmp_path: Path) -> None:
    stem = tmp_path / "redundancy"
    check_written(figures.draw_redundancy(analysis(3, bi=[0.9, 0.0, 0.01]), stem), stem)


@pytest.mark.parametrize("num_blocks", [1, 18, 80])
def test_similarity(tmp_path: Path, num_blocks: int) -> None:
    stem = tmp_path / "similarity"
    text = check_written(figures.draw_similarity(analysis(num_blocks), stem), stem)
    assert f"{num_blocks}: after the last block" in text


def test_plan_names_its_groups(tmp_path: Path) -> None:
    stem = tmp_path / "plan.v1"
    folded = plan(30, removed=[9, 10], groups=[Group(blocks=(1, 2)), Group(blocks=(20, 21, 22))])
    text = check_written(figures.draw_plan(folded, stem, bi=analysis(30).bi), stem)
    assert "30 → 28 blocks" in text
    assert (text.count(">A<"), text.count(">B<")) == (2, 3)
    assert "shared weights (2 groups)" in text
    assert ">MLP<" not in text


def test_plan_of_sublayers_without_influence(tmp_path: Path) -> None:
    stem = tmp_path / "plan"
    text = check_written(figures.draw_plan(plan(80, removed_mlp=[5]), stem), stem)
    assert ">MLP<" in text
    assert ">BI<" not in text


def test_identity_plan_has_no_legend_for_what_is_absent(tmp_path: Path) -> None:
    text = figures.draw_plan(plan(4), tmp_path / "plan")[1].read_text()
    assert ">kept<" in text
    assert ">removed<" not in text
    assert "shared" not in text


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    first = figures.draw_similarity(analysis(6), tmp_path / "a")
    second = figures.draw_similarity(analysis(6), tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_unwritable_place_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(ArtifactError, match=r"cannot write .*plan\.png"):
        figures.draw_plan(plan(4), tmp_path / "taken" / "plan")


def test_a_failed_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_arguments: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(ArtifactError, match="No space left on device"):
        figures.draw_plan(plan(4), tmp_path / "plan")
    assert not list(tmp_path.iterdir())


def test_gate_paths_name_the_removed_blocks(tmp_path: Path) -> None:
    trace = [{"step": s, "cost": 1.0, "keep": [1 - s / 9, 0.5, 0.9, 1 - s / 10]} for s in range(10)]
    png, svg = figures.draw_gates(trace, [0, 3], tmp_path / "gates")
    assert png.stat().st_size > 1000
    labels = set(re.findall(r">([^<>]+)</text>", svg.read_text()))
    title = "Gates: how surely each block is kept, as they are learned"
    assert {"0", "3", "removed in the end", "step", title} <= labels
    assert "1" not in labels


def test_gate_paths_of_a_plan_are_named_as_its_units_and_end_where_its_gates_did(tmp_path: Path) -> None:
    def labels(per_block: int, **parts: Any) -> set[str]:
        trace = [{"step": step, "cost": 1.0, "keep": [0.5] * 6 * per_block} for step in range(3)]
        origin = {"selector": "gates", "report": {"trace": trace}}
        draw(None, plan(6, origin=origin, **parts), tmp_path)
        return set(re.findall(r">([^<>]+)</text>", (tmp_path / "gates.svg").read_text()))

    apart = labels(2, removed=[4], removed_mlp=[2])
    assert {"attention 4", "MLP 4", "MLP 2"} <= apart and not apart & {"4", "5", "8", "9"}
    assert "Gates: how surely each sublayer is kept, as they are learned" in apart
    # What its gate removed came back as a position that borrows.
    back = labels(
        1,
        removed=[5],
        groups=[Group(blocks=(2, 3, 4), donor="owner", owner=2, start="zero", private=("norms", "scales"))],
    )
    assert {"3", "4", "5"} <= back and not back & {"2"}
