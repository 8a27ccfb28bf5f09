"""The first phase: rows become hashes of their texts, and distinct texts are put down by hash.

Texts are known by 64 bits of XXH3. The next phase sees every text of a hash and refuses two of them; 64 bits more tell
within a task whether a text was seen before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from xxhash import xxh3_128_digest

from training.data.preparation.forms import TextForms
from training.data.preparation.plan import PreparationPlan, cap_draws
from training.data.preparation.quarantine import QuarantineWriter
from training.data.preparation.runs import RunWriter
from training.data.preparation.splitting import query_draws
from training.data.published import PublishedFile
from training.data.row_checks import Fault, bad_row, find_faults, query_is_passage, text_column

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
        rows_file = stack.enter_context(plan.rows_file(number).open("wb"))
        draws_file = stack.enter_context(plan.draws_file(number).open("wb"))
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
            rows_file.write(rows.astype("<u8").tobytes())
            draws_file.write(query_draws(batch, plan.options.seed).astype("<u8").tobytes())
    plan.same_file(number).write_text(str(same))


def _put_aside(
    plan: PreparationPlan, file: PublishedFile, batch: pa.RecordBatch, faults: Sequence[Fault], first_row: int
) -> pa.Table:
    """The bad rows of a batch, with where they stood and why they are bad; or the error of the first of them."""
    if plan.options.on_bad_row == "error":
        remedy = "correct or drop the row, or put bad rows aside with on_bad_row: quarantine"
        raise bad_row(file.path, first_row, faults[0], remedy)
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
        queries = text_column(batch, "query").dictionary_encode()
        written, codes = queries.dictionary.to_pylist(), np.asarray(queries.indices)
        texts, keys = self._encode(map(self._forms.query, written))
        rows = np.full((len(batch), self._width), MISSING, dtype=np.uint64)
        rows[:, 0] = keys[codes, 0]
        columns = [text_column(batch, name) for name in ("passage", *negatives)]
        # Of each row, what its query brings along.
        brought = [self._forms.brought(query) for query in written]
        numbers = {instruction: number for number, instruction in enumerate(dict.fromkeys(brought))}
        of_row = np.array([numbers[each] for each in brought], dtype=np.int64)[codes]
        documents, more, more_keys = self._documents(columns, list(numbers), of_row)
        rows[:, 1 : 1 + len(columns)] = documents
        return rows, texts + more, np.concatenate([keys, more_keys])

    def _documents(
        self, columns: Sequence[pa.Array], instructions: Sequence[str | None], of_row: np.ndarray
    ) -> tuple[np.ndarray, list[str], np.ndarray]:
        """``(rows, columns)`` hashes of documents, each of which is a text under the instruction of its row."""
        encoded = pa.concat_arrays(columns).dictionary_encode()
        written = encoded.dictionary.to_pylist()
        codes = np.asarray(pc.fill_null(encoded.indices, -1)).astype(np.int64).reshape(len(columns), -1)
        pairs = np.where(codes < 0, -1, codes * len(instructions) + of_row)
        distinct, place = np.unique(np.append(pairs, -1), return_inverse=True)
        # The first is that of what is missing.
        texts, keys = self._encode(
            self._forms.document(written[pair // len(instructions)], instructions[pair % len(instructions)])
            for pair in distinct[1:].tolist()
        )
        return np.append(MISSING, keys[:, 0])[place[:-1].reshape(codes.shape)].T, texts, keys

    def _encode(self, forms: Iterable[str]) -> tuple[list[str], np.ndarray]:
        texts = list(forms)
        digests = b"".join(map(self._digest, map(str.encode, texts)))
        keys = np.frombuffer(digests, dtype="<u8").reshape(-1, 2).astype(np.uint64)
        np.minimum(keys[:, 0], MISSING - np.uint64(1), out=keys[:, 0])
        return texts, keys
