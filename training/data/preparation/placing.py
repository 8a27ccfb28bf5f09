"""The third phase: hashes of a shard's rows become positions among the source's distinct texts."""

from __future__ import annotations

import numpy as np

from training.data.preparation.plan import PreparationPlan
from training.data.preparation.reading import MISSING
from training.data.preparation.runs import partition_of
from training.data.prepared import SPLITS

__all__ = ["place_shard"]

# Cells placed at a time: one pass over all partitions serves them.
_BLOCK_CELLS = 4_000_000


def place_shard(plan: PreparationPlan, number: int) -> None:
    """Writes the rows of a shard as positions, -1 for a missing negative."""
    width = 2 + plan.negatives
    block = max(1, _BLOCK_CELLS // width) * width
    for split in SPLITS:
        hashes = np.memmap(plan.rows_file(number, split), "<u8", "r") if _size(plan, number, split) else np.zeros(0)
        with plan.positions_file(number, split).open("wb") as file:
            for start in range(0, len(hashes), block):
                positions = _positions(plan, np.array(hashes[start : start + block], dtype=np.uint64))
                file.write(positions.astype("<i4").tobytes())


def _size(plan: PreparationPlan, number: int, split: str) -> int:
    # An empty file cannot be mapped.
    return plan.rows_file(number, split).stat().st_size


def _positions(plan: PreparationPlan, hashes: np.ndarray) -> np.ndarray:
    """``(n,)`` positions: the rank of each hash among those of all partitions."""
    order = np.argsort(hashes)
    ends = np.searchsorted(partition_of(hashes[order], plan.partitions), np.arange(plan.partitions + 1))
    positions, before = np.empty(len(hashes), dtype=np.int64), 0
    for partition, (start, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        known = np.fromfile(plan.texts_file(partition, "hashes"), dtype="<u8")
        wanted = order[start:end]
        positions[wanted] = before + np.searchsorted(known, hashes[wanted])
        before += len(known)
    positions[hashes == MISSING] = -1
    return positions
