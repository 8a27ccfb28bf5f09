"""Memory of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

__all__ = ["process_memory"]


def process_memory(field: str) -> float:
    """MiB that this process holds (``VmRSS``) or held at most (``VmHWM``).

    ``getrusage`` is for systems that do not say so in a file: on Linux its peak is no less than that of the parent.
    """
    path = Path("/proc/self/status")
    if path.exists():
        line = next(line for line in path.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024
