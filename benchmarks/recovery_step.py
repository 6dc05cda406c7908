"""Time and peak memory of one recovery step, beside the same step written plainly and plain forward passes.

- recovery: the step of `foldgpt.recovery`: teacher and student pass, fused KL, backward, AdamW on LoRA terms in all
  blocks; attention in tiles where that is used (CPUs without AMX).
- torch_attention: the same with torch's fused attention.
- half: the same as recovery, scored at half of the positions.
- behind: LoRA in the block before the first cut and behind it (`train_blocks="behind"`).
- cached: the same with what the student is compared with read from a file (`teacher_cache`).
- all_cached: as recovery, with such a file.
- compiled: recovery with `compile=True`: each block of both models compiled, and the losses between the products of
  the heads; only where asked for by `--side`, like the next two.
- compiled_cached: the same with such a file.
- compiled_behind: as behind, compiled.
- plain: transformers' Trainer and peft as one would write it: LoRA everywhere, full logits of both models and
  `F.kl_div`.
- forward: one pass of the source to its logits on the same tokens, without gradients.

All take turns in one process, so that the machine's moods hit all of them. Peak memory is that of a process which does
nothing but its own side; on a GPU, what is allocated there. Without a model, a random one of SmolLM2-135M's shape is
used.

    python benchmarks/recovery_step.py --model demo:smollm2-135m --remove 13-18
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import kl_div
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from command import command_line
from foldgpt.allocator import keep_freed_memory
from foldgpt.artifacts import write_json, write_text
from foldgpt.attention import fast_attention
from foldgpt.environment import describe_environment
from foldgpt.folding import fold_, source_model_of
from foldgpt.objectives import Head
from foldgpt.plan import FoldPlan
from foldgpt.progress import be_quiet
from foldgpt.recovery import RecoverySettings, TrainingWindows, make_trainable_
from foldgpt.recovery.common import common_blocks
from foldgpt.recovery.compiled import compiled_blocks
from foldgpt.recovery.distillation import IGNORED, Distillation
from foldgpt.recovery.teacher import Teacher
from foldgpt.recovery.teacher_cache import Kept, cache_states
from foldgpt.recovery.trainer import RecoveryTrainer
from foldgpt.sources import DTYPES, load_source
from provenance import provenance_of

SIDES = (
    "recovery",
    "compiled",
    "torch_attention",
    "half",
    "behind",
    "cached",
    "all_cached",
    "compiled_cached",
    "compiled_behind",
    "plain",
    "forward",
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: random weights in SmolLM2-135M's shape")
    parser.add_argument("--dtype", default="bfloat16", choices=[name for name in DTYPES if name != "auto"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--remove", default="13-18", help="blocks FIRST-LAST")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4, help="windows in the step, in one micro-batch")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--side", action="append", choices=SIDES[:-2], help="beside plain and forward; may be repeated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="recovery_step", help="stem of the result files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    asked = arguments.side or [side for side in SIDES if not side.startswith("compiled")]
    arguments.side = [side for side in SIDES[:-2] if side in asked]
    return arguments


def main() -> None:
    arguments = parse_arguments()
    be_quiet()
    keep_freed_memory()
    if arguments.memory_of:
        _measure_memory(arguments)
        return
    sides = [*arguments.side, *SIDES[-2:]]
    # First, while this process holds no model.
    # A GPU counts each process by itself; it needs memory for all of them.
    with ThreadPoolExecutor(1 if arguments.device == "cpu" else len(sides)) as pool:
        memory = dict(zip(sides, pool.map(_peak_of, sides), strict=True))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as until_end:
        steps = {side: prepare(side, arguments, Path(folder), until_end) for side in sides}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        cpu_seconds: dict[str, list[float]] = {side: [] for side in sides}
        for repeat in range(arguments.repeats + 1):
            for side, step in steps.items():
                begun = time.process_time()
                took = timed(step, arguments.device)
                if repeat:  # the first one warms up
                    seconds[side].append(round(took, 4))
                    cpu_seconds[side].append(round(time.process_time() - begun, 4))
    median = {side: statistics.median(values) for side, values in seconds.items()}
    # What other processes do at the same time shows less in it.
    median_cpu = {side: statistics.median(values) for side, values in cpu_seconds.items()}
    result = {
        "benchmark": "recovery_step",
        "command": command_line(),
        "config": {name: value for name, value in vars(arguments).items() if name not in ("out", "name", "memory_of")},
        "seed": arguments.seed,
        "environment": describe_environment(),
        "tokens": arguments.windows * arguments.context,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "median_seconds": median,
        "median_cpu_seconds": median_cpu,
        "peak_memory_gb": memory,
        "in_forward_passes": {side: median[side] / median["forward"] for side in sides},
        "over_plain_time": {side: median[side] / median["plain"] for side in sides},
        "cpu_in_forward_passes": {side: median_cpu[side] / median_cpu["forward"] for side in sides},
        "cpu_over_plain": {side: median_cpu[side] / median_cpu["plain"] for side in sides},
        "over_plain_memory": {side: memory[side] / memory["plain"] for side in sides},
    }
    write_json(arguments.out / f"{arguments.name}.json", result)
    write_text(arguments.out / f"{arguments.name}.md", as_markdown(result))
    print(as_markdown(result))


def prepare(side: str, arguments: argparse.Namespace, folder: Path, until_end: ExitStack) -> Callable[[], None]:
    """What one repeat of a side does; what has to hold until then is put on `until_end`."""
    torch.manual_seed(arguments.seed)
    source = load(arguments)
    vocabulary = source.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (arguments.windows, arguments.context), device=arguments.device)
    if side == "forward":

        def forward() -> None:
            with torch.no_grad():
                source(input_ids=ids, use_cache=False)

        return forward
    first, _, last = arguments.remove.partition("-")
    student = copy.deepcopy(source)
    plan = FoldPlan.create(source_model_of(source), removed=range(int(first), int(last or first) + 1))
    fold_(student, plan)
    args = TrainingArguments(
        output_dir=str(folder / side),
        report_to="none",
        use_cpu=arguments.device == "cpu",
        learning_rate=1e-4,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    batch = {"input_ids": ids, "labels": ids}
    if side != "plain":
        is_compiled = side.startswith("compiled")
        if side != "torch_attention":
            # Each side has models of its own.
            until_end.enter_context(fast_attention(student, source, compiled=is_compiled))
        train_blocks: Literal["all", "behind"] = "behind" if side in ("behind", "cached", "compiled_behind") else "all"
        settings = RecoverySettings(rank=arguments.rank, norms=False, train_blocks=train_blocks, compile=is_compiled)
        head = Head(student)
        make_trainable_(student, plan, settings)
        common = common_blocks(student, source, plan)
        teacher = Teacher(source, common=common)
        windows = TrainingWindows(ids.cpu())
        is_cached = side.endswith("cached")
        kept = Kept.for_losses(settings, head, teacher.head)
        cache = cache_states(teacher, windows, folder, batch_size=len(ids), kept=kept) if is_cached else None
        batch["window"] = torch.arange(len(ids))
        if side == "half":
            batch["labels"] = ids.masked_fill(torch.arange(arguments.context, device=ids.device) % 2 == 0, IGNORED)
        if is_compiled:
            until_end.enter_context(compiled_blocks(student, source))
        trainer: Trainer = RecoveryTrainer(
            Distillation(student, settings, head, teacher.head, common=common),
            args,
            train=windows,
            held_out=windows,
            teacher=teacher,
            cache=cache,
        )
    else:
        config = LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, target_modules="all-linear")
        trainer = PlainTrainer(get_peft_model(student, config), args)
        trainer.teacher = source.eval()  # type: ignore[attr-defined]
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1

    def step() -> None:
        trainer.training_step(trainer.model, dict(batch))
        assert trainer.optimizer is not None
        torch.nn.utils.clip_grad_norm_([p for p in trainer.model.parameters() if p.requires_grad], 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


class PlainTrainer(Trainer):
    """Distillation as it is usually written."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids = inputs["input_ids"]
        with torch.no_grad():
            teacher = self.teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        student = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        return kl_div(student.flatten(0, 1), teacher.flatten(0, 1), log_target=True, reduction="batchmean")


