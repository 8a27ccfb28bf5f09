"""Phase 1: replace the texts of rows by hashes, and write the distinct texts to disk, sorted into partitions by hash.

A text's hash is 64 bits of XXH3. Two texts of one hash are refused when they are tokenised.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
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
    scores_of,
    text_column,
)

# The hash of a missing negative, and of no text.
MISSING = np.uint64(np.iinfo(np.uint64).max)
_NO_TEXT = bytes(16)
_BATCH_ROWS = 2048
# Characters of distinct texts that are held in memory before they are written.
_RUN_CHARACTERS = 24_000_000
_RUN_SCHEMA = pa.schema({"hash": pa.uint64(), "text": pa.large_string()})


def read_shard(plan: PreparationPlan, number: int) -> None:
    """Read a shard and write the hashes of its rows, its distinct texts and its bad rows."""
    shard = plan.shards[number]
    source = plan.source
    file = PublishedFile(source.files[shard.file], 0, source.task_type, plan.options.document_scores)
    own = (shard.skipped, shard.skipped + shard.rows)
    runs, quarantine = plan.file("runs", number), None
    # A killed task may have left these.
    plan.file("quarantine", number).unlink(missing_ok=True)
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir()
    texts: dict[bytes, str] = {}
    offset = same = characters = 0
    with ExitStack() as stack:
        kinds = ("rows", "draws", "ids", "scores")
        rows_file, draws_file, ids_file, scores_file = (
            stack.enter_context(plan.file(kind, number).open("wb")) for kind in kinds
        )
        for batch in file.record_batches(_BATCH_ROWS, shard.row_groups, rows=own):
            good = np.ones(len(batch), dtype=bool)
            if faults := find_faults(batch, plan.required_negatives, plan.source.task_type):
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
            rows, found = _hash_batch(plan, batch, file)
            rows_file.write(rows.astype("<u8").tobytes())
            if plan.scores:
                scores_file.write(_scores(plan, batch, file).astype("<f4").tobytes())
            if file.ids:
                ids_file.write(_hash_ids(plan, batch, file, rows).astype("<u8").tobytes())
            # An instruction in a query does not change its draw.
            queries = map(without_instruction, text_column(batch, "query").to_pylist())
            keys = np.array([xxh3_64_intdigest(query.encode()) for query in queries], dtype=np.uint64)
            draws_file.write(keyed_bits(plan.options.seed, SPLIT, keys).astype("<u8").tobytes())
            characters += sum(len(text) for digest, text in found.items() if digest not in texts)
            texts |= found
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
        if faults[0].column == "negative_*":
            remedy = f"mine more, train it with those it has by a lower min_hard_negatives, {remedy}"
        raise bad_row(file.path, first_row, faults[0], remedy)
    firsts = {fault.row: fault for fault in reversed(faults)}
    rows = sorted(firsts)
    columns = {"file": [file.path.name] * len(rows), "row": [first_row + row for row in rows]}
    columns |= {name: [getattr(firsts[row], name) for row in rows] for name in ("column", "reason")}
    for name in batch.schema.names:
        # Bytes may be invalid UTF-8.
        values = text_column(batch, name).take(pa.array(rows)).view(pa.large_binary()).to_pylist()
        texts = [None if value is None else value.decode(errors="replace") for value in values]
        columns[name] = pa.array(texts, type=pa.large_string())
    return pa.table(columns)


def _places(plan: PreparationPlan, file: PublishedFile) -> dict[str, int]:
    """Return where the texts of a file's columns are in a row: query, passage, negatives, further positives."""
    further = 2 + plan.negatives
    places = {name: 2 + number for number, name in enumerate(file.negatives)}
    places |= {name: further + number for number, name in enumerate(file.positives[1:])}
    return {"query": 0, "passage": 1, **places}


