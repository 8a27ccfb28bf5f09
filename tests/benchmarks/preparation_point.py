"""Prepares or opens one made-up source: ``preparation_point.py prepare|open FOLDER ROWS``; writes JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

__all__ = ["main"]

_GLOBAL_BATCH = 512


def main(action: str, folder: str, rows: str) -> None:
    """Does one of the two and says how long it took, imports left out."""
    seconds, tokens = (_prepare if action == "prepare" else _open)(Path(folder), rows)
    sys.stdout.write(json.dumps({"seconds": seconds, "tokens": tokens}) + "\n")


def _open(folder: Path, rows: str) -> tuple[float, int]:
    """Opens a prepared source and collates its first batch."""
    from training.collator import PackedCollator, PreparedRows
    from training.data.options import PreparationOptions
    from training.data.prepared import PreparedSource
    from training.sampler import GlobalBatchSampler

    start = time.perf_counter()
    sources = [PreparedSource(folder / "prepared" / rows)]
    dataset = PreparedRows(sources, "train")
    keys = next(iter(GlobalBatchSampler([len(dataset)], _GLOBAL_BATCH)))
    negatives = dict(PreparationOptions().num_hard_negatives)
    batch = PackedCollator(sources, negatives)([dataset[key] for key in keys])
    return time.perf_counter() - start, batch["input_ids"].numel()


def _prepare(folder: Path, rows: str) -> tuple[float, int]:
    """Prepares a file from scratch."""
    from training.data.manifest import Source
    from training.data.options import PreparationOptions
    from training.data.prepare import prepare
    from training.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    source = Source(rows, [folder / f"{rows}.parquet"], "retrieval", "Retrieve.")
    start = time.perf_counter()
    (prepared,) = prepare([source], tokenizer, folder / "prepared", PreparationOptions())
    return time.perf_counter() - start, prepared.description["tokens"]


if __name__ == "__main__":
    main(*sys.argv[1:])
