"""Phases 2 to 5: choose validation rows, tokenise distinct texts, replace hashes by positions, write the result."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tokenizers import Tokenizer

from training.common.errors import UserError
from training.common.keyed import text_key
from training.common.outputs import write_checksums
from training.data.cleaning.normalise import normalise
from training.data.instructions import without_instruction, without_prompts
from training.data.preparation.plan import PreparationPlan
from training.data.preparation.reading import MISSING, read_partition
from training.data.prepared import (
    DESCRIPTION,
    FORMS,
    OFFSETS,
    QUARANTINE,
    SCORES,
    SPLITS,
    TEXT_OFFSETS,
    TEXTS,
    TOKENS,
)

# Raise it when a source would be prepared to other bytes than before.
FORMAT = 4
# Up to so many rows, all draws are looked at; else one in so many rows may be missing before more draws are.
_LEAST_ROWS, _TOLERANCE = 1 << 20, 1000
_TEXTS_PER_CALL = 1024
# Cells located at a time.
_BLOCK_CELLS = 4_000_000
_COPY_BYTES = 16 << 20


def choose_validation(plan: PreparationPlan, _: int = 0) -> None:
    """Write the draws of the queries that are held out.

    A query is held out with all its rows (a split by rows would leak), by a draw of its text alone. Queries are taken
    by ascending draw; one with more rows than are still wanted is skipped. In a source of more than a million rows, a
    thousandth of the number may be missing: memory depends on the share rather than on the rows.
    """
    if plan.source.task_type == "similarity":
        _check_scores(plan)
    shards, share = plan.files("draws"), plan.options.validation_share
    rows = sum(path.stat().st_size for path in shards) // 8
    wanted = round(share * rows) if share == 1 else min(round(share * rows), max(rows - 1, 0))
    looked_at = max(2 * share, _LEAST_ROWS / max(rows, 1))
    while True:
        highest = np.uint64(looked_at * 2.0**64) if looked_at < 1 else np.uint64(2**64 - 1)
        low = [draws[draws <= highest] for draws in (np.fromfile(path, dtype="<u8") for path in shards)]
        draws, counts = np.unique(np.concatenate(low), return_counts=True)
        taken = _take(counts, wanted)
        if looked_at >= 1 or wanted - counts[taken].sum() <= wanted // _TOLERANCE:
            break
        looked_at *= 4
    draws[taken].astype("<u8").tofile(plan.file("held_out"))


def _check_scores(plan: PreparationPlan) -> None:
    """Refuse scores that order nothing."""
    scores = [part for part in (np.fromfile(path, dtype="<f4") for path in plan.files("scores")) if len(part)]
    if scores and min(part.min() for part in scores) == max(part.max() for part in scores):
        what = f"source {plan.source.name!r}: all its rows have the score {scores[0][0]:g}, which teaches nothing"
        raise UserError(f"{what}; correct column 'score', or leave the source out")


def _take(counts: np.ndarray, wanted: int) -> np.ndarray:
    """Mask of the groups that are taken, in order, as long as their ``(n,)`` numbers of rows fit."""
    taken, ends, start = np.zeros(len(counts), dtype=bool), np.cumsum(counts), 0
    while wanted > 0 and start < len(counts):
        before = ends[start] - counts[start]
        # Groups from start to stop fit, the one at stop does not.
        stop = int(np.searchsorted(ends, before + wanted, side="right"))
        taken[start:stop] = True
        wanted -= int(counts[start:stop].sum())
        start = stop + 1
    return taken


# A process has many partitions. Making a tokenizer of 150,000 tokens takes as long as a third of one of them, and what
# it has cached (4 MB with tokenizers 0.23) stays when it is dropped.
_tokenizer = lru_cache(maxsize=1)(Tokenizer.from_str)


def tokenise_partition(plan: PreparationPlan, partition: int) -> None:
    """Write hashes, lengths and tokens of a partition's distinct texts, in the order of their hashes."""
    known: dict[int, str] = {}
    for hashes, texts in read_partition(plan.files("runs"), partition):
        for key, text in zip(hashes.tolist(), texts, strict=True):
            if known.setdefault(key, text) != text:
                both = f"{text[:50]!r}, {known[key][:50]!r}"
                what = f"source {plan.source.name!r}: two texts have one 64-bit hash ({both})"
                raise UserError(f"{what}; prepare it with another seed")
    order = sorted(known)
    texts = [known[key] for key in order]
    tokenizer = _tokenizer(plan.file("tokenizer").read_text())
    # Truncation happens before the post-processor and leaves room for the EOS that it appends.
    tokenizer.enable_truncation(plan.options.max_length)
    lengths = np.zeros(len(texts), dtype="<i4")
    with plan.file("tokens", partition).open("wb") as file:
        for start in range(0, len(texts), _TEXTS_PER_CALL):
            ids = [each.ids for each in tokenizer.encode_batch_fast(texts[start : start + _TEXTS_PER_CALL])]
            lengths[start : start + len(ids)] = [len(each) for each in ids]
            file.write(np.fromiter(chain.from_iterable(ids), dtype="<i4").tobytes())
    lengths.tofile(plan.file("lengths", partition))
    if plan.options.keep_texts:
        with plan.file("utf8", partition).open("wb") as file:
            lengths = np.fromiter((file.write(text.encode()) for text in texts), "<i4", len(texts))
        lengths.tofile(plan.file("utf8_lengths", partition))
    if plan.keeps_forms:
        # Of the text alone: an instruction does not change what it says.
        prompts = (plan.prompt or "", plan.document_prompt)
        alone = (without_instruction(without_prompts(text, prompts)) for text in texts)
        forms = np.fromiter(map(text_key, map(normalise, alone)), "<u8", len(texts))
        forms.tofile(plan.file("forms", partition))
    np.array(order, dtype="<u8").tofile(plan.file("hashes", partition))


