"""The fit at one cut, in closed form, fast enough to run inside a search for blocks to remove."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foldgpt.compensation.carriers import inner_module, norm_behind, output_matrices, output_module
from foldgpt.compensation.correction import Correction, CutReport, Start, changed_by
from foldgpt.compensation.least_squares import Sums, added, best_ridge, downhill, solve
from foldgpt.compensation.through_norm import NormedFit, error_of, fit_through_norm
from foldgpt.errors import NotFiniteError, UnsupportedModelError, UsageError
from foldgpt.families.norms import effective_scale, epsilon_of, rms_normed
from foldgpt.plan import Sublayer
from foldgpt.replay import Replay

#: Tried on held-out tokens under ridge="auto".
RIDGES = (1e-3, 1e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)

#: The share of the tokens (the last ones, in whole windows) on which a fit is judged.
_HELD_OUT = 0.25

#: Tokens are massive whose states are so many times the median. All later blocks attend to them, and they are few (the
#: first of each window, often): together they count as at least this share of a fit, which is 1 in 512 made ten times
#: as heavy. With ten times that again, fits of states in bf16 become worse (docs/lab-notebook.md).
MASSIVE, _SHARE_OF_MASSIVE = 10.0, 0.02


class Compensator:
    """Fits, at a cut, the linear map that makes the block before it do the work of the removed ones.

    With M the sublayer's output, X that output or what the output matrix is given, o the stream behind the block and L
    the source's stream where the next kept block begins, D minimises Σ w ‖L − o − X D‖² + ridge ‖D‖² over tokens, and
    the block's M becomes M + X D by a change of its output matrix; no parameter is added. The ridge draws the result
    to the plain removal. The idea is ReplaceMe's (Shopkhoev et al. 2025, arXiv 2505.02819), with X = M.

    Each token counts by 1 / ‖L‖², since the next block normalises its input. So tokens with massive activations would
    weigh no more than others, but later blocks attend to them, and a map that was hardly told of them may change them
    beyond recognition: they are never left out, and together they count as a fiftieth of a fit, or more.

    Args:
        replay: the source, recorded on the windows that are fitted on.
        ridge: multiple of the Gram matrix's mean diagonal; "auto" goes downhill over `RIDGES` on held-out tokens.
        outliers: tokens are left out whose ‖M‖, ‖L − o‖ or ‖L‖ is more than this many times the median;
            by default none.
        spared: tokens that are so many times the median in one of these pass as they are: none is fitted on, none is
            corrected; by default none. For whoever merges nothing: behind a fit on few tokens, those with massive
            activations are changed most, and all later blocks attend to them. Folding's fit leaves them nearly alone.
        rounds: rounds of alternating least squares where a norm stands behind the sublayer (Gemma 2 and 3, OLMo 2).
        parts: with more than 1, the windows are split into so many parts, and each part of the stream is corrected by
            a map that was fitted on the others (cross-fitting). Fewer windows than that make as many parts as there
            are of them, and a single one is cut in two. For whoever measures on the windows that are fitted on: maps
            that fit them alone would pass for good ones, the more of them the better. The correction that is returned
            is fitted on all windows either way.

    Raises:
        UsageError: a number that makes no sense.
        UnsupportedModelError: the family's sublayers are not known, or what a block does with its sublayer's output
            is not a multiple added to the stream.
    """

    def __init__(
        self,
        replay: Replay,
        *,
        ridge: float | Literal["auto"] = "auto",
        outliers: float = math.inf,
        spared: float = math.inf,
        rounds: int = 3,
        parts: int = 1,
    ) -> None:
        if ridge != "auto" and not ridge >= 0:
            raise UsageError(f"the ridge must be at least 0 or 'auto', not {ridge}")
        for name, multiple in (("outliers", outliers), ("spared", spared)):
            if not multiple > 1:
                raise UsageError(f"{name} is a multiple of the median norm, so more than 1, not {multiple}")
        if rounds < 0:
            raise UsageError(f"there can be 0 rounds or more, not {rounds}")
        if parts < 1:
            raise UsageError(f"the windows can be split into 1 part or more, not {parts}")
        self.replay = replay
        self.ridge = ridge
        self.outliers = outliers
        self.spared = spared
        self.rounds = rounds
        self.parts = parts
        config = replay.decoder.config
        #: What a sublayer's output is multiplied by before it is added to the stream (Granite).
        self._multiplier: float = getattr(config, "residual_multiplier", 1.0)
        self._checked: set[Sublayer] = set()

    @torch.no_grad()
    def correct(
        self,
        block: int,
        output_WTH: Tensor,
        mlp_output_WTH: Tensor,
        target_WTH: Tensor,
        *,
        sublayer: Sublayer = "mlp",
        inner_RI: Tensor | None = None,
        left_out_WT: Tensor | None = None,
        start: Start | None = None,
    ) -> tuple[Tensor, Correction]:
        """Fit the correction of one block and apply it to the stream.

        With `inner_RI` the whole output matrix is refitted; without it only what it puts out is mapped, which is
        faster and weaker. With a start, which was fitted on more text, the ridge draws the result to that instead of
        to the plain removal, so that few tokens change it only in what they tell for certain.

        Args:
            block: source index of the last kept block before the cut.
            output_WTH: the stream behind it, o, in the model that is being folded.
            mlp_output_WTH: what its sublayer put out in that pass, M.
            target_WTH: the source's stream where the next kept block begins, L.
            sublayer: which sublayer's output M is.
            inner_RI: what the sublayer's output matrix is given, as `run` collects it, for all tokens in order.
            left_out_WT: bool [W, T]: tokens that are corrected and not fitted on.
            start: where the fit begins; it must not know windows that are measured on.

        Returns:
            The stream behind the corrected block, [W, T, H] in the dtype of o, and the correction, beyond the start if
            there is one.

        Raises:
            UsageError: the shapes differ.
            NotFiniteError: a value is not finite.
            UnsupportedModelError: see the class.
        """
        if not output_WTH.shape == mlp_output_WTH.shape == target_WTH.shape:
            shapes = ", ".join(str(list(x.shape)) for x in (output_WTH, mlp_output_WTH, target_WTH))
            raise UsageError(f"output, MLP output and target of block {block} must have one shape, got {shapes}")
        self._check(block, sublayer, output_WTH)
        inputs_RH, output_RH = mlp_output_WTH.flatten(0, -2), output_WTH.flatten(0, -2)
        # One copy in fp32: of a large model it takes twice what the source's stream at a boundary does.
        missing_RH = target_WTH.flatten(0, -2).to(torch.float32, copy=True)
        weight_R = 1 / missing_RH.square().sum(-1).clamp_min(1e-30)
        missing_RH -= output_RH
        size_R = self._size(block, (inputs_RH, missing_RH, target_WTH.flatten(0, -2)))
        weight_R = weight_R.masked_fill(size_R > min(self.outliers, self.spared), 0.0)
        if left_out_WT is not None:
            weight_R = weight_R.masked_fill(left_out_WT.flatten().to(weight_R.device), 0.0)
        weight_R = _told_of_massive(weight_R, size_R > MASSIVE)
        parts = _split(target_WTH, self.parts) if self.parts > 1 else _fitted_and_held_out(target_WTH)
        norm = norm_behind(self.replay.decoder, block, sublayer)
        fit = self._fit_linear if norm is None else self._fit_normed
        features_RK = inputs_RH if inner_RI is None else inner_RI
        found_RH, correction = fit(
            block, sublayer, inputs_RH, features_RK, output_RH, missing_RH, weight_R, parts, start
        )
        spared_R = size_R > self.spared
        found_RH[spared_R] = output_RH[spared_R].to(found_RH.dtype)
        return found_RH.to(output_WTH.dtype).view(output_WTH.shape), correction

    def _fit_linear(
        self,
        block: int,
        sublayer: Sublayer,
        inputs_RH: Tensor,
        features_RK: Tensor,
        output_RH: Tensor,
        missing_RH: Tensor,
        weight_R: Tensor,
        parts: Sequence[slice],
        start: Start | None,
    ) -> tuple[Tensor, Correction]:
        decoder = self.replay.decoder
        matrices = output_matrices(decoder, block, sublayer, output_module(decoder, block, sublayer))
        bias = len(matrices) == 1 and matrices[0].bias is not None
        if start is not None:
            begun_RH = self._multiplier * start.change(missing_RH.dtype)
            output_RH, missing_RH = output_RH + begun_RH, missing_RH - begun_RH
        wanted_RH = missing_RH if self._multiplier == 1 else missing_RH / self._multiplier
        sums = [Sums.of(features_RK[rows], wanted_RH[rows], weight_R[rows]) for rows in parts]
        fitted, held = added(sums[:-1]), sums[-1]
        ridges = RIDGES if self.ridge == "auto" else (self.ridge,)
        ridge, part = best_ridge(fitted, held, ridges, bias=bias)
        map_KH, bias_H = solve(fitted + held, ridge, bias=bias)
        # Weights are 1 / ‖L‖², so that a weighted sum of squares over the number of tokens is a mean relative error.
        size = self._multiplier**2 / max(held.count, 1)
        report = CutReport(
            tokens=fitted.count + held.count,
            left_out=len(weight_R) - fitted.count - held.count,
            ridge=ridge,
            before=held.square * size,
            after=held.square * size * held.error(*part),
            fitted=fitted.square * self._multiplier**2 / max(fitted.count, 1) * fitted.error(*part),
        )
        correction = Correction(
            block=block,
            sublayer=sublayer,
            features="output" if features_RK is inputs_RH else "inner",
            map_KH=map_KH.to(missing_RH),
            bias_H=None if bias_H is None else bias_H.to(missing_RH),
            scale_H=None,
            report=report,
        )
        pieces = [(slice(None), map_KH, bias_H)]
        if self.parts > 1:
            # What was fitted to choose the ridge is the map of the last part.
            others = [added([*sums[:i], *sums[i + 1 :]]) for i in range(len(parts) - 1)]
            maps = [*(solve(other, ridge, bias=bias) for other in others), part]
            pieces = [(rows, *found) for rows, found in zip(parts, maps, strict=True)]
        found_RH = output_RH.to(missing_RH.dtype, copy=True)
        for rows, piece_KH, piece_H in pieces:
            change_RH = changed_by(features_RK[rows], piece_KH, piece_H, missing_RH.dtype)
            found_RH[rows] += change_RH if self._multiplier == 1 else self._multiplier * change_RH
        return found_RH, correction

    def _fit_normed(
        self,
        block: int,
        sublayer: Sublayer,
        inputs_RH: Tensor,
        features_RK: Tensor,
        output_RH: Tensor,
        missing_RH: Tensor,
        weight_R: Tensor,
        parts: Sequence[slice],
        start: Start | None,
    ) -> tuple[Tensor, Correction]:
        norm = norm_behind(self.replay.decoder, block, sublayer)
        assert norm is not None
        scale_H, epsilon = effective_scale(norm), epsilon_of(norm)
        contribution_RH = scale_H * rms_normed(inputs_RH.float(), epsilon)
        wanted_RH = missing_RH + contribution_RH
        # What goes into the norm where the fit begins.
        begin_RH = inputs_RH
        if start is not None and start.correction.scale_H is not None:
            begin_RH = inputs_RH + start.change(inputs_RH.dtype)
            scale_H = start.correction.scale_H
        own = NormedFit(torch.zeros(features_RK.shape[1], len(scale_H)).to(scale_H), scale_H)

        def fit(left_out: slice, ridge: float) -> NormedFit:
            weight = weight_R.clone()
            weight[left_out] = 0  # no row of it is looked at
            return fit_through_norm(
                begin_RH, features_RK, wanted_RH, weight, scale_H, epsilon, ridge=ridge, rounds=self.rounds
            )

        def error(found: NormedFit, rows: slice) -> float:
            inputs, features, wanted, weight = (x[rows] for x in (begin_RH, features_RK, wanted_RH, weight_R))
            return error_of(found, inputs, features, wanted, weight, epsilon) / max(int((weight > 0).sum()), 1)

        fitted, held = slice(0, parts[-1].start), parts[-1]
        ridges = RIDGES if self.ridge == "auto" else (self.ridge,)

        def tried(ridge: float) -> tuple[float, NormedFit]:
            part = fit(held, ridge)
            return error(part, held), part

        ridge, after, part = downhill(ridges, tried)
        found = fit(slice(0), ridge)
        used = int((weight_R > 0).sum())
        report = CutReport(
            tokens=used,
            left_out=len(weight_R) - used,
            ridge=ridge,
            before=error(own, held),
            after=after,
            fitted=error(part, fitted),
        )
        features: Literal["inner", "output"] = "output" if features_RK is inputs_RH else "inner"
        correction = Correction(block, sublayer, features, found.map_KH, None, found.scale_H, report)
        pieces = [(slice(None), found)]
        if self.parts > 1:
            # What was fitted to choose the ridge is the map of the last part.
            pieces = [*((rows, fit(rows, ridge)) for rows in parts[:-1]), (held, part)]
        found_RH = output_RH - contribution_RH
        for rows, piece in pieces:
            found_RH[rows] += piece.contribution(begin_RH[rows], features_RK[rows], epsilon)
        return found_RH, correction

    def _size(self, block: int, looked_at: Sequence[Tensor]) -> Tensor:
        """The largest norm of each token, as a multiple of the median of its kind; 0 where that is 0."""
        size_R = torch.zeros(len(looked_at[0]), device=looked_at[0].device)
        for rows in looked_at:
            norm_R = torch.linalg.vector_norm(rows.float(), dim=-1)
            if not bool(norm_R.isfinite().all()):
                raise NotFiniteError(f"the states of block {block} hold values that are not finite")
            median = norm_R.median()
            if median > 0:
                size_R = torch.maximum(size_R, norm_R / median)
        return size_R

    def _check(self, block: int, sublayer: Sublayer, stream_WTH: Tensor) -> None:
        """Once for each sublayer: its output, times the multiplier, is what reaches the stream (of this size)."""
        decoder = self.replay.decoder
        module = output_module(decoder, block, sublayer)  # refuses unknown families
        if sublayer in self._checked or norm_behind(decoder, block, sublayer) is not None:
            return
        # Any stream of a recorded shape: both sublayers are given what they put out.
        first = next(iter(self.replay.batches()))
        hidden_BTH = self.replay.states[0][first]
        generator = torch.Generator().manual_seed(0)
        size = float(stream_WTH[first].float().square().mean().sqrt())
        probe_BTH = torch.randn(hidden_BTH.shape, generator=generator).to(hidden_BTH) * size
        # The other sublayer is silenced: an MLP would answer to a change of the attention before it.
        other = output_module(decoder, block, "mlp" if sublayer == "attention" else "attention")
        nothing_BTH = torch.zeros_like(probe_BTH)
        with_probe = self._with_outputs(block, {module: probe_BTH, other: nothing_BTH}, hidden_BTH)
        without = self._with_outputs(block, {module: nothing_BTH, other: nothing_BTH}, hidden_BTH)
        reached_BTH = with_probe.float() - without.float()
        missed = torch.linalg.vector_norm(reached_BTH - self._multiplier * probe_BTH.float())
        if missed > 0.02 * torch.linalg.vector_norm(reached_BTH):
            raise UnsupportedModelError(
                f"in model type {decoder.model_type!r} the {sublayer} output is not simply added to the stream, and "
                "foldgpt does not know what happens to it; removed blocks cannot be compensated. Switch that off."
            )
        self._checked.add(sublayer)

    def _with_outputs(self, block: int, put: Mapping[nn.Module, Tensor], hidden_BTH: Tensor) -> Tensor:
        """The block's output if its sublayers gave these."""
        handles = [
            module.register_forward_hook(lambda _module, _args, output, value=value: _replaced(output, value))
            for module, value in put.items()
        ]
        calls = self.replay.num_block_calls
        try:
            return self.replay.block(block, hidden_BTH)
        finally:
            for handle in handles:
                handle.remove()
            self.replay.num_block_calls = calls

    def run(
        self,
        block: int,
        stream: Sequence[Tensor],
        *,
        sublayer: Sublayer = "mlp",
        absent: Sublayer | None = None,
        inner: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pass a stream through one block.

        Args:
            block: source index of the block.
            stream: what goes in, in recorded micro-batches [B, T, H] (see `Replay.split`).
            sublayer: whose output is wanted.
            absent: a sublayer that is removed and adds nothing.
            inner: whether what the sublayer's output matrix is given is wanted as well.

        Returns:
            What comes out and what the sublayer put out, both [W, T, H]: o and M for `correct`. Then what the output
            matrix is given, [W T, I]; None where it is not wanted, and where there is more than one such matrix.
        """
        num_rows = sum(part.shape[:-1].numel() for part in stream)
        collected, given = _Rows(num_rows), _Rows(num_rows)
        decoder = self.replay.decoder
        module = output_module(decoder, block, sublayer)
        handles = [
            # Some MLPs work on flattened tokens.
            module.register_forward_hook(
                lambda _module, _args, output: collected.add(output[0] if isinstance(output, tuple) else output)
            )
        ]
        holder = inner_module(module, output_matrices(decoder, block, sublayer, module)) if inner else None
        if holder is not None:
            handles.append(holder.register_forward_pre_hook(lambda _module, args: given.add(args[0])))
        try:
            output_WTH = torch.cat([self.replay.block(block, hidden_BTH, without=absent) for hidden_BTH in stream])
        finally:
            for handle in handles:
                handle.remove()
        assert collected.rows_RK is not None
        return output_WTH, collected.rows_RK.view(output_WTH.shape), given.rows_RK


def _told_of_massive(weight_R: Tensor, massive_R: Tensor) -> Tensor:
    """Weights of tokens with which those with massive activations, if there are any, count as their share at least."""
    used_R = weight_R > 0
    massive_R = massive_R & used_R
    count, others = int(massive_R.sum()), int((used_R & ~massive_R).sum())
    factor = _SHARE_OF_MASSIVE / (1 - _SHARE_OF_MASSIVE) * others / max(count, 1)
    return torch.where(massive_R, max(factor, 1.0) * weight_R, weight_R)


class _Rows:
    """Rows that come part by part, in one tensor from the first on: parts and all that is made of them take twice that.

    They are copied: a block may add to its sublayer's output in place (Falcon).
    """

    def __init__(self, num_rows: int) -> None:
        self.rows_RK: Tensor | None = None
        self._num_rows = num_rows
        self._filled = 0

    def add(self, part: Tensor) -> None:
        part_RK = part.flatten(0, -2)
        if self.rows_RK is None:
            self.rows_RK = part_RK.new_empty(self._num_rows, part_RK.shape[1])
        self.rows_RK[self._filled : self._filled + len(part_RK)] = part_RK
        self._filled += len(part_RK)


def _replaced(output: Any, put: Tensor) -> Any:
    """`put` in the place and the shape of a sublayer's output (OPT flattens the tokens, attention returns a tuple)."""
    if isinstance(output, tuple):
        return (_replaced(output[0], put), *output[1:])
    # A copy: a block may add to it in place.
    return put.reshape(output.shape).clone()


def _split(target_WTH: Tensor, parts: int) -> list[slice]:
    """Rows of so many parts in whole windows, or of as many as there are windows; one window is cut in two.

    A window that stood in two parts would be corrected by a map that was fitted on the rest of its own text.
    """
    windows, tokens = target_WTH.shape[0], target_WTH.shape[:-1].numel()
    parts = min(parts, max(windows, 2))
    grain = tokens // windows if windows >= parts else 1
    borders = [round(tokens // grain * i / parts) * grain for i in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(borders) if stop > start]


def _fitted_and_held_out(target_WTH: Tensor) -> list[slice]:
    """Rows that are fitted on and rows that are judged on, in whole windows if there are enough of them."""
    windows, tokens = target_WTH.shape[0], target_WTH.shape[:-1].numel()
    if windows >= 4:
        first_held = round(windows * (1 - _HELD_OUT)) * (tokens // windows)
    else:
        first_held = max(1, round(tokens * (1 - _HELD_OUT)))
    return [slice(0, first_held), slice(first_held, tokens)]
