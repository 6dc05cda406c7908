"""Sharing at equal bytes and before any training: what each part of it does for the perplexity.

The budget is a share of the parameters in blocks, met by every row. The baseline is fixed: neighbouring blocks in pairs
around the middle, each with the first one's weights and norms of its own. Rows then change the donor, the alignment,
the private terms and the grouping, or start at zero in place of removed blocks. Low-rank terms are paid for: such rows
share, or remove, one block more and spend on ranks what that leaves, to the last rank that fits. Private scales fit
into the rounding of the budget, which is met to three decimals.

Reported is the excess log-perplexity, ln(perplexity / the source's), and its ratio to the baseline's. Another line says
what the pass over the calibration text for second moments costs. Each row is written when it is done; the same command
goes on where it was stopped.

With `--recover` every row is trained as well, all on the same tokens, and measured again.

    python benchmarks/sharing.py --model demo:smollm2-135m --text C4.jsonl --text WIKIPEDIA.jsonl \
        --perplexity wiki.test.raw --order 13-18,12 --ratio 0.2
    python benchmarks/sharing.py ... --recover 50k --recover-text C4.jsonl --set rank=32 --name sharing_recovered
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from foldgpt.allocator import keep_freed_memory
from foldgpt.artifacts import hash_of, read_json, write_json, write_text
from foldgpt.assignments import assignments
from foldgpt.block_lists import blocks_of
from foldgpt.compensation import compensate_
from foldgpt.corpus import OwnText, calibration_windows, evaluation_windows
from foldgpt.counts import count
from foldgpt.errors import ArtifactError, FoldGPTError
from foldgpt.evaluation.perplexity import perplexity
from foldgpt.families import decoder_of
from foldgpt.folding import fold_, predicted_parameters, source_model_of
from foldgpt.plan import Compensation, Fitting, FoldPlan, Group
from foldgpt.progress import be_quiet
from foldgpt.recovery import RecoverySettings, TrainingWindows, packed_windows, recover
from foldgpt.replay import Replay
from foldgpt.sharing import adjacent_groups, fit_sharing, limit_of, sharing_replay, solve, zero_started_groups
from foldgpt.sharing.covariance import input_moments
from foldgpt.sharing.distance import SharingCost
from foldgpt.sharing.fit import split
from foldgpt.sharing.partition import Partition, contiguous
from foldgpt.sharing.ranks import output_ranks, ranks_for
from foldgpt.sharing.solver import middle
from foldgpt.sizes import Size
from foldgpt.sources import load_source
from provenance import measured_by, provenance_lines

SCALES = ("norms", "scales")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--text", action="append", help="calibration text; may be repeated (demo:wikipedia)")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens")
    parser.add_argument("--context", type=int, default=256, help="tokens of a calibration window")
    parser.add_argument("--perplexity", required=True, help="text to measure perplexity on")
    parser.add_argument("--perplexity-context", type=int, default=1024)
    parser.add_argument("--max-windows", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=0.2, help="share of the parameters in blocks that is saved")
    parser.add_argument("--order", required=True, help="blocks in the order of their removal, such as 13-18,12")
    parser.add_argument("--pair-tokens", type=int, default=2048, help="tokens on which pairs are measured")
    parser.add_argument("--recover", type=count, default=0, help="tokens that every row is trained on")
    parser.add_argument("--recover-text", action="append", help="text to train on; may be repeated (that of --text)")
    parser.add_argument("--recover-context", type=int, default=512, help="tokens of a training window")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="settings of the training")
    parser.add_argument("--row", action="append", help="rows to measure, by name (all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="sharing", help="stem of the result files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    arguments.text = arguments.text or ["demo:wikipedia"]
    arguments.recover_text = arguments.recover_text or arguments.text
    try:
        arguments.settings = RecoverySettings(**{"seed": arguments.seed, **assignments(arguments.set)})
    except (TypeError, FoldGPTError) as error:
        parser.error(f"--set: {error}")
    return arguments


class Bench:
    """The model, the texts, and what several rows share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.source = load_source(arguments.model, dtype=arguments.dtype)
        self.model: Any = self.source.model
        self.decoder = decoder_of(self.model)
        self.blocks = range(len(self.decoder.blocks))
        self.order = blocks_of(arguments.order)
        self.calibration = calibration_windows(
            arguments.text,
            self.source.tokenizer,
            context=arguments.context,
            num_tokens=arguments.tokens,
            seed=arguments.seed,
        )
        self.test = evaluation_windows(
            [arguments.perplexity],
            self.source.tokenizer,
            context=arguments.perplexity_context,
            max_windows=arguments.max_windows,
        )
        self.name = source_model_of(self.model, name=arguments.model)
        self.limit = limit_of(self.model, Size("ratio", 1 - arguments.ratio))
        in_blocks = [sum(p.numel() for p in block.parameters()) for block in self.decoder.blocks]
        self.number = math.ceil(arguments.ratio * sum(in_blocks) / max(in_blocks) - 1e-9)
        self.replay = sharing_replay(self.model, self.calibration.ids)
        self.fitted, _ = split(self.replay)
        self._costs: torch.Tensor | None = None

    # ---------------------------------------------------------------------------------------------- groups

    def pairs(self, number: int, **how: Any) -> tuple[Group, ...]:
        """The fixed neighbours."""
        pairs = middle(adjacent_groups(self.decoder, self.blocks, size=2), self.blocks, number)
        return tuple(Group(blocks=pair.blocks, **how) for pair in pairs)

    def pairs_beside(self, removed: Sequence[int], number: int, **how: Any) -> tuple[Group, ...]:
        """The same among the blocks that are left."""
        kept = [index for index in self.blocks if index not in removed]
        pairs = middle(adjacent_groups(self.decoder, kept, size=2), kept, number)
        return tuple(Group(blocks=pair.blocks, **how) for pair in pairs)

    def best_pairs(self, number: int) -> tuple[Group, ...]:
        """The fixed neighbours, each pair with the better donor."""
        return tuple(
            Group(blocks=(a, b), donor="first" if self.costs()[a, b] <= self.costs()[b, a] else "last")
            for a, b in (group.blocks for group in self.pairs(number))
        )

    def measured(self, number: int, **how: Any) -> tuple[Group, ...]:
        """Groups chosen by measured costs; with their best donors unless told otherwise."""
        found: Partition = contiguous(self.blocks, self.costs(), [1] * len(self.blocks), number)
        if how:
            return tuple(Group(blocks=blocks, **how) for blocks in found.groups)
        return tuple(
            Group(blocks=blocks, donor="owner", owner=donor)
            for blocks, donor in zip(found.groups, found.donors, strict=True)
        )

    def zero(self, number: int, norms: str = "own") -> tuple[Group, ...]:
        """Positions in place of the first removed blocks."""
        removed = self.order[:number]
        kept = [index for index in self.blocks if index not in removed]
        groups = zero_started_groups(self.decoder, kept, removed)
        return tuple(group.model_copy(update={"norms": norms}) for group in groups)

    def costs(self) -> torch.Tensor:
        if self._costs is None:
            tokens = self.replay.batch_size * self.arguments.context
            cost = SharingCost(self.replay, num_batches=max(1, self.arguments.pair_tokens // tokens))
            self._costs = cost.pairs(self.blocks, reach=2)
        return self._costs

    def left(self, groups: Sequence[Group]) -> int:
        return self.limit - predicted_parameters(self.model, FoldPlan.create(self.name, groups=groups))

    # ----------------------------------------------------------------------------------------------- rows

    def rows(self) -> dict[str, Callable[[], dict[str, Any]]]:
        n = self.number
        share = self.share
        ls = {"donor": "least_squares"}
        return {
            "fixed pairs, first": lambda: share(self.pairs(n), fit=False),
            "fixed pairs, better of both": lambda: share(self.best_pairs(n), fit=False),
            "fixed pairs, mean": lambda: share(self.pairs(n, donor="mean"), aligned=False),
            "fixed pairs, mean, aligned": lambda: share(self.pairs(n, donor="mean")),
            "fixed pairs, least squares": lambda: share(self.pairs(n, **ls), aligned=False),
            "fixed pairs, least squares, aligned": lambda: share(self.pairs(n, **ls)),
            "fixed pairs, first, scales": lambda: share(self.pairs(n, private=SCALES)),
            "fixed pairs, least squares, aligned, scales": lambda: share(self.pairs(n, private=SCALES, **ls)),
            "fixed pairs, least squares, aligned, scales, ranks": lambda: share(
                self.ranked(self.pairs(n + 1, private=SCALES, **ls))
            ),
            "measured groups, best donor": lambda: share(self.measured(n), fit=False),
            "measured groups, least squares, aligned, scales": lambda: share(self.measured(n, private=SCALES, **ls)),
            "measured groups, least squares, aligned, scales, ranks": lambda: share(
                self.ranked(self.measured(n + 1, private=SCALES, **ls))
            ),
            "removed": lambda: share((), removed=self.order[:n], fit=False),
            "removed, compensated": lambda: share((), removed=self.order[:n], fit=False, compensate=True),
            "half removed, half in pairs, compensated": lambda: share(
                self.pairs_beside(self.order[: n // 2], n - n // 2, private=SCALES, **ls),
                removed=self.order[: n // 2],
                compensate=True,
            ),
            "at zero, own norms, scales fitted": lambda: share(self.zero(n)),
            "at zero, owner's norms, scales fitted": lambda: share(self.zero(n, "owner")),
            "at zero, scales fitted, compensated": lambda: share(self.zero(n), compensate=True),
            "at zero, scales and ranks fitted": lambda: share(self.output_ranked(self.zero(n + 1))),
            "at zero, scales and ranks fitted, compensated": lambda: share(
                self.output_ranked(self.zero(n + 1)), compensate=True
            ),
            "solver's choice": self.solved,
        }

    def ranked(self, groups: tuple[Group, ...]) -> tuple[Group, ...]:
        return ranks_for(self.replay, groups, self.left(groups), self.fitted)

    def output_ranked(self, groups: tuple[Group, ...]) -> tuple[Group, ...]:
        return output_ranks(self.replay, groups, self.left(groups))

    def share(
        self,
        groups: tuple[Group, ...],
        *,
        removed: Sequence[int] = (),
        fit: bool = True,
        aligned: bool = True,
        compensate: bool = False,
    ) -> dict[str, Any]:
        return self.measure(FoldPlan.create(self.name, removed=removed, groups=groups), fit, aligned, compensate)

    def solved(self) -> dict[str, Any]:
        started = time.perf_counter()
        rest = [index for index in self.blocks if index not in self.order]
        order = [*self.order, *rest]
        text = {
            "texts": tuple(self.arguments.text),
            "context": self.arguments.context,
            "num_tokens": self.arguments.tokens,
            "seed": self.arguments.seed,
            "fingerprint": self.calibration.fingerprint,
        }
        solution = solve(
            self.model,
            self.name,
            self.calibration.ids,
            self.limit,
            lambda number: tuple(sorted(order[:number])),
            compensation=Compensation(**text),
            fitting=Fitting(**text),
        )
        seconds = time.perf_counter() - started
        plan = solution.best.plan
        row = self.measure(plan, plan.fitting is not None, True, plan.compensation is not None)
        return {**row, "seconds": round(seconds, 1), **solution.to_json_dict()}

    def measure(self, plan: FoldPlan, fit: bool, aligned: bool, compensate: bool) -> dict[str, Any]:
        started = time.perf_counter()
        model = copy.deepcopy(self.model)
        parameters = predicted_parameters(model, plan)
        found: dict[str, Any] = {}
        if compensate:
            compensate_(model, plan.at_start, self.calibration.ids)
        fits = None
        if fit:
            # The replay of the source has the source's states, but it must call the blocks of the copy.
            replay = self.replay if not compensate else _moved(self.replay, model)
            sharing = fit_sharing(replay.model, plan, self.calibration.ids, aligned=aligned, replay=replay)
            fits = sharing.fits
            found = {"held_out_kl": sharing.kl, "passes": round(sharing.passes, 2)}
        fold_(model, plan, fits)
        seconds = time.perf_counter() - started
        value = perplexity(model, self.test).value
        if self.arguments.recover:
            found["recovered"] = self.recover(model, plan)
        return {
            "parameters": parameters,
            "over_limit": (parameters - self.limit) / self.limit,
            "removed": list(plan.removed),
            "groups": [group.model_dump(mode="json") for group in plan.groups],
            "perplexity": value,
            "seconds": round(seconds, 1),
            **found,
        }

    def recover(self, model: Any, plan: FoldPlan) -> dict[str, Any]:
        """Train a folded model, and measure it again."""
        with tempfile.TemporaryDirectory() as folder:
            train, held_out = self.training_windows(folder)
            result = recover(
                model, self.model, plan, train, held_out, self.arguments.settings, Path(folder) / "recovered"
            )
        return {
            "perplexity": perplexity(model, self.test).value,
            "held_out_before": result.before["loss"],
            "held_out_after": result.after["loss"],
            "seconds": round(result.seconds, 1),
        }

    def training_windows(self, folder: str) -> tuple[TrainingWindows, TrainingWindows]:
        return packed_windows(
            self.arguments.recover_text,
            self.source.tokenizer,
            folder,
            context=self.arguments.recover_context,
            num_tokens=self.arguments.recover,
            num_held_out=8192,
            seed=self.arguments.seed,
            own=OwnText(lambda: self.model, self.source.tokenizer, self.source.fingerprint),
        )

    def covariance_pass(self) -> dict[str, Any]:
        """What the second moments of all blocks cost, beside forward passes over the same windows."""
        body = self.decoder.body
        turns = []
        largest = 0
        for _ in range(3):
            turn = [self._seconds(self.model), self._seconds(body)]
            started = time.perf_counter()
            replay = Replay(self.model, self.calibration.ids, batch_size=self.replay.batch_size, boundaries=[0])
            for _, moments in input_moments(replay, self.blocks):
                held = {id(m): m.second_KK.numel() * m.second_KK.element_size() for m in moments.values()}
                largest = max(largest, sum(held.values()))
            turns.append((*turn, time.perf_counter() - started))
        return {
            "forward_seconds": [round(forward, 2) for forward, _, _ in turns],
            "without_head_seconds": [round(without, 2) for _, without, _ in turns],
            "pass_seconds": [round(seconds, 2) for _, _, seconds in turns],
            "forward_passes": statistics.median(seconds / forward for forward, _, seconds in turns),
            "passes_without_head": statistics.median(seconds / without for _, without, seconds in turns),
            "moments_bytes": largest,
            "stream_bytes": self.replay.states[0].numel() * self.replay.states[0].element_size(),
            "model_bytes": sum(p.numel() * p.element_size() for p in self.model.parameters()),
        }

    @torch.no_grad()
    def _seconds(self, module: Any) -> float:
        started = time.perf_counter()
        for rows in self.replay.batches():
            module(input_ids=self.calibration.ids[rows], use_cache=False)
        return time.perf_counter() - started


def _moved(replay: Replay, model: Any) -> Replay:
    """The same recording, with the blocks of another copy of the model."""
    moved = copy.copy(replay)
    moved.model, moved.decoder = model, decoder_of(model)
    return moved


def main() -> None:
    arguments = parse_arguments()
    be_quiet()
    keep_freed_memory()
    bench = Bench(arguments)
    rows = bench.rows()
    unknown = [name for name in arguments.row or [] if name not in rows]
    if unknown:
        raise SystemExit(f"unknown row {unknown[0]!r}; there are: {', '.join(map(repr, rows))}")
    settings = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("out", "name", "seed", "row", "text", "settings")
        # Results of untrained rows do not depend on how others are trained.
        and (arguments.recover or name not in ("recover", "recover_text", "recover_context", "set"))
    } | {
        "text": [Path(text).name for text in arguments.text],
        "perplexity": Path(arguments.perplexity).name,
    }
    if arguments.recover:
        settings["recover_text"] = [Path(text).name for text in arguments.recover_text]
    header = {
        "benchmark": "sharing",
        "config": settings,
        "seed": arguments.seed,
        "source": {"spec": bench.source.spec, "fingerprint": bench.source.fingerprint},
        "calibration": {"protocol": bench.calibration.protocol, "fingerprint": bench.calibration.fingerprint},
        "test": {"protocol": bench.test.protocol, "fingerprint": bench.test.fingerprint},
        "num_blocks": len(bench.blocks),
        "num_saved": bench.number,
        "limit": bench.limit,
    }
    call = measured_by()
    identity = hash_of([settings, header["seed"], header["source"], header["calibration"], header["test"]])
    place = arguments.out / f"{arguments.name}.json"
    result = resumed(place, identity) or {"rows": {}}
    result = {**header, "identity": identity, **{k: v for k, v in result.items() if k not in header}}

    def save() -> None:
        # Rows that another run of the same settings has measured meanwhile are kept.
        result["rows"] = {**(resumed(place, identity) or {"rows": {}})["rows"], **result["rows"]}
        write_json(place, result)
        write_text(place.with_suffix(".md"), as_markdown(result))

    if "source_perplexity" not in result:
        result["source_perplexity"] = perplexity(bench.model, bench.test).value
    if "covariance_pass" not in result and not arguments.recover:
        result["covariance_pass"] = bench.covariance_pass()
        save()
    for name, make in rows.items():
        if name in (resumed(place, identity) or result)["rows"] or (arguments.row and name not in arguments.row):
            continue
        row = make()
        for measured in filter(None, (row, row.get("recovered"))):
            measured["excess"] = math.log(measured["perplexity"] / result["source_perplexity"])
        result["rows"][name] = {**row, "call": call}
        print(name, {key: value for key, value in row.items() if key not in ("groups", "candidates")}, flush=True)
        save()
    save()
    print(place.with_suffix(".md").read_text())


def resumed(place: Path, identity: str) -> dict[str, Any] | None:
    """What an earlier run of the same settings has measured."""
    try:
        earlier = read_json(place)
    except ArtifactError:
        return None
    return earlier if earlier.get("identity") == identity else None


def as_markdown(result: dict[str, Any]) -> str:
    config = result["config"]
    baseline = result["rows"].get("fixed pairs, first", {}).get("excess")
    lines = []
    for name, row in result["rows"].items():
        ratio = "—" if baseline is None else f"{row['excess'] / baseline:.2f}"
        held = f"{row['held_out_kl']:.3f}" if "held_out_kl" in row else "—"
        shown = f"{name}: {row['chosen']}" if "chosen" in row else name
        line = (
            f"| {shown} | {row['parameters'] / 1e6:.2f} M | {row['perplexity']:,.1f} | {row['excess']:.3f} | {ratio} | "
            f"{held} | {row['seconds']:.0f} |"
        )
        if config.get("recover"):
            after = row["recovered"]
            line += (
                f" {after['perplexity']:,.1f} | {after['excess']:.3f} | {after['held_out_before']:.3f} → "
                f"{after['held_out_after']:.3f} | {after['seconds']:.0f} |"
            )
        lines.append(line)
    table = "\n".join(lines)
    heads, trained = "", ""
    if config.get("recover"):
        heads = " perplexity, trained | excess | loss, held out | seconds |"
        trained = (
            f"\nTrained on {config['recover']:,} tokens of {' + '.join(config['recover_text'])} in windows of "
            f"{config['recover_context']}, {', '.join(config['set'])}; the last columns are of the trained rows.\n"
        )
    moments = ""
    if cost := result.get("covariance_pass"):
        moments = (
            f"Second moments of the inputs of all linear layers: {cost['forward_passes']:.2f} forward passes, or\n"
            f"{cost['passes_without_head']:.2f} of the model without its head (medians of three turns),\n"
            f"{(cost['moments_bytes'] + cost['stream_bytes']) / 1e6:.1f} MB beside a model of "
            f"{cost['model_bytes'] / 1e6:.1f} MB.\n\n"
        )
    return f"""# Sharing at equal bytes, {"before and after" if trained else "before"} training

{config["model"]} ({result["num_blocks"]} blocks, {config["dtype"]}), {config["ratio"]:.0%} of the parameters in blocks
saved ({result["num_saved"]} blocks' worth): at most {result["limit"] / 1e6:.2f} M parameters.
Fitted on {config["tokens"]:,} tokens of {" + ".join(config["text"])} in windows of {config["context"]}; removal and
positions at zero take the blocks {config["order"]} in this order. Perplexity: {config["perplexity"]}, context \
{config["perplexity_context"]},
the first {config["max_windows"]} windows; the source's is {result["source_perplexity"]:.2f}.
Excess: ln(perplexity / the source's); its ratio is to that of the first row. KL in nats per token, on calibration
windows that nothing was fitted on. Seconds: fit and fold (for the solver, its search).
{trained}
| | parameters | perplexity | excess | ratio | KL | seconds |{heads}
|---|---|---|---|---|---|---|{"---|" * heads.count("|")}
{table}

{moments}{provenance_lines((row["call"] for row in result["rows"].values()), result["seed"])}
"""


if __name__ == "__main__":
    main()
