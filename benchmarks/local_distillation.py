"""Local distillation beside end-to-end recovery, in the same time: does it pay to train the blocks beside a cut first?

Locally, the blocks on both sides of each cut are trained to pass on the source's own stream: what leaves the block
before a cut should be what the source's next kept block reads, and what leaves the block behind it what the source's
leaves. The source runs up to the last of them, the folded model from the first to the last of them, and the head not at
all, so a token costs less than half of what it costs end to end. The loss is the relative squared error of the stream,
token by token, as `states` of a recovery. Each row starts from the same folded and compensated model; then both, one
behind the other. Measured on other windows of the training texts (some of the same documents), and on another text.

    python benchmarks/local_distillation.py --remove 13-18 --text C4.jsonl --text WIKIPEDIA.jsonl \
        --evaluate wiki.valid.raw
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from command import command_line, without_folders
from foldgpt.allocator import keep_freed_memory
from foldgpt.artifacts import write_json, write_text
from foldgpt.block_lists import blocks_of
from foldgpt.compensation import compensate, merge_
from foldgpt.corpus import calibration_windows, evaluation_windows
from foldgpt.counts import count
from foldgpt.environment import describe_environment
from foldgpt.families import decoder_of
from foldgpt.folding import fold_, is_linear_layer, source_model_of
from foldgpt.objectives import Head, relative_error
from foldgpt.plan import FoldPlan
from foldgpt.progress import be_quiet
from foldgpt.recovery import RecoverySettings, TrainingWindows, recover
from foldgpt.recovery.cuts import blocks_beside_cuts
from foldgpt.recovery.lora import attach_lora_, merge_lora_
from foldgpt.recovery.states import Body
from foldgpt.sources import load_source
from judging import last_hidden, perplexity_and_kl
from provenance import provenance_of

_WARMUP = 0.05
#: Tokens that compensation is fitted on, and windows by which a recovery is judged.
_FITTED_TOKENS, _HELD_OUT = 32_768, 4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remove", default="13-18", help="blocks, e.g. 13-18 or 3,7-9")
    parser.add_argument("--text", action="append", help="text to train on; may be repeated (demo:wikipedia)")
    parser.add_argument("--evaluate", default="demo:wikipedia", help="text to measure on; it should be another one")
    parser.add_argument("--local-tokens", type=count, default=30_720, help="tokens of a local distillation")
    parser.add_argument("--rate", type=float, action="append", help="of blocks in full, locally; may be repeated")
    parser.add_argument("--lora-rate", type=float, action="append", help="of LoRA in them, likewise")
    parser.add_argument("--tokens", type=count, action="append", help="tokens end to end; may be repeated")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=7e-4, help="end to end")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2, help="windows in a step")
    parser.add_argument("--windows", type=int, default=16, help="windows to measure on, of each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="local_distillation", help="stem of the result files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    arguments.text = arguments.text or ["demo:wikipedia"]
    arguments.rate = arguments.rate or [3e-5, 1e-4]
    arguments.lora_rate = arguments.lora_rate or [3e-4]
    arguments.tokens = sorted(arguments.tokens or [4096, 8192, 12_288])
    return arguments


class Stop(Exception):
    """The source has run as far as it is needed."""


class Locally:
    """The blocks beside the cuts of a folded model, and what the source says that they should put out.

    Args:
        source: the source.
        student: the folded model.
        plan: the plan that it was folded by.
    """

    def __init__(self, source: Any, student: Any, plan: FoldPlan) -> None:
        self._body = Body(source)
        self._theirs = decoder_of(source).blocks
        self._own = decoder_of(student).blocks
        self.places = blocks_beside_cuts(plan)
        self._positions = range(self.places[0], self.places[-1] + 1)
        self._kept = [*plan.kept, plan.source.num_blocks]

    def loss(self, ids_BT: Tensor) -> Tensor:
        """Mean over the places of the relative squared error of what leaves them."""
        entering, calls = self._of_source(ids_BT)
        hidden_BTH = entering[self._kept[self._positions[0]]]
        losses = []
        for position in self._positions:
            args, kwargs = calls[self._kept[position]]
            output = self._own[position](hidden_BTH, *args, **kwargs)
            hidden_BTH = output[0] if isinstance(output, tuple) else output
            if position in self.places:
                # What leaves a kept block is what the source's next kept one reads.
                wanted_BTH = entering[self._kept[position + 1]]
                losses.append(relative_error(wanted_BTH.flatten(0, 1), hidden_BTH.flatten(0, 1)).mean())
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _of_source(self, ids_BT: Tensor) -> tuple[dict[int, Tensor], dict[int, tuple[Any, Any]]]:
        """What enters the source's blocks, and what else they are called with, up to the last that is of interest."""
        entering: dict[int, Tensor] = {}
        calls: dict[int, tuple[Any, Any]] = {}
        first, end = self._kept[self._positions[0]], self._kept[self._positions[-1] + 1]

        def before(index: int) -> Any:
            def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                entering[index], calls[index] = args[0], (args[1:], kwargs)

            return hook

        def behind(block: nn.Module, args: Any, output: Any) -> None:
            entering[end] = output[0] if isinstance(output, tuple) else output
            raise Stop

        handles = [
            self._theirs[index].register_forward_pre_hook(before(index), with_kwargs=True)
            for index in range(first, end)
        ]
        handles.append(self._theirs[end - 1].register_forward_hook(behind))
        try:
            self._body(ids_BT)
        except Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return entering, calls


