"""Phase 1: replace the texts of rows by hashes, and write the distinct texts to disk, sorted into partitions by hash.

A text's hash is 64 bits of XXH3. Tokenising refuses two texts of one hash; within a task, 64 further bits show whether
a text was seen before.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from training.common.keyed import keyed_bits, keyed_uniform, text_key
from training.data.instructions import split_instruction, with_instruction, without_instruction
from training.data.preparation.plan import DOCUMENT_INSTRUCTION, SPLIT, PreparationPlan, cap_draws
from training.data.published import (
    Fault,
    PublishedFile,
    bad_row,
    find_faults,
    query_is_passage,
    text_column,
)

# The hash of a missing negative, and of no text.
MISSING = np.uint64(np.iinfo(np.uint64).max)
_BATCH_ROWS = 2048
# Characters of distinct texts that are held in memory before they are written.
_RUN_CHARACTERS = 24_000_000
_RUN_SCHEMA = pa.schema({"hash": pa.uint64(), "text": pa.large_string()})


def read_shard(plan: PreparationPlan, number: int) -> None:
    """Read a shard and write the hashes of its rows, its distinct texts and its bad rows."""
    shard = plan.shards[number]
    file = PublishedFile(plan.source.files[shard.file], plan.required_negatives)
    forms, runs = _Forms(plan), plan.file("runs", number)
    quarantine = None
    # A killed task may have left these.
    plan.file("quarantine", number).unlink(missing_ok=True)
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir()
    texts: dict[bytes, str] = {}
    offset = same = characters = 0
    with ExitStack() as stack:
        rows_file, draws_file = (stack.enter_context(plan.file(kind, number).open("wb")) for kind in ("rows", "draws"))
        for batch in file.record_batches(min(_BATCH_ROWS, file.batch_rows), shard.row_groups):
            good = np.ones(len(batch), dtype=bool)
            if faults := find_faults(batch, file.negatives, plan.required_negatives):
                table = _bad_rows(plan, file, batch, faults, shard.first_row_of_file + offset)
                if quarantine is None:
                    writer = pq.ParquetWriter(plan.file("quarantine", number), table.schema, compression="zstd")
                    quarantine = stack.enter_context(writer)
                quarantine.write_table(table)
                good[[fault.row for fault in faults]] = False
            if plan.highest_draw is not None:
                numbers = np.arange(len(batch)) + shard.first_row + offset
                good &= cap_draws(plan.source, plan.options, numbers) <= np.uint64(plan.highest_draw)
            offset += len(batch)
            batch = batch.filter(pa.array(good))
            same += int(query_is_passage(batch).sum())
            rows, found = forms.hash(batch, file.negatives)
            rows_file.write(rows.astype("<u8").tobytes())
            draws_file.write(_query_draws(batch, plan.options.seed).astype("<u8").tobytes())
            new = {key: text for key, text in found.items() if key not in texts}
            texts |= new
            characters += sum(map(len, new.values()))
            if characters >= _RUN_CHARACTERS:
                _write_run(runs, texts, plan.partitions)
                texts, characters = {}, 0
        _write_run(runs, texts, plan.partitions)
    plan.file("same", number).write_text(str(same))


def _bad_rows(
    plan: PreparationPlan, file: PublishedFile, batch: pa.RecordBatch, faults: Sequence[Fault], first_row: int
) -> pa.Table:
    """The bad rows of a batch with file, row and first fault, or the error for the first one."""
    if plan.options.on_bad_row == "error":
        remedy = "correct or drop the row, or put bad rows aside with on_bad_row: quarantine"
        raise bad_row(file.path, first_row, faults[0], remedy)
    firsts = {fault.row: fault for fault in reversed(faults)}
    rows = sorted(firsts)
    columns = {
        "file": [file.path.name] * len(rows),
        "row": [first_row + row for row in rows],
        "column": [firsts[row].column for row in rows],
        "reason": [firsts[row].reason for row in rows],
    }
    for name in batch.schema.names:
        # Bytes may be invalid UTF-8.
        values = text_column(batch, name).take(pa.array(rows)).view(pa.large_binary()).to_pylist()
        texts = [None if value is None else value.decode(errors="replace") for value in values]
        columns[name] = pa.array(texts, type=pa.large_string())
    return pa.table(columns)


def _query_draws(batch: pa.RecordBatch, seed: int) -> np.ndarray:
    """``(rows,)`` 64-bit draws of the rows' queries; an instruction in a query does not change its draw."""
    encoded = text_column(batch, "query").dictionary_encode()
    hashes = [xxh3_64_intdigest(without_instruction(text).encode()) for text in encoded.dictionary.to_pylist()]
    return keyed_bits(seed, SPLIT, np.array(hashes, dtype=np.uint64))[np.asarray(encoded.indices)]


