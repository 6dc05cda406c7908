"""Imports point only downwards: a room knows those below it, never those beside or above."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "foldgpt"

#: Lowest first. A room may import from lower layers only; a module of the package has to stand in one of them.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "system_memory"),
    # autoload reaches modeling by name, later
    (
        "allocator",
        "free_memory",
        "artifacts",
        "counts",
        "formats",
        "block_lists",
        "byte_cache",
        "fingerprints",
        "progress",
        "environment",
        "autoload",
        "strict_yaml",
    ),
    ("",),  # the package itself: it imports nothing but `autoload` until a name is asked for
    ("assignments", "cache", "validation", "sizes", "targets", "wikipedia", "recovery_result", "progress_file"),
    ("plan",),
    ("strip", "plan_lines", "history"),
    ("recipe", "architectures"),
    ("families", "attention"),
    ("modeling",),
    ("folding", "demo"),
    ("sources",),
    ("corpus",),
    ("analysis", "objectives"),
    ("replay",),
    ("compensation",),
    ("sharing",),
    ("selection",),
    ("recovery",),
    ("evaluation", "export"),
    ("tables",),
    ("comparison",),
    ("figures", "report"),
    ("run_folder",),
    ("hub",),
    ("workbench",),
    ("checks",),
    ("steps", "planning"),
    ("pipeline",),
    ("side_by_side",),
    ("rehearsal",),
    ("cli",),
)
LAYER_OF = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}


def room_of(path: Path, package: Path = PACKAGE) -> str:
    """The room a file belongs to: the module or package right below foldgpt; "" for foldgpt itself."""
    first = path.relative_to(package).parts[0]
    return first.removesuffix(".py").replace("__init__", "")


def imports_of(path: Path, package: Path = PACKAGE) -> Iterator[tuple[int, str]]:
    """Line and room of each import from foldgpt in a file, late imports too, those for type checkers left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parents = path.relative_to(package.parent).parent.parts
    for node in nodes_that_run(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            # `from foldgpt import plan` imports a module, `from foldgpt.plan import FoldPlan` a name of one.
            modules = [f"{module}.{alias.name}" for alias in node.names] if module == "foldgpt" else [module]
        else:
            continue
        for module in modules:
            if module.split(".")[0] == "foldgpt":
                room = ".".join(module.split(".")[1:2])
                yield node.lineno, room if exists(room, package) else ""


def exists(room: str, package: Path) -> bool:
    return (package / room).is_dir() or (package / f"{room}.py").is_file()


def nodes_that_run(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield other
                yield from nodes_that_run(other)
            continue
        yield child
        yield from nodes_that_run(child)


def wrong_imports(package: Path = PACKAGE) -> list[str]:
    wrong = []
    for path in sorted(package.rglob("*.py")):
        room = room_of(path, package)
        if room not in LAYER_OF:
            wrong.append(f"{room}: a room without a layer; give it one in {Path(__file__).name}")
            continue
        for line, other in imports_of(path, package):
            if other != room and LAYER_OF.get(other, -1) >= LAYER_OF[room]:
                wrong.append(f"{path.relative_to(package)}:{line} ({room}) imports {other or 'foldgpt'}")
    return wrong


def test_imports_point_downwards() -> None:
    assert not wrong_imports()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"plan.py": "from foldgpt.recipe import Recipe", "recipe.py": ""}, ["plan.py:1 (plan) imports recipe"]),
        ({"plan.py": "from foldgpt import recipe", "recipe.py": ""}, ["plan.py:1 (plan) imports recipe"]),
        ({"plan.py": "import foldgpt.recipe as r", "recipe.py": ""}, ["plan.py:1 (plan) imports recipe"]),
        ({"plan.py": "from . import recipe", "recipe.py": ""}, ["plan.py:1 (plan) imports recipe"]),
        ({"plan.py": "from .recipe import Recipe", "recipe.py": ""}, ["plan.py:1 (plan) imports recipe"]),
        (
            {"families/__init__.py": "", "families/table.py": "from ..folding import fold_", "folding.py": ""},
            ["families/table.py:1 (families) imports folding"],
        ),
        ({"figures.py": "import foldgpt.report", "report.py": ""}, ["figures.py:1 (figures) imports report"]),
        ({"plan.py": "def f():\n    from foldgpt import cli", "cli.py": ""}, ["plan.py:2 (plan) imports cli"]),
        ({"errors.py": "import foldgpt"}, ["errors.py:1 (errors) imports foldgpt"]),
        (
            {"plan.py": "if not TYPE_CHECKING:\n    pass\nelse:\n    from foldgpt import cli", "cli.py": ""},
            ["plan.py:4 (plan) imports cli"],
        ),
        ({"plan.py": "if TYPE_CHECKING:\n    from foldgpt.cli import main", "cli.py": ""}, []),
        ({"cli.py": "from foldgpt.plan import FoldPlan\nimport foldgpt, json", "plan.py": ""}, []),
        ({"families/__init__.py": "from foldgpt.families.table import x", "families/table.py": ""}, []),
        ({"novel.py": ""}, ["novel: a room without a layer; give it one in test_imports.py"]),
    ],
    ids=str,
)
def test_the_test_sees_every_kind_of_import(tmp_path: Path, files: dict[str, str], expected: list[str]) -> None:
    package = tmp_path / "foldgpt"
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    assert wrong_imports(package) == expected


@pytest.mark.parametrize(
    "module", ["foldgpt", "foldgpt.errors", "foldgpt.artifacts", "foldgpt.progress", "foldgpt.plan", "foldgpt.recipe"]
)
def test_words_need_no_torch(module: str) -> None:
    """`foldgpt --help` has half a second, and torch alone takes more."""
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'numpy', 'matplotlib'}} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "[]"


def test_every_public_name_is_where_the_package_says() -> None:
    import foldgpt

    for name in foldgpt.__all__:
        assert getattr(foldgpt, name) is not None
        assert name in dir(foldgpt)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        foldgpt.nonsense  # noqa: B018
