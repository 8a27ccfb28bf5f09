"""Hard-negative mining: from pairs of query and passage to rows of the published format with negatives.

The thresholds and their order are those of ``sentence_transformers.util.mine_hard_negatives``, and a test checks that
the negatives are the same. That function is not called, because it holds the embeddings of the whole corpus and the
candidates of all queries in memory, caches a corpus as a whole under the name of its base model, and has neither a
guard against translations nor counts. Texts are embedded by ``encode_query`` and ``encode_document`` of any
SentenceTransformer.

Two things differ. Scores equal to a limit are refused, as published (``< 0.8``), and a query's own text is never its
negative. Both this and the positives hold for every spelling: case, spacing, punctuation and Unicode composition do not
make another text.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from glob import escape
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from training.common.errors import UserError
from training.common.executor import Executor, Phase, run_phases
from training.common.outputs import check_output, clear_partials, locked, write_whole
from training.data.manifest import Source
from training.data.mining.corpus import SIDES, SourceRows, read_rows, write_mined
from training.data.mining.search import MiningOptions, Translations, choose_search, find_translations
from training.data.mining.tasks import Miner, MiningTasks
from training.data.storage import identity

logger = logging.getLogger(__name__)

MANIFEST, REPORT = "manifest.yaml", "mining.json"
_EMBEDDINGS = "embeddings"
# Increase it when the same input gives other negatives than before.
_FORMAT = 4
# Tasks of a remote executor without a number of workers.
_REMOTE_TASKS = 8


@dataclass(frozen=True)
class Resources:
    """Where and with what mining runs; it changes no negative."""

    cache: Path | None = None  # folder of cached embeddings; ``embeddings`` in the output folder if None
    max_corpus_in_memory: int = 500_000  # passages whose embeddings are in memory together
    search: str = "auto"  # faiss, torch or auto
    executor: Executor = field(default_factory=Executor)  # one worker if it is local without a number


def mine(
    sources: Sequence[Source],
    miner: Miner,
    output: Path | str,
    options: MiningOptions | None = None,
    *,
    bitext: Sequence[Source] = (),
    others: Sequence[Source] = (),
    half: bool = False,
    resources: Resources | None = None,
    manifest: Path | None = None,
) -> dict[str, Any]:
    """Mine the negatives of each source among its own passages.

    The output folder gets one parquet file per source, ``manifest.yaml`` and ``mining.json``. Sources that are finished
    with the same input and options are not mined again, and other sources in the folder stay. A killed run continues
    where it was.

    Args:
        sources: What to mine. Negatives that rows already have stay before the mined ones.
        miner: The model, from :func:`training.models.encoders.find_miner`.
        output: The folder to write.
        options: The thresholds; the published ones if None.
        bitext: Sources whose pairs are translations, which are never negatives of each other.
        others: Sources that are not mined, for the manifest of the output.
        half: Cache embeddings in 16 bits, which rounds scores.
        resources: Memory, cache and executor.
        manifest: The file that the sources were read from.

    Returns:
        The content of ``mining.json``.

    Raises:
        UserError: For faulty input, or if no row is left of any source; earlier results stay then.
        StoppedError: If a task failed.
    """
    options, resources = options or MiningOptions(), resources or Resources()
    options.check()
    reads = [file for source in (*sources, *bitext, *others) for file in source.files if isinstance(file, Path)]
    reads += [Path(miner.model), *([manifest] if manifest else [])]
    output = Path(output).resolve()
    check_output(output, reads)
    with locked(output):
        run = _Run(miner, output, options, half, resources, reads)
        # Checked before any work: a long run must not fail at its last source.
        rows = {source.name: _checked_rows(source, options) for source in run.unfinished(sources, bitext)}
        translations = find_translations(bitext) if rows else None
        for source in sources:
            if source.name in rows:
                run.mine(source, rows.pop(source.name), translations)
        return run.finish(sources, others)


def _checked_rows(source: Source, options: MiningOptions) -> SourceRows:
    rows = read_rows(source)
    passages = len(rows.ids["passage"])
    if passages < options.top:
        raise UserError(
            f"source {source.name!r}: its {passages} distinct passages are fewer than top {options.top}; "
            "lower --top or leave the source out of --sources"
        )
    return rows


class _Run:
    """One output folder and what has been mined into it."""

    def __init__(
        self, miner: Miner, output: Path, options: MiningOptions, half: bool, resources: Resources, reads: list[Path]
    ) -> None:
        if resources.max_corpus_in_memory < 1:
            raise UserError(f"max-corpus-in-memory must be at least 1, got {resources.max_corpus_in_memory}")
        self._miner, self._output, self._options, self._half = miner, output, options, half
        self._search, self._shard_texts = choose_search(resources.search), resources.max_corpus_in_memory
        executor = resources.executor
        # Each worker loads the model: one per core would not fit.
        workers = executor.workers or (1 if executor.name == "local" else None)
        self._executor, self._tasks = replace(executor, workers=workers), workers or _REMOTE_TASKS
        self._cache = Path(resources.cache or output / _EMBEDDINGS).resolve()
        check_output(self._cache, reads, option="--cache")
        self._report = self._read_report()
        check_output(output, ours=self._known_names())
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{output}: the folder cannot be written ({error.strerror}); give another") from None
        clear_partials(output)
        self._fingerprints: dict[str, str] = {}

    def _read_report(self) -> dict[str, Any]:
        path = self._output / REPORT
        if not path.exists():
            return {"sources": {}}
        try:
            # Sources of earlier runs stay.
            return {"sources": dict(json.loads(path.read_text())["sources"])}
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not a report of mining; move it or give another --output") from None

    def _known_names(self) -> list[str]:
        names = [_EMBEDDINGS, ".*"]
        if self._cache.is_relative_to(self._output):
            names.append(escape(self._cache.relative_to(self._output).parts[0]))
        if (self._output / REPORT).exists():
            names += [MANIFEST, REPORT, *(escape(f"{name}.parquet") for name in self._report["sources"])]
        return names

    def unfinished(self, sources: Sequence[Source], bitext: Sequence[Source]) -> list[Source]:
        """Return the sources that are not mined yet with the same input and options."""
        settings = [_FORMAT, self._miner.made_by(), asdict(self._options), self._half]
        guard = [self._described(source) for source in bitext]
        for source in sources:
            made_by = json.dumps([*settings, guard, self._described(source)], sort_keys=True, default=str)
            self._fingerprints[source.name] = blake2b(made_by.encode(), digest_size=16).hexdigest()
        return [source for source in sources if not self._is_finished(source)]

    def _described(self, source: Source) -> dict[str, Any]:
        # A file keeps its identity when its folder moves.
        return {**asdict(source), "files": [identity(file, self._cache / ".hashes") for file in source.files]}

    def _is_finished(self, source: Source) -> bool:
        entry = self._report["sources"].get(source.name, {})
        same = entry.get("fingerprint") == self._fingerprints[source.name]
        return same and (not entry["kept"] or self._file(source).is_file())

    def _file(self, source: Source) -> Path:
        return self._output / f"{source.name}.parquet"

    def mine(self, source: Source, rows: SourceRows, translations: Translations) -> None:
        """Mine one source and report it."""
        started = time.monotonic()
        model = Path(self._miner.model)
        tasks = MiningTasks(
            name=source.name,
            folder=self._work_folder(source),
            cache=self._cache,
            # Workers may run in another folder.
            miner=replace(self._miner, model=str(model.resolve())) if model.is_dir() else self._miner,
            instruction=source.instruction if self._options.instructions else None,
            options=self._options,
            # Positives are among the nearest, as in mine_hard_negatives.
            window=self._options.top + int(np.bincount(rows.numbers["query"]).max()),
            shard_texts=self._shard_texts,
            search=self._search,
            half=self._half,
            tasks=self._tasks,
        )
        for side in SIDES:
            # Fails now if the cache cannot be written.
            tasks.embedding_cache(side)
        if not (tasks.folder / "ready").exists():
            tasks.lay_out(source, rows, translations)
        self._run_tasks(tasks)
        counts = write_mined(
            source,
            self._file(source),
            rows.numbers["query"],
            tasks.negatives(),
            tasks.texts("passage"),
            keep_short=self._options.keep_short,
            replace=self._options.replace,
        )
        query, passage = (tasks.load(f"{side}_form")[rows.numbers[side]] for side in SIDES)
        same = int((query == passage).sum())
        if same:
            logger.warning(
                "%s: in %d of %d rows query and passage are spellings of one text", source.name, same, counts["rows"]
            )
        seconds = round(time.monotonic() - started, 3)
        self._report["sources"][source.name] = {
            **counts,
            "query_is_passage": same,
            **tasks.counts(),
            "seconds": seconds,
            "model": self._miner.model,
            "revision": self._miner.revision,
            "options": asdict(self._options),
            "fingerprint": self._fingerprints[source.name],
            "manifest": _entry(source, self._file(source).name),
        }
        write_whole(self._output / REPORT, json.dumps(self._report, indent=2) + "\n")
        shutil.rmtree(tasks.folder)
        logger.info("%s: %d of %d rows kept, in %.0f s", source.name, counts["kept"], counts["rows"], seconds)

    def _work_folder(self, source: Source) -> Path:
        """Return the folder of a run with exactly this input, and remove those of other runs of the source."""
        parent = self._output / ".work" / source.name
        folder = parent / self._fingerprints[source.name]
        for other in parent.glob("*"):
            if other != folder:
                shutil.rmtree(other)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _run_tasks(self, tasks: MiningTasks) -> None:
        # Phases are named after the number of tasks: task 0 of 2 is not task 0 of 3.
        logs = tasks.folder / "tasks"
        embed = Phase(f"embed-{tasks.tasks}", tasks.embed, tasks.tasks)
        run_phases([embed], logs, self._executor)
        if not tasks.is_embedded():
            # The cache was emptied after a stopped run had recorded these tasks as done.
            shutil.rmtree(logs / embed.name)
            run_phases([embed], logs, self._executor)
        count = min(tasks.tasks, tasks.blocks)
        search = replace(tasks, tasks=count)
        run_phases([Phase(f"search-{count}", search.search_blocks, count)], logs, self._executor)

    def finish(self, sources: Sequence[Source], others: Sequence[Source]) -> dict[str, Any]:
        """Write the manifest of all mined sources with rows and of the sources that were not mined."""
        report = self._report["sources"]
        empty = [source for source in sources if not report[source.name]["kept"]]
        for source in empty:
            logger.warning("%s: no row has %d negatives", source.name, self._options.negatives)
        if len(empty) == len(sources):
            raise UserError(
                f"no row of any source has {self._options.negatives} negatives (see {self._output / REPORT} for what "
                "refused them); raise --top, loosen the thresholds, lower --negatives or add --keep-short"
            )
        for source in empty:
            # The file of an earlier run, which is replaced only now that there are other results.
            self._file(source).unlink(missing_ok=True)
        entries = [entry["manifest"] for entry in report.values() if entry["kept"]]
        entries += [
            _entry(source, *(os.path.relpath(Path(file).resolve(), self._output) for file in source.files))
            for source in others
            if source.name not in report
        ]
        text = yaml.safe_dump({"sources": entries}, sort_keys=False, allow_unicode=True, width=119)
        (self._output / MANIFEST).write_text(text, encoding="utf-8")
        shutil.rmtree(self._output / ".work", ignore_errors=True)
        return self._report


def _entry(source: Source, *files: str) -> dict[str, Any]:
    """Return a source as an entry of a manifest."""
    described = {**asdict(source), "files": [escape(file) for file in files]}
    return {key: value for key, value in described.items() if value is not None and value != []}