def join_hashes(plan: PreparationPlan, _: int = 0) -> None:
    """Write the hashes of all partitions, which are neighbouring ranges, to one file; join texts of one document."""
    _concatenate(plan.files("hashes"), plan.file("sorted_hashes"))
    if plan.has_ids:
        _join_documents(plan)
    # Most of the work's bytes, which nothing reads from here on.
    for folder in plan.files("runs"):
        shutil.rmtree(folder)


def _join_documents(plan: PreparationPlan) -> None:
    """Write the forms of all texts, the same one for texts of one document id and for all that these share."""
    forms = np.concatenate([np.fromfile(path, dtype="<u8") for path in plan.files("forms")])
    pairs = np.concatenate([np.fromfile(path, dtype="<u8").reshape(-1, 2) for path in plan.files("ids")])
    numbers, of_text = np.unique(forms, return_inverse=True)
    ids, of_id = np.unique(pairs[:, 1], return_inverse=True)
    texts = np.searchsorted(np.memmap(plan.file("sorted_hashes"), "<u8", "r"), pairs[:, 0])
    ends, size = (of_text[texts], len(numbers) + of_id), len(numbers) + len(ids)
    graph = coo_array((np.ones(len(pairs)), ends), shape=(size, size))
    component = connected_components(graph, directed=False)[1][: len(numbers)]
    # The numbers ascend: the first of a component is its least.
    _, first, of_number = np.unique(component, return_index=True, return_inverse=True)
    numbers[first][of_number][of_text].astype("<u8").tofile(plan.file("documents"))


