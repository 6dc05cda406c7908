"""The dry run: a recipe as it stands, on a tiny random model of the same architecture, in a folder that is dropped."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foldgpt import pipeline, side_by_side
from foldgpt.artifacts import read_json
from foldgpt.checks import check_plan, check_without_files
from foldgpt.comparison import Row, rows_of_recipe
from foldgpt.errors import UnsupportedModelError, UsageError, first_line
from foldgpt.formats import millions
from foldgpt.plan import FoldPlan
from foldgpt.planning import check_rank
from foldgpt.progress import note, quiet_libraries, silently
from foldgpt.recipe import Recipe
from foldgpt.rehearsal.expectation import Expectation, expect, num_searched_for, on_meta
from foldgpt.rehearsal.tiny import config_of, save_tiny, shrunk, write_text_file
from foldgpt.run_folder import FOLDED, RunFolder
from foldgpt.selection import parameters_of
from foldgpt.sharing import limit_of
from foldgpt.sizes import size
from foldgpt.targets import target
from foldgpt.workbench import Workbench

#: Tokens in a window, windows to calibrate on, to search on, to train on in steps, to judge and to measure on.
_CONTEXT, _CALIBRATION, _SEARCH, _STEPS, _HELD_OUT, _TEST = 32, 8, 2, 2, 2, 2
#: Settings that make a training short.
_SHORT_TRAINING = {"batch_size": 2, "micro_batch_size": 2, "evaluate_every": 1, "compile": False}
#: Most columns of a low-rank term; a matrix of the tiny model may have no more rows.
_RANK = 4
#: Stages that are made once for the rows of a comparison; the teacher's states for those that compare the same ones.
_IN_COMMON = ("analysis", "search", "source's perplexity", "teacher")
#: Options of the learned gates.
_SHORT_SEARCH = {"effort": 0.05, "steps": 3}


@dataclass(frozen=True)
class Rehearsal:
    """What a dry run found.

    Attributes:
        model: the model of the recipe.
        rows: name of each run → what the real one takes; one, named "run", unless methods are compared.
        left_out: what a rehearsal cannot do, in words.
        searches: name of each run → identity of its search; rows that select alike share one.
    """

    model: str
    rows: dict[str, Expectation]
    left_out: list[str]
    searches: dict[str, str | None]

    @property
    def flops(self) -> float:
        """Floating-point operations of all; what rows have in common is counted once."""
        return sum(row.flops[stage] for row, stage in self._counted())

    def seconds(self, flops_per_second: float, *, devices: int = 1) -> float:
        """Time of all at a throughput that each of some devices sustains; only the recovery runs on several."""
        return sum(row.on_one_device(stage, devices) for row, stage in self._counted()) / flops_per_second

    def _counted(self) -> Iterator[tuple[Expectation, str]]:
        """Each stage of each run, with its run; what rows have in common comes with the first of them."""
        seen: set[tuple[str, str | None, float]] = set()
        for name, row in self.rows.items():
            for stage, flops in row.flops.items():
                key = (stage, self.searches[name] if stage == "search" else None, flops)
                if stage in _IN_COMMON and key in seen:
                    continue
                seen.add(key)
                yield row, stage


def rehearse(recipe: Recipe, *, compare: bool = False) -> Rehearsal:
    """Run a recipe, or its comparison, on a tiny model at toy budgets, and count what the real one takes.

    The tiny model has the real one's architecture and number of blocks, so the same selectors, the same plans and the
    same checks run; texts are replaced by a made-up one, and tasks are left out. What those checks would miss in it,
    because the toy has contexts, tasks and loggers of its own, is checked of the recipe itself.

    Raises:
        SourceError: the model's config cannot be had.
        UnsupportedModelError: the model runs code of its own, cannot be made small, or not be counted on the meta
            device.
        FoldGPTError: what the real run would raise as well.
    """
    config = config_of(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    note(f"rehearsing {recipe.model} on a tiny random model")
    with tempfile.TemporaryDirectory(prefix="foldgpt-dry-run-") as name, silently(), quiet_libraries(), _one_thread():
        folder = Path(name)
        rows_of_real = rows_of_recipe(recipe) if compare else []
        _check(recipe, rows_of_real, config)
        toy = _toy(recipe, config, folder)
        if compare:
            side_by_side.compare(toy, folder / "run")
            places = {row.title: (row.recipe, folder / "run" / side_by_side.ROWS / row.folder) for row in rows_of_real}
        else:
            pipeline.run(toy, folder / "run")
            places = {"run": (recipe, folder / "run")}
        # The rows of a comparison share what the teacher says.
        cached = compare or recipe.recover.teacher_cache is not None
        rows = {name: _expect(config, one, place, cached, compared=compare) for name, (one, place) in places.items()}
        searches = {name: RunFolder(run).inputs_of("selection") for name, (_, run) in places.items()}
    left_out = ["texts are made up"]
    if recipe.evaluate.tasks:
        left_out.append(f"tasks are left out ({', '.join(recipe.evaluate.tasks)})")
    return Rehearsal(recipe.model, rows, left_out, searches)


def _check(recipe: Recipe, rows: Sequence[Row], config: Any) -> None:
    """Refuse what the real run, or that of a row, refuses before it measures anything."""
    # The rows of a comparison have a folder in common.
    common = Path(side_by_side.ROWS) if rows else None
    bench = _RealBench(recipe, config, common)
    model = _on_meta_if_it_goes(recipe, config) if rows or recipe.share.rank else None
    if not rows:
        check_plan(bench)
        _check_rank(recipe, model)
    # Rows have contexts, tasks and loggers in common.
    check_without_files(bench)
    for row in rows:
        with side_by_side.named(row):
            check_plan(_RealBench(row.recipe, config, common))
            _check_rank(row.recipe, model)
    if rows and model is not None:
        side_by_side.check_expected_budgets(rows, model, recipe.compare)


def _on_meta_if_it_goes(recipe: Recipe, config: Any) -> Any:
    """The real model without values; None where it cannot be built so, which is said where it is counted."""
    try:
        return on_meta(config, recipe)
    except (RuntimeError, TypeError, ValueError):
        return None


def _check_rank(recipe: Recipe, model: Any) -> None:
    """The toy's matrices are smaller than the real ones, and its rank with them."""
    if model is not None:
        check_rank(recipe, model)


