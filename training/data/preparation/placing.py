"""The fourth phase: hashes of a shard's rows become positions among the source's distinct texts."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from training.data.preparation.plan import PreparationPlan
from training.data.preparation.reading import MISSING
from training.data.preparation.runs import partition_of
from training.data.prepared import SPLITS

# Cells placed at a time: one pass over all partitions serves them.
_BLOCK_CELLS = 4_000_000


def place_shard(plan: PreparationPlan, number: int) -> None:
    """Writes the rows of a shard as positions, -1 for a missing negative, each to its split."""
    width = 2 + plan.negatives
    block = max(1, _BLOCK_CELLS // width)
    held_out = np.fromfile(plan.held_out_file, dtype="<u8")
    with ExitStack() as stack:
        files = {split: stack.enter_context(plan.positions_file(number, split).open("wb")) for split in SPLITS}
        draws_file = stack.enter_context(plan.draws_file(number).open("rb"))
        rows_file = stack.enter_context(plan.rows_file(number).open("rb"))
        while len(draws := np.fromfile(draws_file, dtype="<u8", count=block)):
            hashes = np.fromfile(rows_file, dtype="<u8", count=len(draws) * width)
            positions = _positions(plan, hashes.astype(np.uint64)).astype("<i4").reshape(-1, width)
            aside = np.isin(draws, held_out)
            for split, own in (("train", ~aside), ("validation", aside)):
                files[split].write(positions[own].tobytes())


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
