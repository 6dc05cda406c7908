"""Teaches transformers to load folded checkpoints as soon as both it and foldgpt are imported.

Registration needs transformers (and torch), which take seconds to import, and `import foldgpt` must stay
quick. So it waits until somebody imports transformers' Auto classes, in whichever order.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def _register() -> None:
    importlib.import_module("foldgpt.modeling.registration")


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the normal finders find transformers' Auto module, and registers once it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AUTO_CONFIG:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            loader = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                _register()

            loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def when_transformers_is_imported() -> None:
    """Register the folded classes now if transformers' Auto classes are loaded, else when they will be."""
    if _AUTO_CONFIG in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())