class _RealBench(Workbench):
    """The inputs of the real run as far as its config tells. The toy has budgets of its own."""

    def __init__(self, recipe: Recipe, config: Any, common: Path | None) -> None:
        super().__init__(recipe, common=common)
        self.config = config


def _expect(config: Any, recipe: Recipe, run: Path, teacher_cached: bool, *, compared: bool) -> Expectation:
    """What the real run takes, by what the rehearsed one made."""
    folded = read_json(run / FOLDED / "config.json", "config of the folded model")
    settings = Workbench(recipe).recovery_settings
    with _counting(config):
        plan, layout = FoldPlan.load(run), folded.get("fold_layout")
        return expect(config, recipe, plan, settings, layout, teacher_cached=teacher_cached, compared=compared)


@contextmanager
def _counting(config: Any) -> Iterator[None]:
    """Say of a model that it cannot be counted without its weights.

    There are kernels that know no meta tensors, in this format or at all, and models that look at the values of a mask.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"what the real {config.model_type} takes cannot be counted on PyTorch's meta device: {first_line(error)}"
        ) from error


def _toy(recipe: Recipe, config: Any, folder: Path) -> Recipe:
    """The recipe on a tiny model and next to no tokens."""
    model = save_tiny(shrunk(config), folder / "model", seed=recipe.seed)
    text = str(write_text_file(folder / "text.txt"))
    toy = recipe.model_dump(mode="json")
    toy |= {"model": str(model), "revision": None, "dtype": "float32", "device": "cpu", "max_memory_gb": None}
    toy["calibration"] |= {"texts": [text], "context": _CONTEXT, "num_tokens": _CALIBRATION * _CONTEXT}
    toy["select"]["num_tokens"] = _SEARCH * _CONTEXT
    if recipe.select.method == "gates":
        toy["select"]["options"] = {
            **_SHORT_SEARCH,
            **{k: v for k, v in recipe.select.options.items() if k not in _SHORT_SEARCH},
        }
    if recipe.select.target is not None:
        toy["select"] |= {"target": None, "remove": _number_for(recipe, config)}
    toy["share"] |= _toy_share(toy["share"], recipe, config)
    toy["evaluate"] |= {
        "texts": [text],
        "context": _CONTEXT,
        "stride": None,
        "max_windows": _TEST,
        "tasks": [],
        "data_dir": None,
        "limit": None,
        "speed": False,
        "memory": False,
        "generations": 0,
    }
    toy["compare"]["bootstrap_samples"] = 100
    # Shapes differ, and with them how much of a block its attention is: budgets are not those of the real model.
    toy["compare"]["unequal_budgets"] = "flag"
    if recipe.recover.num_tokens:
        toy["recover"] |= {
            "texts": None,
            "context": _CONTEXT,
            "num_tokens": _STEPS * 2 * _CONTEXT,
            "held_out_tokens": _HELD_OUT * _CONTEXT,
            "teacher_cache": None,
            "report_to": [],
            "settings": {**recipe.recover.settings, **_SHORT_TRAINING},
        }
    for change in (toy["compare"]["rows"] or {}).values():
        _shorten_(change or {}, recipe, config)
    return Recipe.from_dict(toy)


def _shorten_(change: dict[str, Any], recipe: Recipe, config: Any) -> None:
    """Let a row's change fit the toy; what is no mapping is refused later, with its place."""
    share, recover, select = change.get("share"), change.get("recover"), change.get("select")
    if isinstance(select, dict) and isinstance(select.get("target"), str):
        aimed = recipe.changed(select={"target": select["target"]})
        select |= {"target": None, "remove": _number_for(aimed, config)}
    if isinstance(share, dict):
        share |= _toy_share(share, recipe, config)
    if isinstance(recover, dict) and isinstance(recover.get("settings"), dict):
        recover["settings"] |= {name: _SHORT_TRAINING[name] for name in _SHORT_TRAINING if name in recover["settings"]}


