"""Which measure on calibration text puts sets of blocks into the order of their perplexity on other text?

Sets, those of `--remove` and further ones that exchange blocks of them for others of `--pool`, are measured on windows
of calibration text of several lengths, and in copies of text, each by the KL to the source; and by their perplexity on
other texts. The table has the rank correlation (Spearman) of each measure, and of sums with copies at several weights,
with the perplexity on each text, over all sets. With --compensate all of it is behind the fit that folding makes; with
--search-tokens, what a search says of the sets is in the table too, behind its own fit on so many tokens, begun at the
plain removal and at one of further text.

    python benchmarks/search_measures.py --text C4.jsonl --text WIKIPEDIA.jsonl --evaluate wiki.valid.raw \
        --evaluate OTHER_C4.jsonl --remove 16-18 --remove 13,14,17 --pool 4,5,12-18,25,26 --sets 26
"""

from __future__ import annotations

import argparse
import functools
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from command import command_line
from foldgpt.artifacts import write_json, write_text
from foldgpt.block_lists import blocks_of
from foldgpt.compensation import compensate, merged
from foldgpt.corpus import calibration_windows, evaluation_windows
from foldgpt.environment import describe_environment
from foldgpt.folding import source_model_of
from foldgpt.plan import FoldPlan
from foldgpt.progress import be_quiet
from foldgpt.replay import Replay
from foldgpt.selection import RemovalCost, Request
from foldgpt.selection.copies import with_copies
from foldgpt.sources import load_source
from provenance import provenance_of

