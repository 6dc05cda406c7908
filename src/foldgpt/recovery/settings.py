"""What a recovery is to do, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal

from foldgpt.errors import UsageError, did_you_mean
from foldgpt.objectives import Divergence

_CHOICES: dict[str, tuple[str, ...]] = {
    "divergence": ("forward", "reverse", "skewed"),
    "states_at": ("cuts", "all"),
    "train_blocks": ("all", "behind"),
    "train_fully": ("none", "cuts", "all"),
}
#: Annotation → what it is called, whether a value is one, and its plain type. In Python True is a number.
_KINDS: dict[str, tuple[str, Callable[[object], bool], Callable[[Any], float]]] = {
    "bool": ("true or false", lambda value: isinstance(value, bool), bool),
    "int": ("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool), int),
    "float": ("a number", lambda value: isinstance(value, Real) and not isinstance(value, bool), float),
}


@dataclass(frozen=True, kw_only=True)
class RecoverySettings:
    """How the student is trained. Weights of 0 leave a loss out.

    Raises:
        UsageError: a value that makes no sense; the message names it.
    """

    kl: float = 1.0
    """Weight of the divergence of the next-token distributions."""
    divergence: Divergence = "forward"
    """Which one: forward, reverse or skewed."""
    temperature: float = 1.0
    """What both models' logits are divided by in the divergence."""
    skew: float = 0.1
    """Share of the teacher in the mixture of the skewed divergence."""
    lm: float = 0.0
    """Weight of the language-modelling loss."""
    last_error: float = 0.0
    """Weight of the relative squared error of the last hidden states (after the final norm)."""
    last_cosine: float = 0.0
    """Weight of their cosine distance."""
    states: float = 0.0
    """Weight of the relative squared error of states between the blocks, aligned by source index."""
    states_at: Literal["cuts", "all"] = "cuts"
    """Behind which kept blocks they are compared: those before a cut, or all."""
    rank: int = 16
    """Rank of the LoRA terms; 0 for none."""
    alpha: float | None = None
    """LoRA's scale is alpha / rank; by default alpha is the rank."""
    norms: bool = True
    """Train the scales of the norms, which are private to each position."""
    private_terms: bool = True
    """Train the scales and low-rank terms that positions have beside shared weights."""
    scale_rate: float = 1.0
    """Learning rate of those scales, and of the norms that stand for them, as a multiple of `learning_rate`."""
    train_blocks: Literal["all", "behind"] = "all"
    """Train all blocks, or only the first one that folding changed (as a rule the one before the first cut) and those
    behind it. The others are the teacher's own then, and are run once for both."""
    train_fully: Literal["none", "cuts", "all"] = "none"
    """Train the blocks on both sides of each cut in full instead of by LoRA, or all blocks of `train_blocks`."""
    learning_rate: float = 1e-3
    """Highest learning rate; it falls to 0 along a cosine over all tokens."""
    warmup_ratio: float = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    batch_size: int = 2
    """Windows in one step, over all processes. Few: short trainings gain more from many steps than from large ones."""
    micro_batch_size: int = 4
    """Windows in one forward pass of one process."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile blocks and losses by `torch.compile`: a quarter less time for a step on a GPU, over a third on a CPU with
    AMX; on another CPU compiling takes minutes, and saves less than a tenth."""
    minutes: float | None = None
    """Stop after this time, also when it was spent before and after an interruption."""
    evaluate_every: int = 100
    """Steps between two measurements on the held-out windows; the state is saved each time."""
    patience: int | None = None
    """Stop after so many measurements without a better one."""
    seed: int = 0
    """Seed of the first LoRA terms and of all that is drawn."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UsageError(f"unknown {name} {value!r}.{did_you_mean(str(value), choices)}")
        for field in fields(self):
            value = getattr(self, field.name)
            kind = str(field.type).removesuffix(" | None")
            is_left_out = value is None and field.default is None
            if kind in _KINDS and not is_left_out:
                words, is_one, plain = _KINDS[kind]
                if not is_one(value):
                    raise UsageError(f"{field.name} must be {words}, not {value!r}")
                if type(value) not in (bool, int, float):
                    # numpy's numbers are taken, and cannot be written as JSON.
                    value = plain(value)
                    object.__setattr__(self, field.name, value)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{field.name} must be a finite number, not {value}")
        for name in ("kl", "lm", "last_error", "last_cosine", "states", "weight_decay", "rank"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("temperature", "learning_rate", "scale_rate", "max_grad_norm", "minutes", "alpha"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be more than 0, not {value}")
        for name in ("batch_size", "micro_batch_size", "evaluate_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.skew < 1:
            raise UsageError(f"skew must be at least 0 and below 1, not {self.skew}")
        # transformers seeds numpy as well, which takes no other.
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed must be at least 0 and below 2^32, not {self.seed}")
        if not 0 <= self.warmup_ratio < 1:
            raise UsageError(f"warmup_ratio must be at least 0 and below 1, not {self.warmup_ratio}")
        if not (self.kl or self.lm or self.last_error or self.last_cosine):
            raise UsageError("nothing is asked of the student's output: set kl, lm, last_error or last_cosine")
        if not (self.rank or self.norms or self.private_terms or self.train_fully != "none"):
            raise UsageError("nothing is trained: set rank, norms, private_terms or train_fully")
        if self.compile and self._compares_all_states:
            raise UsageError(
                "compile with states_at=all: each block would be compiled by itself. Compare states at cuts, or do "
                "without compile"
            )
        self._check_idle()

    def _check_idle(self) -> None:
        """Refuse what was set and would change nothing: whoever set it expects that it does."""
        needs = {
            "divergence": (self.kl > 0, "is of the loss kl, and its weight is 0"),
            "temperature": (self.kl > 0, "is of the loss kl, and its weight is 0"),
            "skew": (self.divergence == "skewed", f"is of the skewed divergence, and this one is {self.divergence}"),
            "states_at": (self.states > 0, "says where states are compared, and their weight (states) is 0"),
            "rank": (
                self.train_fully != "all" or self.rank == 0,
                "is of LoRA terms, and there are none: train_fully is all (which a rank of 0 agrees with)",
            ),
            "alpha": (
                self.rank > 0 and self.train_fully != "all",
                f"is of LoRA terms, and there are none: {'rank is 0' if self.rank == 0 else 'train_fully is all'}",
            ),
            "scale_rate": (self.norms or self.private_terms, "is of scales, and none are trained"),
        }
        for field in fields(self):
            is_read, why = needs.get(field.name, (True, ""))
            if not is_read and (value := getattr(self, field.name)) != field.default:
                raise UsageError(f"{field.name} is {value}, but it {why}: leave it out, or set what it is for")

    @property
    def may_compile(self) -> bool:
        """Whether it does not compile, and could: not where states are compared behind all blocks."""
        return not self.compile and not self._compares_all_states

    @property
    def _compares_all_states(self) -> bool:
        return bool(self.states and self.states_at == "all")

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss compares with the teacher."""
        return bool(self.kl or self.last_error or self.last_cosine or self.states)

    def identity(self) -> dict[str, object]:
        """All that decides the result, as plain values.

        How long it may take, and in how much memory, is not part of it: one that ran out can go on with less.
        """
        apart = ("minutes", "micro_batch_size", "gradient_checkpointing", "compile")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in apart}