def _toy_share(share: dict[str, Any], recipe: Recipe, config: Any) -> dict[str, Any]:
    """Size and rank, where they are there, for a model that is far smaller."""
    change = {"size": _fraction(share["size"], recipe, config)} if "size" in share else {}
    return change | ({"rank": min(_RANK, share["rank"])} if isinstance(share.get("rank"), int) else {})


def _number_for(recipe: Recipe, config: Any) -> int:
    """How many blocks of the real model a target means.

    Raises:
        UsageError: it is a time that only the real machine can tell.
    """
    wanted = target(recipe.select.target or "")
    if wanted.is_measured and not wanted.is_ratio:
        raise UsageError(
            f"select.target is {recipe.select.target}: a rehearsal measures no times. Give it as a part of the "
            "source's, such as decode=80%, which is taken for a part of the operations here"
        )
    with _counting(config):
        return num_searched_for(recipe, on_meta(config, recipe))


def _fraction(written: Any, recipe: Recipe, config: Any) -> Any:
    """A size of the real model as the fraction of its blocks' parameters that it leaves."""
    if written is None or size(written).unit == "ratio":
        return written
    source = on_meta(config, recipe)
    left = parameters_of(source)
    ratio = 1 - (left.total - limit_of(source, size(written))) / sum(left.per_block)
    if not 0 < ratio < 1:
        raise UsageError(
            f"share.size {written!r} is not between the model without its blocks and the whole model, which has "
            f"{millions(left.total)} parameters, {millions(sum(left.per_block))} of them in blocks"
        )
    return ratio


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tiny products are slower on many threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
