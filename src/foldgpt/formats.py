"""Numbers as people read them."""

from __future__ import annotations


def whole(value: float) -> str:
    """A whole number, in groups of three digits."""
    return f"{value:,.0f}"


def millions(value: float) -> str:
    """A number of parameters, in millions from 100,000 on."""
    return f"{value / 1e6:,.1f} M" if value >= 1e5 else whole(value)


def megabytes(value: float) -> str:
    """A number of bytes, in MB (10⁶) from 100 kB on."""
    return f"{value / 1e6:,.1f} MB" if value >= 1e5 else f"{value / 1e3:,.1f} kB"


def significant(value: float) -> str:
    """A positive number with four digits that say something."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


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
