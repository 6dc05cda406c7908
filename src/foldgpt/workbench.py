"""What a recipe works on: model, tokenizer, texts and tasks, each made when it is first needed."""

from __future__ import annotations

from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from foldgpt.analysis import CalibrationIdentity
from foldgpt.compensation import why_not
from foldgpt.corpus import OwnText, Windows, absolute, calibration_windows, evaluation_windows, identity_of
from foldgpt.errors import FoldGPTError, UsageError, did_you_mean
from foldgpt.evaluation import Suite, load_suite
from foldgpt.evaluation.tasks import check_task_names
from foldgpt.families import num_positions
from foldgpt.formats import dtype_name
from foldgpt.plan import Compensation, Fitting
from foldgpt.progress import note
from foldgpt.recipe import Recipe
from foldgpt.recovery import (
    RecoverySettings,
    TrainingWindows,
    packed_windows,
)
from foldgpt.selection import check_name, search_windows
from foldgpt.sources import (
    DTYPES,
    Source,
    companions_fingerprint,
    load_config,
    load_source,
    load_tokenizer,
    model_fingerprint,
    resolve,
    stored_dtype,
)
from foldgpt.validation import explain

#: What depends on model, texts and measurements alone.
_SAME_FOR_ALL_METHODS = (
    "place",
    "fingerprint",
    "companions",
    "tokenizer",
    "calibration",
    "tests",
    "tasks",
    "why_uncompensated",
)


