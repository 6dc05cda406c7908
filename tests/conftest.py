"""Shared fixtures."""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from browser import Page, browser

if TYPE_CHECKING:
    from foldgpt.recipe import Recipe

# Threads of tiny products only get in each other's way; tests of real models ask for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """What is there by now stays: looking through it for garbage, at each load of a model, takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as shown:
        yield shown


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and a text."""
    # Late: torch is to see what is set above.
    from run_inputs import tiny_source, tiny_text

    folder = tmp_path_factory.mktemp("inputs")
    return tiny_source(folder / "model"), tiny_text(folder / "text.txt")


@pytest.fixture(scope="module")
def model(inputs: tuple[Path, Path]) -> Path:
    """The tiny model of `inputs`."""
    return inputs[0]


@pytest.fixture(scope="module")
def text(inputs: tuple[Path, Path]) -> Path:
    """The text of `inputs`."""
    return inputs[1]


@pytest.fixture(autouse=True)
def loud_again() -> Iterator[None]:
    """What a test silences (`-q`) speaks again in the next one."""
    yield
    from foldgpt import progress

    progress.be_quiet(False)


@pytest.fixture(autouse=True)
def unpainted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are laid out and not painted, which takes most of their time; a test that looks at them is marked."""
    if request.node.get_closest_marker("paints"):
        return
    from foldgpt import figures
    from foldgpt.artifacts import write_text

    def save(figure: Any, path_stem: str | Path) -> tuple[Path, Path]:
        png, svg = (Path(path_stem).with_name(f"{Path(path_stem).name}.{kind}") for kind in ("png", "svg"))
        for path in (png, svg):
            write_text(path, "unpainted")
        return png, svg

    monkeypatch.setattr(figures, "save_figure", save)


@pytest.fixture
def recipe(inputs: tuple[Path, Path]) -> Recipe:
    """A recipe of a whole run on them."""
    from foldgpt.recipe import Recipe
    from run_inputs import tiny_recipe

    return Recipe.from_dict(tiny_recipe(*inputs))


@pytest.fixture
def stages_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages that are really made, in order."""
    from foldgpt import pipeline
    from run_inputs import MAKERS

    made: list[str] = []
    for stage, name in MAKERS.items():
        maker = getattr(pipeline, name)

        def spy(*args: Any, stage: str = stage, maker: Any = maker, **kwargs: Any) -> Any:
            made.append(stage)
            return maker(*args, **kwargs)

        monkeypatch.setattr(pipeline, name, spy)
    return made


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; needs the right to mount one."""
    place = tmp_path / "small"
    place.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("no mount on this system")
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)