def trained_locally(
    source: Any, folded: Any, plan: FoldPlan, ids_WT: Tensor, rate: float, rank: int, arguments: argparse.Namespace
) -> tuple[Any, dict[str, float]]:
    """A copy of the folded model, its blocks beside the cuts trained in full, or by LoRA if a rank is given."""
    student = copy.deepcopy(folded).requires_grad_(False)
    local = Locally(source, student, plan)
    blocks = decoder_of(student).blocks
    if rank:
        names = [
            f"{place}.{name}"
            for place in local.places
            for name, module in blocks[place].named_modules()
            if is_linear_layer(module)
        ]
        attach_lora_(blocks, names, rank=rank, alpha=rank, seed=arguments.seed)
    else:
        for place in local.places:
            blocks[place].requires_grad_(True)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    batches = ids_WT.split(arguments.batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(_WARMUP * len(batches)), len(batches))
    losses = []
    began = time.perf_counter()
    for ids_BT in batches:
        loss = local.loss(ids_BT)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
    seconds = time.perf_counter() - began
    if rank:
        merge_lora_(student)
    tenth = max(1, len(losses) // 10)
    first, final = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    return student.requires_grad_(False).eval(), {"seconds": seconds, "first_loss": first, "last_loss": final}


def main() -> None:
    arguments = parse_arguments()
    be_quiet()
    keep_freed_memory()
    loaded = load_source(arguments.model, dtype=arguments.dtype)
    source, tokenizer = loaded.model, loaded.tokenizer
    plan = FoldPlan.create(source_model_of(source, loaded.spec), removed=blocks_of(arguments.remove))

    # Windows of one call, so that no token is in two of them.
    num_fitted = _FITTED_TOKENS // arguments.context
    num_trained = max(arguments.local_tokens, *arguments.tokens) // arguments.context
    numbers = [num_fitted, arguments.windows, _HELD_OUT, num_trained]
    made = calibration_windows(
        arguments.text,
        tokenizer,
        context=arguments.context,
        num_tokens=sum(numbers) * arguments.context,
        seed=arguments.seed,
    )
    fitted_WT, judged_WT, held_out_WT, training_WT = made.ids.split(numbers)
    judged = {
        "training texts": judged_WT,
        Path(arguments.evaluate).name: evaluation_windows(
            [arguments.evaluate], tokenizer, context=arguments.context, max_windows=arguments.windows
        ).ids,
    }
    head = Head(source)
    theirs = {name: last_hidden(source, ids_WT) for name, ids_WT in judged.items()}

    def measured(model: Any) -> dict[str, Any]:
        found = {}
        for name, ids_WT in judged.items():
            perplexity, kl = perplexity_and_kl(head, theirs[name], last_hidden(model, ids_WT), ids_WT)
            found[name] = {"perplexity": perplexity, "kl": kl}
        return found

    folded = copy.deepcopy(source)
    merge_(folded, compensate(folded, plan, fitted_WT))
    fold_(folded, plan)
    result: dict[str, Any] = {
        "benchmark": "local_distillation",
        "command": command_line(),
        "config": without_folders(
            {name: value for name, value in vars(arguments).items() if name not in ("out", "name")}
        ),
        "seed": arguments.seed,
        "source": {"spec": loaded.spec, "fingerprint": loaded.fingerprint},
        "texts": list(judged),
        "rows": [],
    }

    def add(name: str, model: Any, **more: Any) -> None:
        result["rows"].append({"name": name, **measured(model), **more})
        result["environment"] = describe_environment()
        write_json(arguments.out / f"{arguments.name}.json", result)
        write_text(arguments.out / f"{arguments.name}.md", as_markdown(result))
        print(result["rows"][-1], flush=True)

    def end_to_end(start: Any, tokens: int) -> tuple[Any, dict[str, Any]]:
        """A recovery of so many tokens, the seconds it took, and the step whose state it kept."""
        student = copy.deepcopy(start)
        settings = RecoverySettings(
            rank=arguments.rank,
            learning_rate=arguments.learning_rate,
            batch_size=arguments.batch_size,
            train_blocks="behind",
            train_fully="cuts",
            # Measured before and behind alone, on a few windows: the time is to be that of the training.
            evaluate_every=tokens,
            seed=arguments.seed,
        )
        with tempfile.TemporaryDirectory() as folder:
            train = TrainingWindows(training_WT[: tokens // arguments.context])
            held_out = TrainingWindows(held_out_WT)
            done = recover(student, source, plan, train, held_out, settings, Path(folder) / "out", tokenizer=tokenizer)
        return student, {"seconds": done.seconds, "best_step": done.best_step}

    add("compensated", folded)
    best, its_seconds = folded, 0.0
    least = float("inf")
    ways = [("in full", rate, 0) for rate in arguments.rate]
    ways += [(f"LoRA of rank {arguments.rank}", rate, arguments.rank) for rate in arguments.lora_rate]
    for what, rate, rank in ways:
        local_WT = training_WT[: arguments.local_tokens // arguments.context]
        student, training = trained_locally(source, folded, plan, local_WT, rate, rank, arguments)
        add(f"locally, {what}, rate {rate:g}", student, tokens=local_WT.numel(), **training)
        kl = result["rows"][-1]["training texts"]["kl"]
        if kl < least:
            best, its_seconds, least = student, training["seconds"], kl
    for tokens in arguments.tokens:
        student, training = end_to_end(folded, tokens)
        add("end to end", student, tokens=tokens, **training)
    for tokens in arguments.tokens:
        student, training = end_to_end(best, tokens)
        training["seconds"] += its_seconds
        add("the best of the local ones, then end to end", student, tokens=tokens, **training)


def as_markdown(result: dict[str, Any]) -> str:
    config, texts = result["config"], result["texts"]
    heads = "".join(f" {text}: KL | perplexity |" for text in texts)
    lines = []
    for row in result["rows"]:
        cells = [
            row["name"],
            f"{row['tokens']:,}" if "tokens" in row else "",
            f"{row['seconds']:.0f}" if "seconds" in row else "",
            f"{row['first_loss']:.4f} → {row['last_loss']:.4f}" if "first_loss" in row else "",
            *(f"{row[text]['kl']:.4f} | {row[text]['perplexity']:.2f}" for text in texts),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"""# Local distillation

{config["model"]} ({config["dtype"]}), blocks {config["remove"]} removed and compensated on {_FITTED_TOKENS:,} tokens;
trained on {" + ".join(config["text"])} in steps of {config["batch_size"]} windows of {config["context"]} tokens. End to
end: KL, LoRA of rank {config["rank"]} behind the cut, the blocks beside it in full, rate {config["learning_rate"]:g}.
Measured on {config["windows"]} windows of {config["context"]} of each text; KL in nats per token to the source. Tokens
of the last rows are those end to end, seconds those of both trainings. Error: relative squared error of the stream,
mean of the first and of the last tenth of the steps.

| | tokens | seconds | error |{heads}
|---|---|---|---|{"---|---|" * len(texts)}
{table}

{provenance_of(result)}
"""


if __name__ == "__main__":
    main()
