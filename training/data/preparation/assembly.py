"""The last phase: what the tasks wrote becomes the files of a prepared source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from training.common.checksums import write_checksums
from training.data.preparation.plan import PreparationPlan
from training.data.preparation.quarantine import join_quarantines
from training.data.prepared import DESCRIPTION, FORMS, OFFSETS, QUARANTINE, SPLITS, TEXT_OFFSETS, TEXTS, TOKENS

# Raise it when the same source would be prepared to other bytes than before.
FORMAT = 4
_COPY_BYTES = 16 << 20


def assemble(plan: PreparationPlan, folder: Path, fingerprint: str) -> None:
    """Writes the prepared source into an empty folder, its description last."""
    partitions, shards = range(plan.partitions), range(len(plan.shards))
    tokens = _concatenate((plan.texts_file(p, "tokens") for p in partitions), folder / TOKENS) // 4
    texts = _write_offsets((plan.texts_file(p, "lengths") for p in partitions), folder / OFFSETS)
    kept = {}
    if plan.options.keep_texts:
        kept["text_bytes"] = _concatenate((plan.texts_file(p, "utf8") for p in partitions), folder / TEXTS)
        _write_offsets((plan.texts_file(p, "utf8_lengths") for p in partitions), folder / TEXT_OFFSETS)
    if plan.options.text_forms:
        kept["forms"] = _concatenate((plan.texts_file(p, "forms") for p in partitions), folder / FORMS) // 8
    row_bytes = 4 * (2 + plan.negatives)
    rows = {
        split: _concatenate((plan.positions_file(s, split) for s in shards), folder / file) // row_bytes
        for split, file in SPLITS.items()
    }
    source, options = plan.source, plan.options
    for path in sorted(folder.iterdir()):
        write_checksums(path)
    description = {
        "format": FORMAT,
        "name": source.name,
        "task_type": source.task_type,
        "symmetric": source.symmetric,
        "instruction": source.instruction if options.instructions else None,
        "languages": source.languages,
        "negatives": plan.negatives,
        "texts": texts,
        "tokens": tokens,
        "end_token": Tokenizer.from_file(str(plan.tokenizer_file)).encode("").ids[-1],
        **kept,
        # Rows of the files, above the cap and put aside ones too.
        "read": plan.rows,
        "rows": rows,
        "query_is_passage": sum(int(plan.same_file(s).read_text()) for s in shards),
        "quarantined": join_quarantines([plan.quarantine_file(s) for s in shards], folder / QUARANTINE),
        "fingerprint": fingerprint,
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2))


def _concatenate(parts: Iterable[Path], whole: Path) -> int:
    """Copies files one after the other into one and returns its bytes."""
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file, _COPY_BYTES)
        return file.tell()


def _write_offsets(lengths: Iterable[Path], path: Path) -> int:
    """Writes where each text starts, and where the last one ends; returns the number of texts."""
    texts, end = 0, 0
    with path.open("wb") as file:
        file.write(np.zeros(1, dtype="<i8").tobytes())
        for part in lengths:
            ends = end + np.cumsum(np.fromfile(part, dtype="<i4"), dtype=np.int64)
            file.write(ends.astype("<i8").tobytes())
            texts, end = texts + len(ends), int(ends[-1]) if len(ends) else end
    return texts
