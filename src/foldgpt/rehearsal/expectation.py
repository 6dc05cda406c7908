"""What a run will take: parameters, memory and floating-point operations of the real model.

Nothing is guessed from formulas of one architecture: the real model is built on PyTorch's meta device, which knows
shapes and no values, folded by a plan, made trainable as the recovery makes it, and run forwards and backwards there.
Parameters, the tensors that autograd keeps and the operations are counted on the way.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from foldgpt.families import decoder_of
from foldgpt.folding import fold_
from foldgpt.folding.private import sizes_of_leaf
from foldgpt.modeling.modeling_foldgpt import apply_layout_
from foldgpt.objectives.divergence import CHUNK_BYTES
from foldgpt.plan import FoldPlan
from foldgpt.planning import num_removed
from foldgpt.recipe import Recipe
from foldgpt.recovery import RecoverySettings
from foldgpt.recovery.teacher_cache import Kept
from foldgpt.recovery.trainable import make_trainable_
from foldgpt.rehearsal.fits import bytes_of_fits, bytes_of_priors
from foldgpt.selection import (
    Request,
    Share,
    flops_of,
    last_stage_windows,
    search_passes,
    search_windows,
)
from foldgpt.selection.cost import CACHE_BYTES, num_positions
from foldgpt.sources import DTYPES

#: AdamW: two moments; and the gradient. Trained values are kept in fp32.
_ADAM_BYTES, _GRADIENT_BYTES, _TRAINED_BYTES = 8, 4, 4
#: The logits of a chunk of rows in fp32, of both models, with the gradient of one: see objectives/fused_logits.py.
_LOGIT_BYTES = 3 * CHUNK_BYTES


@dataclass(frozen=True)
class Memory:
    """Bytes that one stage holds at once on its device.

    Recovery keeps more in the machine's own memory: what is trained as it was given, and the teacher's states on the
    held-out windows.

    Attributes:
        weights: of the model that is measured or trained.
        teacher: of the source beside it.
        activations: what autograd keeps of one micro-batch, or the states that a search or a fit keeps.
        optimizer: gradients and moments of what is trained, and its fp32 values.
        other: logits of a chunk.
    """

    weights: float
    teacher: float = 0
    activations: float = 0
    optimizer: float = 0
    other: float = 0

    @property
    def total(self) -> float:
        """Of all."""
        return self.weights + self.teacher + self.activations + self.optimizer + self.other


@dataclass(frozen=True)
class Expectation:
    """What the real run takes.

    Attributes:
        parameters, block_parameters: unique ones of the source.
        kept_parameters, kept_block_parameters: of the folded model.
        num_trained: parameters that recovery trains; 0 without.
        memory: stage → bytes.
        flops: stage → floating-point operations. A multiplication and an addition are two.
        on_all_devices: stages whose operations several devices share; the others run on one, however many there are.
    """

    parameters: int
    block_parameters: int
    kept_parameters: int
    kept_block_parameters: int
    num_trained: int
    memory: dict[str, Memory]
    flops: dict[str, float]
    on_all_devices: tuple[str, ...]

    def seconds(self, flops_per_second: float, *, devices: int = 1) -> float:
        """Time at a throughput that each of some devices sustains."""
        return sum(self.on_one_device(stage, devices) for stage in self.flops) / flops_per_second

    def on_one_device(self, stage: str, devices: int) -> float:
        """Operations of a stage that are waited for: those of one of so many devices."""
        return self.flops[stage] / (devices if stage in self.on_all_devices else 1)


def expect(
    config: Any,
    recipe: Recipe,
    plan: FoldPlan,
    settings: RecoverySettings,
    layout: dict[str, Any] | None = None,
    *,
    teacher_cached: bool = False,
    compared: bool = False,
) -> Expectation:
    """Count what a recipe will take on the real model.

    Counted are the analysis, the search, the recovery with its measurements on held-out windows, and perplexity; of the
    fits of the compensation and of shared weights what they keep in memory. Not counted are the operations of those,
    what the size solver and the choice of the best donor measure, tasks, and reading and writing.

    Where only the blocks behind the first cut are trained (`train_blocks: behind`), it is counted as if all were. How
    much is left out then, of the training and of the student's passes, goes by the place of that cut, and a plan that
    was made on a model with other values has it elsewhere. So it is the most that the recovery takes.

    Args:
        config: of the real model.
        recipe: the recipe.
        plan: made on a model with the same blocks.
        settings: of the recovery.
        layout: which modules are shared and which are absent, as the config of a model folded by the plan has it,
            whatever its sizes; None if whole blocks were removed and nothing else.
        teacher_cached: whether the teacher's states are kept in a file, which one process makes by itself.
        compared: whether it is a row of a comparison, in which a model is measured once.
    """
    source, student = on_meta(config, recipe), on_meta(config, recipe)
    dtype = source.dtype
    # Shared weights are made of values, and there are none: the blocks are removed, and the layout is put on.
    fold_(student, FoldPlan.create(plan.source, removed=plan.removed))
    if layout is not None:
        apply_layout_(student, _of_real_shapes(layout, student, recipe.share.rank))
    counts = [_count(model) for model in (source, decoder_of(source).blocks, student, decoder_of(student).blocks)]
    forward = _forward_flops(source, recipe.calibration.context)
    flops = {"analysis": forward * recipe.calibration.num_tokens}
    # Of each row of logits.
    head = 2.0 * config.vocab_size * _hidden_size(source)
    select, text = recipe.select, recipe.calibration
    num_remove = num_searched_for(recipe, source)
    windows = text.num_tokens // text.context
    searched = search_windows(recipe.search_tokens, text.context, windows)
    num_searched = text.context * searched
    # Of the right shape alone: how many windows go through at once is part of what is counted.
    ids_WT = torch.empty(windows, text.context, dtype=torch.int64, device="meta")
    search = Request(
        plan.source.num_blocks,
        num_remove,
        ids_WT=ids_WT[:searched],
        further_ids_WT=ids_WT[searched:],
        compensate=recipe.compensate.method != "none",
        sublayers=select.sublayers,
        options=select.options,
    )
    one_pass = forward * num_searched
    passes = search_passes(select.method, search, head=head * num_positions(num_searched) / one_pass)
    if passes:
        flops["search"] = passes * one_pass
    measured = recipe.evaluate
    tokens = len(measured.texts) * (measured.max_windows or 0) * measured.context
    if tokens:
        flops["source's perplexity"] = tokens * (_forward_flops(source, measured.context) + head)
        flops["perplexity"] = tokens * (_forward_flops(student, measured.context) + head)
        if recipe.recover.num_tokens and not compared:
            flops["perplexity before recovery"] = flops["perplexity"]
    weights = _bytes(source)
    states = num_searched * _hidden_size(source) * (len(decoder_of(source).blocks) + 1) * dtype.itemsize
    of_priors = search.num_prior_windows / searched * states
    if select.method == "gates":
        # In its last stage those of other windows as well.
        states *= 1 + last_stage_windows(searched, windows - searched, search.compensate) / searched
    # States that measured sets went through are kept beside those of the source; a set has no more of them than that.
    kept_states = min(CACHE_BYTES, passes * states)
    if of_priors:
        kept_states += of_priors + bytes_of_priors(source, search.num_prior_windows * text.context)
    memory = {
        "search": Memory(weights, activations=states + kept_states if passes else 0, other=_LOGIT_BYTES),
        "fits": Memory(weights, activations=bytes_of_fits(source, plan, text.num_tokens)),
        "fold and verify": Memory(weights, teacher=_bytes(student)),
    }
    if not memory["fits"].activations:
        del memory["fits"]
    num_trained = 0
    section = recipe.recover
    if section.num_tokens:
        # The most that it takes; see above.
        settings = dataclasses.replace(settings, train_blocks="all")
        folded_bytes = _bytes(student)
        rows = min(settings.micro_batch_size, settings.batch_size)
        with torch.device("meta"):
            num_trained = make_trainable_(student, plan, settings)
        there, per_token, kept = _step(student, rows, section.context)
        if settings.gradient_checkpointing:
            num_blocks = len(decoder_of(student).blocks)
            # What enters each block, and one block's own while it is run again.
            kept = rows * section.context * _hidden_size(student) * dtype.itemsize * num_blocks + kept / num_blocks
            per_token += there
        teacher = _forward_flops(source, section.context) if settings.needs_teacher else 0.0
        steps = section.num_tokens // (settings.batch_size * section.context)
        rounds = 2 + steps // settings.evaluate_every
        # The student's logits, where a loss looks at them, and the teacher's, where it is compared with them.
        own_logits, teacher_logits = int(settings.kl > 0 or settings.lm > 0), int(settings.kl > 0)
        held_out = section.held_out_tokens * (there + (own_logits + teacher_logits) * head)
        # Its predictions are reduced in a file, for two products with the head, and each step is saved its logits.
        is_reduced = teacher_cached and Kept.reduces(settings) and not getattr(config, "final_logit_softcapping", None)
        if teacher:
            flops["teacher"] = section.num_tokens * (teacher + 2 * head * is_reduced)
        # And the gradient of the student's with respect to its last states.
        products = 2 * own_logits + teacher_logits - is_reduced
        flops["recovery"] = section.num_tokens * (per_token + products * head) + rounds * held_out
        memory["recovery"] = Memory(
            folded_bytes,
            teacher=weights if settings.needs_teacher else 0,
            activations=kept,
            optimizer=num_trained * (_ADAM_BYTES + _GRADIENT_BYTES + _TRAINED_BYTES),
            other=_LOGIT_BYTES,
        )
    return Expectation(
        parameters=counts[0],
        block_parameters=counts[1],
        kept_parameters=counts[2],
        kept_block_parameters=counts[3],
        num_trained=num_trained,
        memory=memory,
        flops=flops,
        on_all_devices=("recovery",) if teacher_cached else ("teacher", "recovery"),
    )


def _of_real_shapes(layout: Mapping[str, Any], student: Any, rank: int) -> dict[str, Any]:
    """A layout with the sizes of another model of the same architecture.

    Args:
        layout: of a narrower model.
        student: the model, with its blocks removed.
        rank: of low-rank terms, as the recipe has it; 0 for as large a part of the matrix as in the layout.
    """
    blocks = decoder_of(student).blocks
    private = []
    for entry in layout.get("private", []):
        inputs, outputs = sizes_of_leaf(blocks[entry["position"]].get_submodule(entry["module"]), entry["module"])
        grown = (rank or entry["rank"] * outputs // entry["outputs"]) if entry["rank"] else 0
        private.append({**entry, "inputs": inputs, "outputs": outputs, "rank": grown})
    return {**layout, "private": private}


def num_searched_for(recipe: Recipe, source: Any) -> int:
    """Blocks that the search is asked for; operations stand for times, which nobody can measure of shapes."""
    return num_removed(recipe, source, lambda: _flops_of(source, recipe))


def _flops_of(source: Any, recipe: Recipe) -> Share:
    """Operations of a pass over one calibration window, which stand for its time as well."""
    inputs = _inputs(1, recipe.calibration.context)
    return flops_of(source, inputs["input_ids"], attention_mask=inputs["attention_mask"])


def on_meta(config: Any, recipe: Recipe) -> Any:
    """The real model without values, in the format that a recipe loads it in; bf16 where its config names none."""
    dtype = DTYPES.get(recipe.dtype) or getattr(config, "dtype", None) or torch.bfloat16
    with torch.device("meta"):
        # Folding changes the config that the model holds.
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()


def _inputs(rows: int, context: int) -> dict[str, Any]:
    # A mask that is whole is taken as it is; for any other, transformers looks at values, and there are none.
    mask = torch.ones(rows, 1, context, context, dtype=torch.bool, device="meta")
    ids = torch.zeros(rows, context, dtype=torch.long, device="meta")
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


@torch.no_grad()
def _forward_flops(model: Any, context: int) -> float:
    """Operations of a forward pass of the blocks, per token; attention at this length of context included."""
    with FlopCounterMode(display=False) as counter:
        decoder_of(model).body(**_inputs(1, context))
    return counter.get_total_flops() / context


def _step(student: Any, rows: int, context: int) -> tuple[float, float, float]:
    """Operations per token of a forward pass of the blocks, of that and the way back, and bytes kept between them."""
    student.train()
    with FlopCounterMode(display=False) as counter, _kept_by_autograd(student) as kept:
        last = decoder_of(student).body(**_inputs(rows, context)).last_hidden_state
        there = counter.get_total_flops()
        last.float().sum().backward()
    tokens = rows * context
    return there / tokens, counter.get_total_flops() / tokens, float(sum(size for _, size in kept.values()))


@contextlib.contextmanager
def _kept_by_autograd(model: nn.Module) -> Iterator[dict[int, tuple[Any, int]]]:
    """Storages that autograd keeps, but for the model's own."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, tuple[Any, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # Held, so that no other storage can come to lie at its address.
            kept[storage._cdata] = (storage, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _hidden_size(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).hidden_size)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(model: nn.Module) -> float:
    return float(sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()))
