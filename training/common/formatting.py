"""Numbers and tables as text."""

from __future__ import annotations

_PETAFLOPS_DAY = 1e15 * 86_400


def size(number: float) -> str:
    """Format bytes as MiB or GiB."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 / 10 else f"{number / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Format a time span as minutes or hours."""
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def operations(number: float) -> str:
    """Format floating-point operations; large numbers also as days of a device that does 1e15 per second."""
    days = number / _PETAFLOPS_DAY
    return f"{number:.3g} FLOPs" + (f" ({days:,.1f} petaflop/s-days)" if days >= 0.1 else "")
