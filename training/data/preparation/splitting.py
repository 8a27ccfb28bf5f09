"""The second phase: which queries are held out for validation.

A split by rows would leak: of a query that stands in ten rows, nine would be trained on and one validated. So a query
is held out with all its rows, by a draw of its text alone: order of the rows, files and tasks change nothing, and the
same query has the same draw in every source. In clustering and classification the query is the anchor.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from xxhash import xxh3_64_intdigest

from training.common.keyed import keyed_bits
from training.data.instructions import without_instruction
from training.data.preparation.plan import SPLIT, PreparationPlan
from training.data.row_checks import text_column

# Rows whose draws are looked at, at least: of a source that has no more, all are.
_LEAST_ROWS = 1 << 20
# What may be missing from the share of a larger source before further draws are looked at.
_TOLERANCE = 1000


def query_draws(batch: pa.RecordBatch, seed: int) -> np.ndarray:
    """``(rows,)`` 64-bit draws of the rows' queries, which an instruction that a query brings along does not change."""
    encoded = text_column(batch, "query").dictionary_encode()
    hashes = [xxh3_64_intdigest(without_instruction(text).encode()) for text in encoded.dictionary.to_pylist()]
    return keyed_bits(seed, SPLIT, np.array(hashes, dtype=np.uint64))[np.asarray(encoded.indices)]


def choose_validation(plan: PreparationPlan, _: int = 0) -> None:
    """Writes the draws of the queries that are held out.

    Of ``n`` rows (the good ones under the cap), ``round(validation_share * n)`` are held out, but never all unless the
    share is 1. Queries are taken by ascending draw as long as all their rows fit, and one that has too many is passed
    over: the number is exact wherever queries of few enough rows are left, and never exceeded. In a source of more than
    a million rows a thousandth of it may be missing, so that memory follows the share rather than the rows.
    """
    shards = [plan.draws_file(shard) for shard in range(len(plan.shards))]
    rows, share = sum(path.stat().st_size for path in shards) // 8, plan.options.validation_share
    wanted = round(share * rows) if share == 1 else min(round(share * rows), max(rows - 1, 0))
    looked_at = max(2 * share, _LEAST_ROWS / max(rows, 1))
    while True:
        highest = np.uint64(looked_at * 2.0**64) if looked_at < 1 else np.uint64(2**64 - 1)
        low = [of_shard[of_shard <= highest] for of_shard in (np.fromfile(path, dtype="<u8") for path in shards)]
        draws, counts = np.unique(np.concatenate(low), return_counts=True)
        taken = _take(counts, wanted)
        missing = wanted - int(counts[taken].sum())
        if looked_at >= 1 or missing <= wanted // _TOLERANCE:
            break
        looked_at *= 4
    plan.held_out_file.write_bytes(draws[taken].astype("<u8").tobytes())


def _take(counts: np.ndarray, wanted: int) -> np.ndarray:
    """``(n,)`` whether each group is taken: in order, as long as its ``(n,)`` number of rows still fits."""
    taken, ends, start = np.zeros(len(counts), dtype=bool), np.cumsum(counts), 0
    while wanted > 0 and start < len(counts):
        before = ends[start] - counts[start]
        # Those from start to stop fit, the one at stop does not.
        stop = int(np.searchsorted(ends, before + wanted, side="right"))
        taken[start:stop] = True
        wanted -= int(counts[start:stop].sum())
        start = stop + 1
    return taken
