"""Prepare or opens one made-up source: ``preparation_point.py prepare|open FOLDER ROWS``; writes JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests.benchmarks.machine import process_memory

_GLOBAL_BATCH = 512


def main(action: str, folder: str, rows: str) -> None:
    """Does one of the two and says how long it took, imports left out."""
    found = (_prepare if action == "prepare" else _open)(Path(folder), rows)
    sys.stdout.write(json.dumps(found) + "\n")


def _open(folder: Path, rows: str) -> dict[str, float]:
    """Open a prepared source, then collates its first batch.

    The memory is that of opening: the batch maps pages of the files, which stay the system's.
    """
    from training.data.prepared import PreparedSource

    # The folder is named after the source and its settings.
    (place,) = (folder / "prepared").glob(f"{rows}-*")
    start = time.perf_counter()
    sources = [PreparedSource(place)]
    seconds, peak = time.perf_counter() - start, process_memory("VmHWM")

    from training.data.preparation.plan import PreparationOptions
    from training.trainer.batches import GlobalBatchSampler, PackedCollator, PreparedRows

    start = time.perf_counter()
    dataset = PreparedRows(sources, "train")
    keys = next(iter(GlobalBatchSampler([len(dataset)], _GLOBAL_BATCH)))
    negatives = dict(PreparationOptions().num_hard_negatives)
    batch = PackedCollator(sources, negatives)([dataset[key] for key in keys])
    assert batch["input_ids"].numel()
    return {"seconds": seconds, "peak_mib": peak, "first_batch_seconds": time.perf_counter() - start}


def _prepare(folder: Path, rows: str) -> dict[str, float]:
    """Prepare a file from scratch."""
    from training.data.manifest import Source
    from training.data.preparation.pipeline import prepare
    from training.data.preparation.plan import PreparationOptions
    from training.models.loading import load_tokenizer

    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    source = Source(rows, [folder / f"{rows}.parquet"], "retrieval", "Retrieve.")
    start = time.perf_counter()
    (prepared,) = prepare([source], tokenizer, folder / "prepared", PreparationOptions())
    return {"seconds": time.perf_counter() - start, "tokens": prepared.description["tokens"]}


if __name__ == "__main__":
    main(*sys.argv[1:])
