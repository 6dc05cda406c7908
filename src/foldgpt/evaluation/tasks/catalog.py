"""The tasks that foldgpt knows: one YAML file each, which says what differs from the harness's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from foldgpt.evaluation.tasks.rows import Kind


class TaskDefinition(BaseModel):
    """Where the harness defines a task, and how the same task is read from local rows."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    task: str
    """Name, the harness's own. Prompt, choices and metrics are the harness's."""
    harness: str
    """Folder of the harness's tasks that defines it."""
    headline: str
    """The metric that averages are made of."""
    files: str
    """Glob of the local file; exactly one must match."""
    fields: dict[str, Kind]
    """What each local row must have."""
    local: dict[str, Any] = {}
    """Keys of the harness's definition that local rows need otherwise, because they are laid out otherwise."""


def _read_definitions() -> dict[str, TaskDefinition]:
    folder = Path(__file__).parent / "definitions"
    read = [TaskDefinition.model_validate(yaml.safe_load(path.read_text("utf-8"))) for path in folder.glob("*.yaml")]
    return {definition.task: definition for definition in sorted(read, key=lambda definition: definition.task)}


#: Task → its definition.
TASKS: dict[str, TaskDefinition] = _read_definitions()
