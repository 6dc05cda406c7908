"""What a sweep found: plain numbers, validated and versioned, without torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from foldgpt.errors import ArtifactError, UsageError, first_problem


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SourceIdentity(_Value):
    """Which model was analysed."""

    spec: str
    """As the user named it: hub id, folder, GGUF file or `demo:` name."""
    revision: str | None = None
    fingerprint: str
    """Content hash of the model."""


class CalibrationIdentity(_Value):
    """Which text it was analysed on."""

    protocol: dict[str, Any]
    """How the windows were made: text, number of windows, context, seed, BOS, join rule."""
    fingerprint: str
    """Content hash of the token ids."""
    specs: list[str] | None = None
    """The texts, files by their whole paths; the protocol has names without folders. None in earlier versions."""
    num_tokens: int | None = None
    """Tokens that were asked for; likewise."""


class SublayerMeasures(_Value):
    """What one kind of sublayer (attention or MLP) does to the residual stream, one entry per block.

    "Input" is the stream before the sublayer's update is added, "output" the stream after it. In families
    whose sublayers run in parallel both start from the block's input x: the attention's output is x + a,
    the MLP's is x + m, where the block returns x + a + m.
    """

    bi: list[float]
    """1 − mean cosine of the sublayer's input and output."""
    relative_update: list[float]
    """Mean of ‖output − input‖ / ‖input‖."""

    @property
    def similarity(self) -> list[float]:
        """Mean cosine of the sublayer's input and output, one entry per block."""
        return [1 - bi for bi in self.bi]


class Analysis(_Value):
    """Redundancy of the blocks of one model on one calibration text.

    h_0 … h_N is the residual stream at the block boundaries of a model with N blocks: h_i enters block i,
    h_N leaves the last block, before the final norm. All measures are means over unmasked tokens.
    """

    format: Literal["foldgpt.analysis"] = "foldgpt.analysis"
    version: Literal[1] = 1
    model_type: str
    num_blocks: int
    num_windows: int
    num_tokens: int
    """Unmasked tokens."""
    source: SourceIdentity | None = None
    calibration: CalibrationIdentity | None = None
    dtype: str | None = None
    """What the model computed in, such as "bfloat16"; None in analyses of earlier versions."""
    seconds: float
    """Wall-clock time of the sweep, including the parts before an interruption."""

    bi: list[float]
    """Block influence, 1 − E[cos(h_i, h_{i+1})], one entry per block (ShortGPT, arXiv 2403.03853, eq. 1)."""
    relative_update: list[float]
    """E[‖h_{i+1} − h_i‖ / ‖h_i‖], one entry per block."""
    cosine: list[list[float]]
    """E[cos(h_i, h_j)], shape [N + 1, N + 1], symmetric."""
    angular: list[list[float]]
    """`angular[n - 1][i]` = E[arccos(cos(h_i, h_{i+n})) / π], the distance that removing the n blocks
    i … i+n−1 leaves open (Gromov et al., arXiv 2403.17887, eq. 7). Row n − 1 has N − n + 1 entries."""
    angular_last_token: list[list[float]]
    """The same over the last unmasked token of each window alone, as in that paper."""
    attention: SublayerMeasures | None = None
    """None when the family's sublayers are not known."""
    mlp: SublayerMeasures | None = None

    @model_validator(mode="after")
    def _check_shapes(self) -> Analysis:
        n = self.num_blocks
        if n < 1:
            raise ValueError(f"num_blocks is {n}")
        per_block = {"bi": self.bi, "relative_update": self.relative_update}
        for name, sublayer in (("attention", self.attention), ("mlp", self.mlp)):
            if sublayer is not None:
                per_block[f"{name}.bi"] = sublayer.bi
                per_block[f"{name}.relative_update"] = sublayer.relative_update
        for name, values in per_block.items():
            if len(values) != n:
                raise ValueError(f"{name} has {len(values)} entries for {n} blocks")
        if [len(row) for row in self.cosine] != [n + 1] * (n + 1):
            raise ValueError(f"cosine is not a matrix of {n + 1} x {n + 1}")
        for name, spans in (("angular", self.angular), ("angular_last_token", self.angular_last_token)):
            if [len(row) for row in spans] != list(range(n, 0, -1)):
                raise ValueError(f"{name} must have rows of {n}, {n - 1}, … 1 entries")
        return self

    @property
    def similarity(self) -> list[float]:
        """Mean cosine of each block's input and output, one entry per block."""
        return [1 - bi for bi in self.bi]

    def angular_span(self, num_blocks: int, *, last_token: bool = False) -> list[float]:
        """Angular distance across each run of `num_blocks` blocks, indexed by the run's first block.

        Args:
            num_blocks: length of the run, 1 … N.
            last_token: over the last token of each window (as published) instead of all tokens.

        Returns:
            N − num_blocks + 1 distances in [0, 1].

        Raises:
            UsageError: no run of that length exists.
        """
        if not 1 <= num_blocks <= self.num_blocks:
            raise UsageError(f"no run of {num_blocks} blocks among {self.num_blocks}: choose 1 to {self.num_blocks}.")
        return (self.angular_last_token if last_token else self.angular)[num_blocks - 1]

    def best_angular_span(self, num_blocks: int, *, last_token: bool = False) -> int:
        """First block of the run of `num_blocks` blocks that spans the smallest angular distance."""
        distances = self.angular_span(num_blocks, last_token=last_token)
        return distances.index(min(distances))

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for `artifacts.write_json`."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json_dict(cls, value: Any) -> Analysis:
        """Read what `to_json_dict` wrote.

        Raises:
            ArtifactError: not an analysis, of another version, or inconsistent; the message names the field.
        """
        found = value.get("format") if isinstance(value, dict) else None
        if found != "foldgpt.analysis":
            raise ArtifactError(f"not an analysis: its 'format' is {found!r}, expected 'foldgpt.analysis'.")
        if value.get("version") != 1:
            raise ArtifactError(
                f"analysis of version {value.get('version')!r}, but this foldgpt reads version 1. "
                "Run `foldgpt analyze` again."
            )
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise ArtifactError(f"invalid analysis: {first_problem(error)}") from error