def place_shard(plan: PreparationPlan, number: int) -> None:
    """Write the rows of a shard as positions of texts, -1 for a missing document, each to its split."""
    width = plan.width
    block = max(1, _BLOCK_CELLS // width)
    held_out = np.fromfile(plan.file("held_out"), dtype="<u8")
    with ExitStack() as stack:
        train, validation = (stack.enter_context(plan.file(split, number).open("wb")) for split in SPLITS)
        draws_file, rows_file, scores_file = (
            stack.enter_context(plan.file(kind, number).open("rb")) for kind in ("draws", "rows", "scores")
        )
        scored = [stack.enter_context(plan.file(f"{split}_scores", number).open("wb")) for split in SPLITS]
        while len(draws := np.fromfile(draws_file, dtype="<u8", count=block)):
            hashes = np.fromfile(rows_file, dtype="<u8", count=len(draws) * width)
            # Sought in order, the pages of the file are read once.
            order, positions = np.argsort(hashes), np.empty(len(hashes), dtype="<i4")
            positions[order] = np.searchsorted(np.memmap(plan.file("sorted_hashes"), "<u8", "r"), hashes[order])
            positions[hashes == MISSING] = -1
            positions, aside = positions.reshape(-1, width), np.isin(draws, held_out)
            train.write(positions[~aside].tobytes())
            validation.write(positions[aside].tobytes())
            if plan.scores:
                scores = np.fromfile(scores_file, dtype="<f4", count=len(draws) * plan.scores).reshape(len(draws), -1)
                for file, chosen in zip(scored, (~aside, aside), strict=True):
                    file.write(scores[chosen].tobytes())


def assemble(plan: PreparationPlan, folder: Path, fingerprint: str) -> None:
    """Write the prepared source into an empty folder, its description last."""
    source, options, width = plan.source, plan.options, plan.width
    tokens = _concatenate(plan.files("tokens"), folder / TOKENS) // 4
    texts, kept = _write_offsets(plan.files("lengths"), folder / OFFSETS), {}
    if options.keep_texts:
        kept["text_bytes"] = _concatenate(plan.files("utf8"), folder / TEXTS)
        _write_offsets(plan.files("utf8_lengths"), folder / TEXT_OFFSETS)
    if plan.keeps_forms:
        kept["forms"] = _concatenate(plan.files("documents") or plan.files("forms"), folder / FORMS) // 8
    if plan.has_ids:
        kept["document_ids"] = True
    if plan.has_document_scores:
        kept["document_scores"] = True
    if plan.positives > 1:
        kept["positives"] = plan.positives
    rows = {split: _concatenate(plan.files(split), folder / name) // (4 * width) for split, name in SPLITS.items()}
    for split, name in SCORES.items() if plan.scores else ():
        _concatenate(plan.files(f"{split}_scores"), folder / name)
    for path in sorted(folder.iterdir()):
        write_checksums(path)
    description = {
        "format": FORMAT,
        "name": source.name,
        "task_type": source.task_type,
        "symmetric": source.symmetric,
        "instruction": source.instruction if options.instructions else None,
        **({} if plan.prompt is None else {"prompt": plan.prompt}),
        **({"document_prompt": plan.document_prompt} if plan.document_prompt else {}),
        "languages": source.languages,
        "negatives": plan.negatives,
        "texts": texts,
        "tokens": tokens,
        "end_token": _tokenizer(plan.file("tokenizer").read_text()).encode("").ids[-1],
        **kept,
        # Rows of the files, including those over the cap and bad ones.
        "read": sum(shard.rows for shard in plan.shards),
        "rows": rows,
        "query_is_passage": sum(int(path.read_text()) for path in plan.files("same")),
        "quarantined": _join_bad_rows(plan.files("quarantine"), folder / QUARANTINE),
        "fingerprint": fingerprint,
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2))


def _concatenate(parts: Iterable[Path], whole: Path) -> int:
    """Copy files into one and return its bytes."""
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file, _COPY_BYTES)
        return file.tell()


def _write_offsets(parts: Iterable[Path], path: Path) -> int:
    """Write where each text starts and where the last one ends; return the number of texts."""
    end = np.zeros(1, dtype="<i8")
    with path.open("wb") as file:
        file.write(end.tobytes())
        for part in parts:
            ends = np.cumsum(np.append(end, np.fromfile(part, dtype="<i4")), dtype="<i8")
            file.write(ends[1:].tobytes())
            end = ends[-1:]
        return file.tell() // 8 - 1


def _join_bad_rows(parts: Sequence[Path], path: Path) -> dict[str, int]:
    """Write the bad rows of all shards to one file, if there are any; return their number by reason."""
    if not parts:
        return {}
    empty = pa.unify_schemas([pq.read_schema(part) for part in parts]).empty_table()
    reasons: Counter[str] = Counter()
    with pq.ParquetWriter(path, empty.schema, compression="zstd") as writer:
        for part in parts:
            # In batches: there may be as many bad rows as good ones. A file with fewer negatives lacks columns.
            for batch in pq.ParquetFile(part).iter_batches(1024):
                writer.write_table(pa.concat_tables([empty, pa.table(batch)], promote_options="default"))
                reasons.update(batch.column("reason").to_pylist())
    return dict(sorted(reasons.items()))