class _Forms:
    """Texts as the model reads them: queries, and a share of a symmetric source's documents, under the instruction.

    Whether a document gets it is drawn per text rather than per row, so that a text has one form under an instruction.
    """

    def __init__(self, plan: PreparationPlan) -> None:
        source, options = plan.source, plan.options
        self._instruction = source.instruction if options.instructions else None
        self._share = options.document_instruction_share if source.symmetric and options.instructions else 0.0
        self._key = (options.seed, DOCUMENT_INSTRUCTION, text_key(source.name))
        self._width, self._seed = 2 + plan.negatives, options.seed

    def _query(self, text: str) -> str:
        # An instruction in the published file is neither added twice nor part of raw text.
        return without_instruction(text) if self._instruction is None else with_instruction(self._instruction, text)

    def _document(self, text: str, instruction: str | None) -> str:
        if self._instruction is None:
            return without_instruction(text)
        drawn = self._share and keyed_uniform(*self._key, text_key(text)) < self._share
        return with_instruction(instruction or self._instruction, text) if drawn else text

    def hash(self, batch: pa.RecordBatch, negatives: Sequence[str]) -> tuple[np.ndarray, dict[bytes, str]]:
        """Return ``(rows, 2 + negatives)`` hashes of the texts of a batch, and the distinct texts by their digests."""
        queries = text_column(batch, "query").dictionary_encode()
        written, codes = queries.dictionary.to_pylist(), np.asarray(queries.indices)
        rows = np.full((len(batch), self._width), MISSING, dtype=np.uint64)
        texts = [self._query(query) for query in written]
        digests = self._digests(texts)
        rows[:, 0] = hashes_of(digests)[codes]
        # The documents of a row get the instruction that its query contains.
        own = [split_instruction(query)[0] if self._share else None for query in written]
        numbers = {instruction: number for number, instruction in enumerate(dict.fromkeys(own))}
        instructions, of_row = list(numbers), np.array([numbers[each] for each in own], dtype=np.int64)[codes]
        columns = [text_column(batch, name) for name in ("passage", *negatives)]
        documents = pa.concat_arrays(columns).dictionary_encode()
        written = documents.dictionary.to_pylist()
        codes = np.asarray(pc.fill_null(documents.indices, -1)).astype(np.int64).reshape(len(columns), -1)
        # A document is a text under an instruction; the first of the distinct ones stands for a missing negative.
        pairs = np.where(codes < 0, -1, codes * len(instructions) + of_row)
        distinct, inverse = np.unique(np.append(pairs, -1), return_inverse=True)
        more = [
            self._document(written[pair // len(instructions)], instructions[pair % len(instructions)])
            for pair in distinct[1:].tolist()
        ]
        more_digests = self._digests(more)
        hashes = np.append(MISSING, hashes_of(more_digests))
        rows[:, 1 : 1 + len(columns)] = hashes[inverse[:-1].reshape(codes.shape)].T
        return rows, dict(zip(digests + more_digests, texts + more, strict=True))

    def _digests(self, texts: Sequence[str]) -> list[bytes]:
        return [xxh3_128_digest(text.encode(), seed=self._seed) for text in texts]


def hashes_of(digests: Iterable[bytes]) -> np.ndarray:
    """Return ``(n,)`` 64-bit hashes of ``n`` digests, none of them ``MISSING``."""
    hashes = np.frombuffer(b"".join(digests), dtype="<u8")[::2].astype(np.uint64)
    return np.minimum(hashes, MISSING - np.uint64(1))


def partition_of(hashes: np.ndarray, partitions: int) -> np.ndarray:
    """Return the partition of each hash, by its highest bits: partitions are neighbouring ranges of hashes."""
    bits = partitions.bit_length() - 1
    return (hashes >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(hashes), dtype=np.int64)


def _write_run(folder: Path, texts: Mapping[bytes, str], partitions: int) -> None:
    """Write distinct texts with their hashes as an Arrow file of one record batch per partition.

    A text may be in several runs. Two texts with the same hash are both written: tokenising refuses them.
    """
    hashes = hashes_of(texts)
    order = np.argsort(hashes)
    hashes, values = hashes[order], list(texts.values())
    ordered = pa.array([values[i] for i in order], type=pa.large_string())
    table = pa.record_batch([pa.array(hashes), ordered], schema=_RUN_SCHEMA)
    ends = np.searchsorted(partition_of(hashes, partitions), np.arange(partitions + 1)).tolist()
    path, compressed = folder / f"{len(list(folder.iterdir())):05d}.arrow", pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(path, _RUN_SCHEMA, options=compressed) as writer:
        for start, end in pairwise(ends):
            writer.write_batch(table.slice(start, end - start))


def read_partition(folders: Iterable[Path], partition: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Yield hashes and texts of one partition, run by run."""
    for folder in folders:
        for path in sorted(folder.glob("*.arrow")):
            with pa.memory_map(str(path)) as source:
                batch = pa.ipc.open_file(source).get_batch(partition)
                yield np.array(batch.column("hash"), dtype=np.uint64), batch.column("text").to_pylist()
