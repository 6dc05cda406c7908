"""foldgpt: make large language models smaller in depth.

Remove redundant blocks, let the rest share weights, and get an ordinary Hugging Face model back:

    import foldgpt

    source = foldgpt.load_source("demo:smollm2-135m")
    plan = foldgpt.FoldPlan.create(foldgpt.source_model_of(source.model), removed=[12, 13])
    foldgpt.fold_(source.model, plan)

Names are imported on first use, so that `import foldgpt` costs nothing.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Any

from foldgpt import autoload

__version__ = version("foldgpt")

_HOME = {
    "Analysis": "foldgpt.analysis",
    "FoldGPTError": "foldgpt.errors",
    "FoldPlan": "foldgpt.plan",
    "Group": "foldgpt.plan",
    "Recipe": "foldgpt.recipe",
    "Request": "foldgpt.selection",
    "SourceModel": "foldgpt.plan",
    "analyze": "foldgpt.analysis",
    "build_report": "foldgpt.report",
    "calibration_windows": "foldgpt.corpus",
    "compare": "foldgpt.side_by_side",
    "compensate_": "foldgpt.compensation",
    "evaluate": "foldgpt.evaluation",
    "evaluation_windows": "foldgpt.corpus",
    "fold_": "foldgpt.folding",
    "keep_freed_memory": "foldgpt.allocator",
    "load_source": "foldgpt.sources",
    "load_suite": "foldgpt.evaluation",
    "perplexity": "foldgpt.evaluation",
    "push": "foldgpt.hub",
    "recover": "foldgpt.recovery",
    "run": "foldgpt.pipeline",
    "save_folded": "foldgpt.folding",
    "select": "foldgpt.selection",
    "source_model_of": "foldgpt.folding",
    "unfold_": "foldgpt.folding",
    "write_model_card": "foldgpt.report",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'foldgpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


autoload.when_transformers_is_imported()
