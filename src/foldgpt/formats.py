"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath


def whole(value: float) -> str:
    """A whole number, in groups of three digits."""
    return f"{value:,.0f}"


def millions(value: float) -> str:
    """A number of parameters, in millions from 100,000 on."""
    return f"{value / 1e6:,.1f} M" if value >= 1e5 else whole(value)


def megabytes(value: float) -> str:
    """A number of bytes, in MB (10⁶) from 100 kB on."""
    return f"{value / 1e6:,.1f} MB" if value >= 1e5 else f"{value / 1e3:,.1f} kB"


def significant(value: float, digits: int = 4) -> str:
    """A positive number with so many digits that say something; one below 0.0001 with as many behind the point."""
    if value >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if value >= 1e-4 or not value else f"{value:.{digits}f}"


def percent(value: float) -> str:
    """A ratio as a percentage."""
    return f"{100 * value:.1f} %"


def gigabytes(value: float) -> str:
    """A number of bytes in GB (10⁹)."""
    return f"{value / 1e9:,.1f} GB" if value >= 1e8 else f"{value / 1e6:,.0f} MB"


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def change(value: float) -> str:
    """A difference, with its sign."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:+,.{digits}f}".replace("-", "−")


def change_within(value: float, low: float, high: float) -> str:
    """A difference with the interval in which it lies."""
    return f"{change(value)} [{change(low)}, {change(high)}]"


def block_ranges(blocks: Sequence[int]) -> str:
    """Source indices in few words: 3, 5–8 and 11."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    # Two in a row are not worth a dash.
    parts = [
        part for run in runs for part in ([f"{run[0]}–{run[-1]}"] if len(run) > 2 else [str(block) for block in run])
    ]
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def amount(value: float, unit: str) -> str:
    """An amount of "parameters", "FLOPs" or "seconds", as people say it."""
    if unit == "parameters":
        return f"{millions(value)} parameters"
    if unit == "FLOPs":
        return f"{significant(value / 1e9)} GFLOPs" if value >= 1e9 else f"{significant(value / 1e6)} MFLOPs"
    return f"{significant(1e3 * value)} ms" if value < 1 else f"{significant(value)} s"


def what_goes(num_blocks: int, *, sublayers: bool) -> str:
    """What a number of blocks to remove means; of attention and MLP apart as many parameters as they have."""
    number = f"{num_blocks} block" if num_blocks == 1 else f"{num_blocks} blocks"
    if sublayers:
        return f"as many parameters as {number} {'has' if num_blocks == 1 else 'have'} go"
    return f"{number} {'goes' if num_blocks == 1 else 'go'}"


def dtype_name(dtype: object) -> str:
    """A torch dtype as configs and options name it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


#: What texts begin with that are not files.
NOT_FILES = ("demo:", "hub:", "self:")


def text_name(spec: str) -> str:
    """A text without its folders: what others are told of it."""
    return spec if spec.startswith(NOT_FILES) else PurePath(spec).name