def _scores(plan: PreparationPlan, batch: pa.RecordBatch, file: PublishedFile) -> np.ndarray:
    """Return the score of each row, or the ``(rows, width - 1)`` of its documents, NaN where one is not known."""
    if plan.source.task_type == "similarity":
        return scores_of(batch)
    places, scores = _places(plan, file), np.full((len(batch), plan.scores), np.nan, dtype=np.float32)
    for name in file.scores:
        scores[:, places[name.removesuffix("_score")] - 1] = scores_of(batch, name)
    scores[~np.isfinite(scores)] = np.nan
    return scores


def _hash_ids(plan: PreparationPlan, batch: pa.RecordBatch, file: PublishedFile, rows: np.ndarray) -> np.ndarray:
    """Return ``(n, 2)`` hashes of documents' texts and of their ids, each pair once."""
    pairs = [np.empty((0, 2), dtype=np.uint64)]
    for name, place in _places(plan, file).items():
        if f"{name}_id" in file.ids:
            ids = text_column(batch, f"{name}_id").to_pylist()
            keys = np.array([xxh3_64_intdigest((each or "").encode()) for each in ids], dtype=np.uint64)
            there = np.array([each is not None for each in ids], dtype=bool) & (rows[:, place] != MISSING)
            pairs.append(np.stack([rows[there, place], keys[there]], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def _hash_batch(
    plan: PreparationPlan, batch: pa.RecordBatch, file: PublishedFile
) -> tuple[np.ndarray, dict[bytes, str]]:
    """Return ``(rows, width)`` hashes of texts as the model reads them, and the distinct texts by digest."""
    source, options, texts = plan.source, plan.options, {}
    places, prompt, document_prompt = _places(plan, file), plan.prompt or "", plan.document_prompt
    # Of the documents, under the instruction of their row's query. It is drawn per text: each has one form.
    share = options.document_instruction_share if source.symmetric and options.instructions else 0.0
    key = (options.seed, DOCUMENT_INSTRUCTION, text_key(source.name))

    @cache
    def digest_of(text: str, instruction: str | None, is_query: bool = False) -> bytes:
        # An instruction in the published file is neither added twice nor part of raw text.
        if not options.instructions:
            text = without_instruction(text)
        elif is_query or (share and keyed_uniform(*key, text_key(text)) < share):
            text = with_instruction(instruction, text, prompt)
        else:
            text = document_prompt + text
        digest = xxh3_128_digest(text.encode(), seed=options.seed)
        texts[digest] = text
        return digest

    columns = [text_column(batch, name).to_pylist() for name in places]
    digests: list[bytes] = []
    for query, *documents in zip(*columns, strict=True):
        own = (split_instruction(query)[0] if share else None) or source.instruction
        digests.append(digest_of(query, source.instruction, True))
        digests += [_NO_TEXT if text is None else digest_of(text, own) for text in documents]
    # One call for all: a call for each text would take as long as the rest.
    hashes = hashes_of(digests).reshape(len(batch), len(columns))
    hashes[np.array([[text is None for text in column] for column in columns], dtype=bool).T] = MISSING
    rows = np.full((len(batch), plan.width), MISSING, dtype=np.uint64)
    rows[:, [*places.values()]] = hashes
    return rows, texts


def hashes_of(digests: Iterable[bytes]) -> np.ndarray:
    """Return ``(n,)`` 64-bit hashes of ``n`` digests, none of them ``MISSING``."""
    hashes = np.frombuffer(b"".join(digests), dtype="<u8")[::2].astype(np.uint64)
    return np.minimum(hashes, MISSING - np.uint64(1))


def _write_run(folder: Path, texts: Mapping[bytes, str], partitions: int) -> None:
    """Write distinct texts with their hashes as an Arrow file of one record batch per partition."""
    hashes, values = hashes_of(texts), pa.array(texts.values(), type=pa.large_string())
    order = np.argsort(hashes)
    table = pa.record_batch([pa.array(hashes[order]), values.take(pa.array(order))], schema=_RUN_SCHEMA)
    # A partition is a range of hashes, by their highest bits.
    starts = [number * (2**64 // partitions) for number in range(partitions)]
    ends = [*np.searchsorted(hashes[order], np.array(starts, dtype=np.uint64)).tolist(), len(hashes)]
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
