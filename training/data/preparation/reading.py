"""The first phase: rows become hashes of their texts, and distinct texts are put down by hash.

Texts are known by 64 bits of XXH3. The next phase sees every text of a hash and refuses two of them; 64 bits more tell
within a task whether a text was seen before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from xxhash import xxh3_128_digest

from training.data.preparation.forms import TextForms
from training.data.preparation.plan import SPLIT, PreparationPlan, cap_draws
from training.data.preparation.quarantine import QuarantineWriter
from training.data.preparation.runs import RunWriter
from training.data.prepared import SPLITS
from training.data.published import PublishedFile
from training.data.row_checks import Fault, bad_row, find_faults, query_is_passage, text_column
from training.keyed import keyed_uniform, text_key

__all__ = ["MISSING", "read_shard"]

# The hash of a negative that is not there; that of no text.
MISSING = np.uint64(np.iinfo(np.uint64).max)
_BATCH_ROWS = 2048


def read_shard(plan: PreparationPlan, number: int) -> None:
    """Reads a shard of a source and writes its rows as hashes, its distinct texts, and its bad rows.

    Raises:
        UserError: If the file cannot be read, or a row is bad and bad rows are errors.
    """
    shard = plan.shards[number]
    file = plan.open(shard.file)
    hasher = _Hasher(plan)
    with ExitStack() as stack:
        writer = stack.enter_context(RunWriter(plan.runs(number), plan.partitions))
        quarantine = stack.enter_context(QuarantineWriter(plan.quarantine_file(number)))
        splits = {split: stack.enter_context(plan.rows_file(number, split).open("wb")) for split in SPLITS}
        offset = same = 0
        for batch in file.record_batches(min(_BATCH_ROWS, file.batch_rows), shard.row_groups):
            faults = find_faults(batch, file.negatives, plan.required_negatives)
            first_of_file = shard.first_row_of_file + offset
            numbers = np.arange(len(batch)) + shard.first_row + offset
            offset += len(batch)
            good = np.ones(len(batch), dtype=bool)
            if faults:
                quarantine.write(_put_aside(plan, file, batch, faults, first_of_file))
                good[[fault.row for fault in faults]] = False
            if plan.highest_draw is not None:
                good &= cap_draws(plan.source, plan.options, numbers) <= np.uint64(plan.highest_draw)
            batch = batch.filter(pa.array(good))
            same += int(query_is_passage(batch).sum())
            rows, texts, keys = hasher.hash(batch, file.negatives)
            writer.add(keys, texts)
            for split, block in _split(plan, numbers[good], rows):
                splits[split].write(block.astype("<u8").tobytes())
    plan.same_file(number).write_text(str(same))


def _split(plan: PreparationPlan, numbers: np.ndarray, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    key = text_key(plan.source.name)
    held_out = keyed_uniform(plan.options.seed, SPLIT, key, numbers) < plan.options.validation_share
    yield "train", rows[~held_out]
    yield "validation", rows[held_out]


def _put_aside(
    plan: PreparationPlan, file: PublishedFile, batch: pa.RecordBatch, faults: Sequence[Fault], first_row: int
) -> pa.Table:
    """The bad rows of a batch, with where they stood and why they are bad; or the error of the first of them."""
    if plan.options.on_bad_row == "error":
        raise bad_row(file.path, first_row, faults[0])
    # A row is put aside once, with its first fault.
    firsts = {fault.row: fault for fault in reversed(faults)}
    rows = sorted(firsts)
    columns = {name: _as_text(text_column(batch, name).take(pa.array(rows))) for name in batch.schema.names}
    about = {
        "file": [file.path.name] * len(rows),
        "row": [first_row + row for row in rows],
        "column": [firsts[row].column for row in rows],
        "reason": [firsts[row].reason for row in rows],
    }
    return pa.table({**about, **columns})


def _as_text(column: pa.Array) -> pa.Array:
    """Bytes that are no UTF-8 as the text nearest to them."""
    values = column.view(pa.large_binary()).to_pylist()
    texts = [None if value is None else value.decode(errors="replace") for value in values]
    return pa.array(texts, type=pa.large_string())


class _Hasher:
    """Turns the texts of batches into hashes, each distinct text of a batch once."""

    def __init__(self, plan: PreparationPlan) -> None:
        self._forms = TextForms(plan.source, plan.options)
        self._width = 2 + plan.negatives
        self._digest = partial(xxh3_128_digest, seed=plan.options.seed)

    def hash(self, batch: pa.RecordBatch, negatives: Sequence[str]) -> tuple[np.ndarray, list[str], np.ndarray]:
        """``(rows, 2 + negatives)`` hashes, and the distinct texts with their ``(n, 2)`` hashes and further bits."""
        rows = np.full((len(batch), self._width), MISSING, dtype=np.uint64)
        rows[:, 0], queries, query_keys = self._encode([text_column(batch, "query")], self._forms.query)
        names = ["passage", *negatives]
        columns = [text_column(batch, name) for name in names]
        documents, texts, keys = self._encode(columns, self._forms.document)
        rows[:, 1 : 1 + len(names)] = documents.reshape(len(names), len(batch)).T
        return rows, queries + texts, np.concatenate([query_keys, keys])

    def _encode(
        self, columns: Sequence[pa.Array], form: Callable[[str], str]
    ) -> tuple[np.ndarray, list[str], np.ndarray]:
        encoded = pa.concat_arrays(columns).dictionary_encode()
        texts = [form(text) for text in encoded.dictionary.to_pylist()]
        digests = b"".join(map(self._digest, map(str.encode, texts)))
        keys = np.frombuffer(digests, dtype="<u8").reshape(-1, 2).astype(np.uint64)
        np.minimum(keys[:, 0], MISSING - np.uint64(1), out=keys[:, 0])
        codes = np.asarray(pc.fill_null(encoded.indices, len(texts)))
        return np.append(keys[:, 0], MISSING)[codes], texts, keys
