"""A picture of which blocks the selectors of a result of compare_selectors.py remove, and what they have in common.

cd benchmarks/results
python ../selector_agreement.py selectors_smollm2-135m_whole.json --ratio 0.2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from foldgpt.artifacts import read_json
from foldgpt.comparison import Agreement
from foldgpt.figures import draw_agreement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON result of compare_selectors.py")
    parser.add_argument("--ratio", type=float, default=0.2, help="which size: the share of blocks removed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    result = read_json(arguments.result)
    stem = arguments.out / f"{arguments.result.stem}_{100 * arguments.ratio:.0f}"
    png, svg = draw_agreement(agreement_at(result, arguments.ratio), stem)
    print(png, svg, sep="\n")


def agreement_at(result: dict[str, Any], ratio: float) -> Agreement:
    """The sets of blocks at one size: one row for each set that a selector's seeds find, and of random the first."""
    sets: dict[str, dict[tuple[int, ...], int]] = {}
    for row in result["rows"]:
        if row["ratio"] == ratio and not (row["selector"] == "random" and row["seed"]):
            sets.setdefault(row["selector"], {}).setdefault(tuple(row["removed"]), row["seed"])
    removed = {
        name if len(found) == 1 else f"{name}, seed {seed}": blocks
        for name, found in sets.items()
        for blocks, seed in found.items()
    }
    return Agreement(result["num_blocks"], removed)


if __name__ == "__main__":
    main()