def load(arguments: argparse.Namespace) -> Any:
    if arguments.model:
        return load_source(arguments.model, dtype=arguments.dtype, device=arguments.device).model
    config = AutoConfig.for_model(
        "llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=DTYPES[arguments.dtype]).to(arguments.device).eval()


def timed(step: Callable[[], None], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _peak_of(side: str) -> float:
    """Peak memory of a side in a process of its own, in GB."""
    done = subprocess.run([sys.executable, *sys.argv, "--memory-of", side], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _measure_memory(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as until_end:
        step = prepare(arguments.memory_of, arguments, Path(folder), until_end)
        for _ in range(2):  # AdamW's states are there from the first step on
            step()
    if arguments.device == "cpu":
        # Linux counts in kB.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps(round(peak / 1e9, 3)))


def as_markdown(result: dict[str, Any]) -> str:
    config = result["config"]
    lines = [
        "# One recovery step",
        "",
        f"{config['model'] or 'random weights of SmolLM2-135M in shape'}, {config['dtype']}, blocks {config['remove']} "
        f"removed, LoRA of rank {config['rank']}, {result['tokens']:,} tokens; medians of {config['repeats']}.",
        "",
        "| | seconds | in forward passes | of the plain step | CPU seconds | in forward passes | of the plain step | "
        "peak memory, GB | of the plain step |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {side} | {result['median_seconds'][side]:.3f} | {result['in_forward_passes'][side]:.2f} | "
            f"{result['over_plain_time'][side]:.0%} | {result['median_cpu_seconds'][side]:.3f} | "
            f"{result['cpu_in_forward_passes'][side]:.2f} | {result['cpu_over_plain'][side]:.0%} | "
            f"{result['peak_memory_gb'][side]:.2f} | {result['over_plain_memory'][side]:.0%} |"
            for side in result["median_seconds"]
        ),
        "",
        provenance_of(result),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
