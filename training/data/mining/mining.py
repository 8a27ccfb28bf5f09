"""Hard-negative mining: from pairs of query and passage to rows of the published format with negatives.

The thresholds and their order are those of ``sentence_transformers.util.mine_hard_negatives``, and a test checks that
the negatives are the same. That function is not called, because it holds the embeddings of the whole corpus and the
candidates of all queries in memory and has neither a guard against translations nor counts.

Two things differ. Scores equal to a limit are refused, as published (``< 0.8``), and a query's own text is never its
negative. Both this and the positives hold for every spelling: case, spacing, punctuation and Unicode composition do not
make another text.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.common.errors import UserError
from training.common.executor import Executor, Phase, run_phases
from training.common.outputs import check_output, clear_partials, locked, write_whole
from training.data.cleaning.normalise import normalise
from training.data.manifest import MANIFEST, Source, write_manifest
from training.data.mining.corpus import SIDES, Numbered, TextStore, numbered, read_ids, text_ids
from training.data.mining.search import MiningOptions, Translations, choose_search
from training.data.mining.tasks import MiningTasks
from training.data.published import PublishedFile, rows_table, write_parquet
from training.data.storage import identity

logger = logging.getLogger(__name__)

REPORT = "mining.json"
_EMBEDDINGS, _WORK = "embeddings", ".work"
# Increase it when the same input gives other negatives than before.
_FORMAT = 4
_BATCH_ROWS = 8192
# Tasks of a remote executor without a number of workers.
_REMOTE_TASKS = 8


@dataclass(frozen=True)
class Resources:
    """Where and with what mining runs; it changes no negative."""

    cache: Path | None = None  # folder of cached embeddings; ``embeddings`` in the output folder if None
    max_corpus_in_memory: int = 500_000  # passages whose embeddings are in memory together
    search: str = "auto"  # faiss, torch or auto
    executor: Executor = field(default_factory=Executor)  # one worker if it is local without a number

    def __post_init__(self) -> None:
        if self.max_corpus_in_memory < 1:
            raise UserError(f"max-corpus-in-memory must be at least 1, got {self.max_corpus_in_memory}")


def mine(
    sources: Sequence[Source],
    miner: Any,
    output: Path | str,
    options: MiningOptions | None = None,
    *,
    bitext: Sequence[Source] = (),
    others: Sequence[Source] = (),
    resources: Resources | None = None,
    manifest: Path | None = None,
) -> dict[str, Any]:
    """Mine the negatives of each source among its own passages, and return the content of ``mining.json``.

    The output folder gets one parquet file per source, ``manifest.yaml`` and ``mining.json``. Sources that are finished
    with the same input and options are not mined again, and other sources in the folder stay. A killed run continues
    where it was. If no row is left of any source, earlier results stay.

    Args:
        sources: What to mine. Negatives that rows already have stay before the mined ones.
        miner: The model, from :func:`training.models.encoders.find_miner`.
        output: The folder to write.
        options: The thresholds; the published ones if None.
        bitext: Sources whose pairs are translations, which are never negatives of each other.
        others: Sources that are not mined, for the manifest of the output.
        resources: Memory, cache and executor.
        manifest: The file that the sources were read from.
    """
    reads = [file for source in (*sources, *bitext, *others) for file in source.files if isinstance(file, Path)]
    reads += [Path(miner.model), *([manifest] if manifest else [])]
    output = Path(output).resolve()
    check_output(output, reads)
    with locked(output):
        run = _Run(miner, output, options or MiningOptions(), resources or Resources(), reads)
        # Checked before any work: a long run must not fail at its last source.
        rows = {source.name: run.read(source) for source in run.unfinished(sources, bitext)}
        translations = Translations(bitext if rows else [])
        for source in sources:
            if source.name in rows:
                run.mine(source, rows.pop(source.name), translations)
        return run.finish(sources, others)


class _Run:
    """One output folder and what has been mined into it."""

    def __init__(
        self, miner: Any, output: Path, options: MiningOptions, resources: Resources, reads: list[Path]
    ) -> None:
        self._miner, self._output, self._options, self._resources = miner, output, options, resources
        self._search, self._report_path = choose_search(resources.search), output / REPORT
        self._cache = Path(resources.cache or output / _EMBEDDINGS).resolve()
        check_output(self._cache, reads, option="--cache")
        self._report: dict[str, Any] = {}
        if self._report_path.exists():
            try:
                # Sources of earlier runs stay.
                self._report = dict(json.loads(self._report_path.read_text())["sources"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self._report_path}: not a report of mining; give another --output") from None
        elif not (output / _WORK).exists():
            check_output(output, ours=[_EMBEDDINGS, ".*"])
        output.mkdir(exist_ok=True)
        clear_partials(output)
        self._fingerprints: dict[str, str] = {}

    def unfinished(self, sources: Sequence[Source], bitext: Sequence[Source]) -> list[Source]:
        """Return the sources that are not mined yet with the same input and options."""
        settings = [_FORMAT, self._miner.made_by(), asdict(self._options), [self._described(each) for each in bitext]]
        left = []
        for source in sources:
            made_by = json.dumps([*settings, self._described(source)], sort_keys=True, default=str)
            fingerprint = blake2b(made_by.encode(), digest_size=16).hexdigest()
            self._fingerprints[source.name] = fingerprint
            entry = self._report.get(source.name, {"fingerprint": None})
            if entry["fingerprint"] != fingerprint or (entry["kept"] and not self._file(source).is_file()):
                left.append(source)
        return left

    def _described(self, source: Source) -> dict[str, Any]:
        # A file keeps its identity when its folder moves.
        return {**asdict(source), "files": [identity(file, self._cache / ".hashes") for file in source.files]}

    def _file(self, source: Source) -> Path:
        return self._output / f"{source.name}.parquet"

    def read(self, source: Source) -> dict[str, Numbered]:
        """Read and check a source; only ids of its texts are held in memory."""
        rows = {side: numbered(ids) for side, ids in read_ids(source.files, text_ids).items()}
        passages = len(rows["passage"].ids)
        if passages < self._options.top:
            raise UserError(
                f"source {source.name!r}: its {passages} distinct passages are fewer than top {self._options.top}; "
                "lower --top or leave the source out of --sources"
            )
        return rows

    def mine(self, source: Source, rows: Mapping[str, Numbered], translations: Translations) -> None:
        """Mine one source and report it."""
        options, executor, model = self._options, self._resources.executor, Path(self._miner.model)
        # Each worker loads the model: one per core would not fit.
        workers = executor.workers or (1 if executor.name == "local" else None)
        tasks = MiningTasks(
            name=source.name,
            folder=self._output / _WORK / source.name / self._fingerprints[source.name],
            cache=self._cache,
            # Workers may run in another folder.
            miner=replace(self._miner, model=str(model.resolve())) if model.is_dir() else self._miner,
            instruction=source.instruction if options.instruction else None,
            options=options,
            # Positives are among the nearest, as in mine_hard_negatives.
            window=options.top + int(np.bincount(rows["query"].numbers).max()),
            shard_texts=self._resources.max_corpus_in_memory,
            search=self._search,
            tasks=workers or _REMOTE_TASKS,
        )
        tasks.lay_out(source, rows, translations)
        texts = tasks.count_texts()
        _run_tasks(tasks, replace(executor, workers=workers))
        negatives, refused = tasks.results()
        counts = _write_mined(
            source, self._file(source), rows["query"].numbers, negatives, tasks.texts("passage"), options
        )
        self._report[source.name] = {
            **counts,
            "texts": texts,
            "refused": refused,
            "model": self._miner.model,
            "revision": self._miner.revision,
            "options": asdict(options),
            "fingerprint": self._fingerprints[source.name],
            "manifest": {**asdict(source), "files": [self._file(source).name]},
        }
        write_whole(self._report_path, json.dumps({"sources": self._report}, indent=2) + "\n")
        shutil.rmtree(tasks.folder)
        logger.info("%s: %d of %d rows kept", source.name, counts["kept"], counts["rows"])

    def finish(self, sources: Sequence[Source], others: Sequence[Source]) -> dict[str, Any]:
        """Write the manifest of all mined sources with rows and of the sources that were not mined."""
        least = self._options.negatives
        empty = [source for source in sources if not self._report[source.name]["kept"]]
        if len(empty) == len(sources):
            raise UserError(
                f"no row of any source has {least} negatives (see {self._report_path} for what refused them); "
                "raise --top, loosen the thresholds, lower --negatives or add --keep-short"
            )
        for source in empty:
            logger.warning("%s: no row has %d negatives", source.name, least)
            # The file of an earlier run, which is replaced only now that there are other results.
            self._file(source).unlink(missing_ok=True)
        entries = [entry["manifest"] for entry in self._report.values() if entry["kept"]]
        for source in others:
            if source.name not in self._report:
                files = [os.path.relpath(Path(file).resolve(), self._output) for file in source.files]
                entries.append({**asdict(source), "files": files})
        write_manifest(self._output / MANIFEST, entries)
        shutil.rmtree(self._output / _WORK, ignore_errors=True)
        return {"sources": self._report}


def _run_tasks(tasks: MiningTasks, executor: Executor) -> None:
    # Phases are named after the number of tasks: task 0 of 2 is not task 0 of 3.
    logs = tasks.folder / "tasks"
    embed = Phase(f"embed-{tasks.tasks}", tasks.embed, tasks.tasks)
    run_phases([embed], logs, executor)
    if tasks.count_texts()["embedded"]:
        # The cache was emptied after a stopped run had recorded these tasks as done.
        shutil.rmtree(logs / embed.name)
        run_phases([embed], logs, executor)
    count = min(tasks.tasks, tasks.blocks)
    search = replace(tasks, tasks=count)
    run_phases([Phase(f"search-{count}", search.search_blocks, count)], logs, executor)


# Mined rows


def _write_mined(
    source: Source,
    path: Path,
    numbers: NDArray[np.int64],
    mined: NDArray[np.int64],
    passages: TextStore,
    options: MiningOptions,
) -> dict[str, int]:
    """Write a source with its mined negatives, in the order of its rows and with all its other columns.

    ``numbers`` ``(rows,)`` are those of the rows' queries, and ``mined`` ``(queries, negatives)`` those of passages, -1
    where there are too few. Returns the rows read, kept and dropped; without rows, no file is written.
    """
    files = [PublishedFile(file) for file in source.files]
    others: dict[str, pa.DataType] = {}
    for file in files:
        known = {*SIDES, *file.negatives, *others}
        others |= {field.name: field.type for field in file.schema if field.name not in known}
    rows = kept_rows = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal rows, kept_rows
        for file in files:
            names = [] if options.replace else file.negatives
            for batch in file.record_batches(_BATCH_ROWS, all_columns=True):
                texts = passages.take(mined[numbers[rows : rows + len(batch)]])
                own = batch.select(names).to_pylist()
                negatives = [_fill(row.values(), more) for row, more in zip(own, texts, strict=True)]
                kept = [row for row, each in enumerate(negatives) if options.keep_short or each[-1] is not None]
                rows, kept_rows = rows + len(batch), kept_rows + len(kept)
                if not kept:
                    continue
                columns = list(zip(*(negatives[row] for row in kept), strict=True))
                batch = batch.take(pa.array(kept))
                table = rows_table(*(batch.column(side).to_pylist() for side in SIDES), columns)
                for name, kind in others.items():
                    there = name in batch.schema.names
                    column = batch.column(name).cast(kind) if there else pa.nulls(len(batch), kind)
                    table = table.append_column(name, column)
                yield table

    found = tables()
    first = next(found, None)
    if first is not None:
        write_parquet(path, chain([first], found))
    return {"rows": rows, "kept": kept_rows, "dropped": rows - kept_rows}


def _fill(own: Iterable[str | None], mined: NDArray[np.object_]) -> list[str | None]:
    """Return a row's own negatives, then mined ones that are not spellings of them, then None."""
    texts = dict.fromkeys(text for text in own if text is not None)
    forms = set(map(normalise, texts))
    texts |= dict.fromkeys(text for text in mined if text is not None and not (forms and normalise(text) in forms))
    return [*texts, *[None] * len(mined)][: len(mined)]