#: Lengths of the windows of ordinary text, and of those whose second half is a copy of the first.
_CONTEXTS, _COPIED = (256, 512, 1024), 512
#: What a copied token weighs beside one of ordinary text.
_WEIGHTS = (0.03, 0.0667, 0.1, 0.2, 0.5)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--text", action="append", required=True, help="calibration text; may be repeated")
    parser.add_argument("--evaluate", action="append", required=True, help="other text; may be repeated")
    parser.add_argument("--windows", type=int, default=10, help="windows of 1,024 tokens of each of those")
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens of each measure")
    parser.add_argument("--remove", action="append", required=True, help="a set, e.g. 13-18; may be repeated")
    parser.add_argument("--pool", required=True, help="blocks that further sets are made of")
    parser.add_argument("--sets", type=int, default=24, help="sets in all")
    parser.add_argument("--compensate", action="store_true")
    parser.add_argument("--compensation-tokens", type=int, default=16384)
    parser.add_argument("--search-tokens", type=int, action="append", help="tokens of a search; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="search_measures", help="stem of the result files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    be_quiet()
    source = load_source(arguments.model, dtype=arguments.dtype)

    def calibration(context: int, tokens: int, seed: int) -> Any:
        return calibration_windows(arguments.text, source.tokenizer, context=context, num_tokens=tokens, seed=seed)

    costs: dict[str, RemovalCost] = {}
    for context in _CONTEXTS:
        ids_WT = calibration(context, arguments.tokens, arguments.seed).ids
        costs[f"KL, windows of {context}"] = RemovalCost(Replay(source.model, ids_WT, batch_size=2), cache_bytes=0)
    # Half of these windows is ordinary text.
    repeated_WT, copied_WT = with_copies(calibration(_COPIED, 2 * arguments.tokens, arguments.seed + 1).ids, 0.5)
    in_copies = RemovalCost(Replay(source.model, repeated_WT, batch_size=2), copied_WT=copied_WT, cache_bytes=0)
    texts = {}
    for text in arguments.evaluate:
        ids_WT = evaluation_windows([text], source.tokenizer, context=1024, max_windows=arguments.windows).ids
        texts[Path(text).name] = RemovalCost(
            Replay(source.model, ids_WT, batch_size=2),
            objective="lm",
            position_share=1.0,
            most_positions=ids_WT.numel(),
            cache_bytes=0,
        )
    # Another draw, with hardly any text of those that are measured on.
    fitted = Replay(source.model, calibration(512, arguments.compensation_tokens, arguments.seed + 2).ids)
    searches = {}
    for tokens in arguments.search_tokens or []:
        # As many as leave priors their full text behind what is held out for finals.
        drawn_WT = calibration(512, 6 * tokens, arguments.seed).ids
        request = Request(
            source.model.config.num_hidden_layers,
            len(blocks_of(arguments.remove[0])),
            model=source.model,
            ids_WT=drawn_WT[: tokens // 512],
            compensate=arguments.compensate,
        )
        searches[f"search on {tokens:,} tokens"] = request.need_cost("search_measures", cache_bytes=0)
        if arguments.compensate:
            begun = replace(request, further_ids_WT=drawn_WT[tokens // 512 :])
            name = f"search on {tokens:,} tokens, fits begun on {512 * begun.num_prior_windows:,} others"
            searches[name] = begun.need_cost("search_measures", cache_bytes=0)
    rows = []
    for removed in sets_of(arguments):
        by_search = {name: search.cost(frozenset(removed), keep=False) for name, search in searches.items()}
        plan = FoldPlan.create(source_model_of(source.model), removed=removed)
        corrections = compensate(source.model, plan, fitted.ids_WT, replay=fitted) if arguments.compensate else {}
        changed = min(corrections, default=None)
        of = functools.partial(RemovalCost.costs, removed=frozenset(removed), keep=False, changed_from=changed)
        with merged(source.model, corrections):
            rows.append(
                {
                    "removed": removed,
                    "measures": {name: float(of(cost).mean()) for name, cost in costs.items()}
                    | {"KL in copies": float(of(in_copies)[in_copies.copied_R].mean())}
                    | by_search,
                    "losses": {name: float(of(cost).mean()) for name, cost in texts.items()},
                }
            )
        print(rows[-1], flush=True)
        result = {
            "benchmark": "search_measures",
            "command": command_line(),
            "config": {
                **{name: value for name, value in vars(arguments).items() if name not in ("out", "name", "seed")},
                "text": [Path(text).name for text in arguments.text],
                "evaluate": list(texts),
            },
            "seed": arguments.seed,
            "environment": describe_environment(),
            "source": {"spec": source.spec, "fingerprint": source.fingerprint},
            "sets": rows,
        }
        write_json(arguments.out / f"{arguments.name}.json", result)
    write_text(arguments.out / f"{arguments.name}.md", as_markdown(result))
    print(as_markdown(result))


def sets_of(arguments: argparse.Namespace) -> list[list[int]]:
    """The sets that are given, and others that differ from one of them in one to three blocks."""
    given = [blocks_of(words) for words in arguments.remove]
    pool = set(blocks_of(arguments.pool))
    draw = random.Random(arguments.seed)
    found = [sorted(blocks) for blocks in given]
    for _ in range(100 * arguments.sets):  # a small pool may not hold so many
        if len(found) >= arguments.sets:
            break
        base = set(draw.choice(given))
        exchanged = draw.randint(1, min(3, len(base)))
        gone = set(draw.sample(sorted(base), exchanged))
        blocks = sorted((base - gone) | set(draw.sample(sorted(pool - base), exchanged)))
        if blocks not in found:
            found.append(blocks)
    return found


def measures_of(row: Mapping[str, Any]) -> dict[str, float]:
    """All measures of a set, sums with copies among them."""
    found = dict(row["measures"])
    copies = found["KL in copies"]
    for context in _CONTEXTS:
        own = found[f"KL, windows of {context}"]
        found |= {
            f"KL, windows of {context}, and {weight:g} of that in copies": own + weight * copies for weight in _WEIGHTS
        }
    return found


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table, and where it comes from."""
    config, sets = result["config"], result["sets"]
    measured = [measures_of(row) for row in sets]
    lines = []
    for name in measured[0]:
        values = [row[name] for row in measured]
        found = [spearmanr(values, [row["losses"][text] for row in sets])[0] for text in config["evaluate"]]
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in found)} |")
    compensated = f", compensated on {config['compensation_tokens']:,} tokens" * config["compensate"]
    return f"""# What a search should measure

{config["model"]} without {len(sets[0]["removed"])} blocks{compensated}, {len(sets)} sets. Rank correlation of each
measure on {config["tokens"]:,} tokens of {" + ".join(config["text"])} with the perplexity on the first
{config["windows"]} windows of 1,024 tokens of each other text.

| measure | {" | ".join(config["evaluate"])} |
|---|{"---|" * len(config["evaluate"])}
{chr(10).join(lines)}

{provenance_of(result)}"""


if __name__ == "__main__":
    main()
