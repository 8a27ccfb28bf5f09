"""Print the growth of peak memory by a merge, in MiB: ``merging_worker.py OUTPUT SHARD_SIZE SMALL PARENT …``.

The first merge, of a small model, takes the memory of interpreter and libraries, which does not count.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from training.models.merging import merge


def main(output: str, shard_size: str, small: str, *parents: str) -> None:
    torch.set_num_threads(1)
    merge([small], Path(f"{output}-small"))
    # The kernel forgets the peak of the process that started this one.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    merge(parents, Path(output), max_shard_size=shard_size)
    sys.stdout.write(f"{(_peak() - before) / 1024:.1f}\n")


def _peak() -> int:
    """Return the peak of resident memory in KiB, mapped files included."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