class Workbench:
    """The inputs of a recipe, each made when a stage first needs it.

    Attributes:
        recipe: the recipe.
        recovery_settings: its settings of the recovery, checked.
        common: a folder for what several recoveries from one source have in common, its training windows and what
            the teacher says of them; None keeps the windows beside each run while it lasts, and nothing else.
    """

    def __init__(self, recipe: Recipe, *, common: Path | None = None) -> None:
        """Take a recipe; a name in it that only the code can check is checked now, before anything is loaded.

        Raises:
            UsageError: the selector or a setting of the recovery does not exist.
        """
        check_name(recipe.select.method)
        if recipe.dtype == "float16" and recipe.recover.num_tokens:
            raise UsageError("recovery cannot train in float16, where small gradients round to nothing; use bfloat16")
        self.recipe = recipe
        self.common = common
        self.recovery_settings = _recovery_settings(recipe)

    def training_windows(self, out: Path) -> tuple[TrainingWindows, TrainingWindows]:
        """Windows to train on and to judge by; made once, and kept in `common` or beside `out`.

        Args:
            out: where the recovered model will be.

        Raises:
            FoldGPTError: a text cannot be read or is too short, or the context is longer than the model's.
        """
        section = self.recipe.recover
        self.check_context(f"recover.context is {section.context}", section.context)
        return packed_windows(
            self.recipe.training_texts,
            self.tokenizer,
            self.training_folder(out),
            context=section.context,
            num_tokens=section.num_tokens,
            num_held_out=section.held_out_tokens,
            seed=self.recipe.seed,
            separate_documents=section.separate_documents,
            own=self.own_text,
        )

    def training_folder(self, out: Path) -> Path:
        """Where `training_windows` keeps them."""
        return out.parent / f".{out.name}.windows" if self.common is None else self.common / "windows"

    def check_context(self, words: str, context: int) -> None:
        """Refuse windows that are longer than the model has positions.

        Args:
            words: what asks for them, as the beginning of a sentence.
            context: tokens in one.

        Raises:
            UsageError: they are.
        """
        positions = num_positions(self.config)
        if positions is not None and context > positions:
            raise UsageError(f"{words}, and {self.recipe.model} has {positions} positions")

    @cached_property
    def recovery_texts(self) -> str:
        """Identity of the texts that recovery trains on."""
        return identity_of(self.recipe.training_texts, own=self.own_text)

    @cached_property
    def config(self) -> Any:
        """The model's config as its files have it."""
        return load_config(self.place, trust_remote_code=self.recipe.trust_remote_code)

    @property
    def text_config(self) -> Any:
        """The part of it that describes the blocks."""
        return self.config.get_text_config(decoder=True)

    def for_method(self, recipe: Recipe) -> Workbench:
        """A workbench for another method on the same model, texts and measurements; they are not made again.

        The loaded model, if there is one, goes along: this workbench loads it anew should it need it again.
        """
        other = Workbench(recipe, common=self.common)
        made = vars(self)
        vars(other).update({name: made[name] for name in _SAME_FOR_ALL_METHODS if name in made})
        if "source" in made:
            vars(other)["source"] = made.pop("source")
        return other

    def let_go_of_source(self) -> None:
        """Give the memory of the loaded model back; it is loaded anew when it is asked for."""
        vars(self).pop("source", None)

    @cached_property
    def why_uncompensated(self) -> str | None:
        """Why this model's blocks cannot be compensated, which is said when it is first asked for; None if they can."""
        reason = why_not(self.source.model)
        if reason is not None:
            note(f"without compensation: {reason}")
        return reason

    @cached_property
    def place(self) -> Path:
        """The model's files on this machine."""
        return resolve(self.recipe.model, revision=self.recipe.revision)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the model's weights and config."""
        return model_fingerprint(self.place)

    @cached_property
    def companions(self) -> str:
        """Identity of what lies beside the model's weights and is used and saved with them: tokenizer, generation."""
        return companions_fingerprint(self.place)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(str(self.place), trust_remote_code=self.recipe.trust_remote_code)

    @property
    def own_text(self) -> OwnText:
        """What the model writes itself; it is loaded when something of that is not in the cache."""
        return OwnText(lambda: self.source.model, self.tokenizer, self.fingerprint)

    @cached_property
    def calibration(self) -> Windows:
        """Windows on which redundancy is measured."""
        self.check_calibration_tokens()
        section = self.recipe.calibration
        windows = calibration_windows(
            section.texts,
            self.tokenizer,
            context=section.context,
            num_tokens=section.num_tokens,
            seed=self.recipe.seed,
            own=self.own_text,
        )
        # What is wrong with the text is said first.
        self.check_context(f"calibration.context is {section.context}", section.context)
        return windows

    @property
    def has_read_calibration(self) -> bool:
        """Whether these windows are there already."""
        return "calibration" in vars(self)

    def check_calibration_tokens(self) -> None:
        """Look whether there are tokens enough for one window of each calibration text.

        Raises:
            UsageError: there are not.
        """
        section = self.recipe.calibration
        needed = len(section.texts) * section.context
        if section.num_tokens < needed:
            raise UsageError(
                f"calibration.num_tokens is {section.num_tokens:,}, which does not fill one window of "
                f"{section.context:,} tokens (calibration.context) for each of {len(section.texts)} "
                f"text{'s' if len(section.texts) > 1 else ''}: give at least {needed:,}, or a shorter context"
            )

    @cached_property
    def calibration_identity(self) -> CalibrationIdentity:
        """What is recorded of the calibration text."""
        section = self.recipe.calibration
        return CalibrationIdentity(
            protocol=self.calibration.protocol,
            fingerprint=self.calibration.fingerprint,
            specs=[absolute(text) for text in section.texts],
            num_tokens=section.num_tokens,
        )

    @property
    def compensation(self) -> Compensation:
        """What a plan records, so that folding can compensate on the calibration text."""
        return Compensation(**self._calibration_text)

    @property
    def fitting(self) -> Fitting:
        """What a plan records, so that folding can fit groups on the calibration text."""
        return Fitting(**self._calibration_text)

    @property
    def _calibration_text(self) -> dict[str, Any]:
        section = self.recipe.calibration
        return {
            "texts": tuple(section.texts),
            "context": section.context,
            "num_tokens": section.num_tokens,
            "seed": self.recipe.seed,
            "fingerprint": self.calibration.fingerprint,
        }

    @property
    def selection_ids(self) -> Tensor:
        """Calibration windows for selectors that measure, [W, T]: the first ones; documents are in random order."""
        ids_WT = self.calibration.ids
        return ids_WT[: search_windows(self.recipe.search_tokens, ids_WT.shape[1], len(ids_WT))]

    @property
    def further_selection_ids(self) -> Tensor:
        """Calibration windows that come after those, [W, T]; there may be none."""
        return self.calibration.ids[len(self.selection_ids) :]

    @cached_property
    def tests(self) -> dict[str, Windows]:
        """Text → windows on which perplexity is measured; each text by itself."""
        section = self.recipe.evaluate
        return {
            text: evaluation_windows(
                [text],
                self.tokenizer,
                context=section.context,
                stride=section.stride,
                max_windows=section.max_windows,
            )
            for text in section.texts
        }

    @property
    def test(self) -> Windows | None:
        """Windows of the first of these texts; None if the recipe asks for none."""
        return next(iter(self.tests.values()), None)

    @property
    def further_tests(self) -> dict[str, Windows]:
        """Those of the others."""
        return dict(list(self.tests.items())[1:])

    @cached_property
    def tasks(self) -> Suite | None:
        """Multiple-choice tasks; None if the recipe asks for none."""
        section = self.recipe.evaluate
        if not section.tasks:
            return None
        self.check_tasks()
        return load_suite(section.tasks, data_dir=section.data_dir, limit=section.limit)

    def check_tasks(self) -> None:
        section = self.recipe.evaluate
        if not section.tasks:
            return
        if not section.texts:
            raise UsageError(
                "tasks need a text as well (evaluate.texts): multiple choice alone can hide that a model "
                "no longer writes, so perplexity and last words stand beside it"
            )
        check_task_names(section.tasks)

    @cached_property
    def source(self) -> Source:
        """The loaded model, untouched."""
        return self.load(self.place, self.recipe.model)

    def load(self, place: str | Path, name: str) -> Source:
        """Load a model as the recipe says: in its format, on its device and within its memory.

        Args:
            place: a model's files on this machine.
            name: what it is called in messages.
        """
        recipe = self.recipe
        note(f"loading {name}")
        return load_source(
            str(place),
            dtype=self._computed_dtype,
            device=recipe.device,
            max_memory_gb=recipe.max_memory_gb,
            trust_remote_code=recipe.trust_remote_code,
        )

    @cached_property
    def _computed_dtype(self) -> str:
        """Number format to load in. What was saved in another one computes in the source's own all the same."""
        stored = None if self.recipe.save_dtype == "auto" else stored_dtype(self.place)
        if self.recipe.dtype != "auto" or stored is None:
            return self.recipe.dtype
        return next((name for name, dtype in DTYPES.items() if dtype == stored), "auto")

    def take_source(self) -> Source:
        """Hand the loaded model over to be changed in place; whoever needs the source again loads it anew.

        Raises:
            FoldGPTError: the model does not fit in memory.
        """
        source = self.source
        if source.offloaded:
            raise FoldGPTError(
                f"{self.recipe.model} does not fit in the memory that is free (or allowed by max_memory_gb). Analysis "
                "runs from disk, but folding needs the whole model in memory."
            )
        del self.source
        return source

    def save_dtype(self, place: Path) -> torch.dtype | None:
        """Number format in which what is made of a checkpoint is saved; None for that in which it is computed.

        Args:
            place: the checkpoint: a source, or a folded model that is recovered.
        """
        if self.recipe.save_dtype != "auto":
            return DTYPES[self.recipe.save_dtype]
        computed, stored = DTYPES.get(self.recipe.dtype), stored_dtype(place)
        # Digits that the source has not are not worth their bytes.
        return stored if computed is not None and stored is not None and stored.itemsize < computed.itemsize else None

    @property
    def numerics(self) -> dict[str, Any]:
        """What, beside model and text, changes the numbers a model computes."""
        # Which format "auto" is stands in the config, and there it is no part of the model's fingerprint.
        stored = stored_dtype(self.place) if self.recipe.dtype == "auto" else None
        dtype = self.recipe.dtype if stored is None else dtype_name(stored)
        return {"dtype": dtype, "device": self.recipe.device}


def _recovery_settings(recipe: Recipe) -> RecoverySettings:
    values: dict[str, Any] = {"seed": recipe.seed, **recipe.recover.settings}
    if recipe.recover.minutes is not None:
        if "minutes" in values:
            raise UsageError("recover: give minutes once, not in settings as well")
        values["minutes"] = recipe.recover.minutes
    known = {field.name: field for field in fields(RecoverySettings)}
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"recovery has no setting {name!r}.{did_you_mean(name, known)}")
        # It would be taken for 1 or 0, and they for it.
        is_switch = known[name].type == "bool"
        if isinstance(value, bool) != is_switch and not isinstance(value, str):
            wanted = "true or false" if is_switch else "neither true nor false"
            raise UsageError(f"recover.settings.{name} must be {wanted}, not {value!r}")
    try:
        return TypeAdapter(RecoverySettings).validate_python(values)
    except ValidationError as error:
        raise UsageError(f"recover.settings: {explain(error)}") from None
