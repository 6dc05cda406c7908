"""By which texts a checkpoint was made, and the models before it: folding and recovery may be repeated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from foldgpt.artifacts import read_json
from foldgpt.errors import ArtifactError, FoldGPTError
from foldgpt.plan import WITHOUT_TEXT, FoldPlan
from foldgpt.progress import note
from foldgpt.recovery_result import read_recovery

#: The file beside a checkpoint that tells of the models before it.
HISTORY = "history.json"


@dataclass(frozen=True)
class Training:
    """A recovery whose result was kept.

    Attributes:
        texts: what it was trained on, as text specs.
        num_tokens: tokens behind the state that was kept.
    """

    texts: list[str]
    num_tokens: int


@dataclass(frozen=True)
class History:
    """Texts that models were made by.

    Attributes:
        calibration: text specs that blocks were chosen or fitted on.
        training: recoveries, the first one first.
    """

    calibration: list[str] = field(default_factory=list)
    training: list[Training] = field(default_factory=list)

    def to_json_dict(self) -> dict[str, Any]:
        """The history as plain JSON values."""
        return asdict(self)

    @property
    def notes(self) -> dict[str, Any]:
        """The file that goes beside a model made of this one, by its name; none where there is nothing to tell."""
        return {} if self == History() else {HISTORY: self.to_json_dict()}

    @property
    def uses(self) -> dict[str, list[str]]:
        """Use, "calibration" or "training" → text specs."""
        return {
            "calibration": self.calibration,
            "training": [text for training in self.training for text in training.texts],
        }


def earlier_history(folder: Path) -> History:
    """What the models were made by that the checkpoint in a folder was made of; nothing where it is not said.

    Raises:
        ArtifactError: the record cannot be read, or is not one.
    """
    path = folder / HISTORY
    if not path.is_file():
        return History()
    try:
        return TypeAdapter(History).validate_python(read_json(path, "history of a model"))
    except ValidationError as error:
        raise ArtifactError(f"{path} is not the history of a model") from error


def history_of(folder: Path, *, with_plan: bool = True, with_recovery: bool = True) -> History:
    """What a checkpoint was made by, and the models before it.

    Args:
        folder: the checkpoint.
        with_plan: count what its plan was made on, and what was fitted by it.
        with_recovery: count its own recovery.

    Raises:
        ArtifactError: a record in it cannot be read, or is not one.
        PlanError: its plan is not valid.
    """
    earlier = earlier_history(folder)
    calibration, training = list(earlier.calibration), list(earlier.training)
    if with_plan and (folder / "plan.json").is_file():
        plan = FoldPlan.load(folder)
        calibration += [text for fit in (plan.compensation, plan.fitting) if fit is not None for text in fit.texts]
        # What was only measured on a text was not made by it.
        decided = plan.origin.get("selector") not in WITHOUT_TEXT or plan.groups or "candidates" in plan.origin
        is_fitted = plan.compensation is not None or plan.fitting is not None or "candidates" in plan.origin
        for name, is_used in (("calibration", decided), ("fitted_on", is_fitted)):
            text = plan.origin.get(name)
            calibration += text.get("specs") or [] if is_used and isinstance(text, Mapping) else []
    result = read_recovery(folder) if with_recovery else None
    if result is not None and result.best_step:
        training.append(Training(result.text.get("texts", []), result.num_tokens_kept))
    return History(list(dict.fromkeys(calibration)), training)


def known_history(folder: Path, *, with_plan: bool = True, with_recovery: bool = True) -> History:
    """The same, as far as the records can be read; that one cannot is said.

    It is nobody's fault who uses the model: a file may be of a later version, or of something else.
    """
    try:
        return history_of(folder, with_plan=with_plan, with_recovery=with_recovery)
    except FoldGPTError as error:
        note(f"it is not known which texts the model was made by: {error}")
        return History()
