"""Hard-negative mining: from pairs of query and passage to rows of the published format with their negatives.

The thresholds are those of ``sentence_transformers.util.mine_hard_negatives``, in its order, and the negatives are the
ones it chooses (a test holds this to it). It is not called here, because it holds the embeddings of the whole corpus
and the candidates of all queries in memory, caches a corpus as a whole (one text more, and all is embedded again) under
nothing but the name of the base model, and has no place for a guard or for counts. What is kept of it is the embedding:
``encode_query`` and ``encode_document`` of any SentenceTransformer.

Two things differ. Scores equal to a limit are refused, as published (``< 0.8``), and the query's own text is never its
negative. Both that and the positives are known in whatever spelling: case, spacing, punctuation or composition of
characters make no other text.
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
from training.common.outputs import check_output, clear_partials, locked
from training.data.manifest import Source
from training.data.mining.index import choose_search
from training.data.mining.rows import SIDES, SourceRows, positives, read_rows, write_mined
from training.data.mining.rules import MiningOptions
from training.data.mining.tasks import Miner, MiningTasks
from training.data.mining.text_ids import distinct, form_ids
from training.data.mining.translations import Translations, find_translations
from training.data.storage import identity

logger = logging.getLogger(__name__)

MANIFEST, REPORT = "manifest.yaml", "mining.json"
_EMBEDDINGS = "embeddings"
# Raise it when the same input would give other negatives than before.
_FORMAT = 3
# Tasks of an executor that is given no number of workers and is not this machine.
_REMOTE_TASKS = 8


@dataclass(frozen=True)
class Resources:
    """Where and with what mining runs; nothing of it changes a negative.

    Attributes:
        cache: The folder of cached embeddings; ``embeddings`` in the output folder if None.
        max_corpus_in_memory: Passages whose embeddings are in memory together.
        search: ``faiss``, ``torch`` or ``auto``.
        executor: Where tasks run; one local worker, in this process, by default.
    """

    cache: Path | None = None
    max_corpus_in_memory: int = 500_000
    search: str = "auto"
    executor: Executor = field(default_factory=Executor)


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
    """Mines the negatives of each source among its own passages.

    The output folder gets a parquet file a source, ``manifest.yaml`` and ``mining.json``. A source that is there
    already, of the same input and options, is left as it is, and so are other sources that the folder holds; a run that
    was killed goes on where it was.

    Args:
        sources: What to mine. Negatives that rows have stay, before the mined ones.
        miner: The model, from :func:`training.models.miner.find_miner`.
        output: The folder to write.
        options: The thresholds; the published ones if None.
        bitext: Sources whose pairs are translations: what they connect is never a negative of each other.
        others: Sources that are not mined: the manifest of the output names them as they are.
        half: Cache embeddings in 16 bits, which rounds scores.
        resources: Memory, cache and executor.
        manifest: Where the sources were read from.

    Returns:
        The content of ``mining.json``.

    Raises:
        UserError: If an option is out of range, a source is faulty or too small, the output holds what is read or
            something foreign, or no row is left of any source; then what was there before stays.
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
        # Before any work: that of a night should not end at the last source.
        rows = {source.name: _checked(source, options) for source in run.unfinished(sources, bitext)}
        translations = find_translations(bitext) if rows else None
        for source in sources:
            if source.name in rows:
                run.mine(source, rows.pop(source.name), translations)
        return run.finish(sources, others)


def _checked(source: Source, options: MiningOptions) -> SourceRows:
    rows = read_rows(source)
    if len(rows.ids["passage"]) < options.top:
        raise UserError(
            f"source {source.name!r}: its {len(rows.ids['passage'])} distinct passages are fewer than top "
            f"{options.top}; lower --top or leave the source out of --sources"
        )
    return rows


def _absolute(model: str) -> str:
    """A folder as workers find it, whichever folder they run in."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _fingerprint(value: Any) -> str:
    return blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _described(source: Source, memory: Path) -> dict[str, Any]:
    """Changes with anything that mining depends on; a file keeps its identity when the folder moves."""
    return {**asdict(source), "files": [identity(file, memory) for file in source.files]}


class _Run:
    """One output folder and what has been mined into it."""

    def __init__(
        self,
        miner: Miner,
        output: Path,
        options: MiningOptions,
        half: bool,
        resources: Resources,
        reads: Sequence[Path],
    ) -> None:
        if resources.max_corpus_in_memory < 1:
            raise UserError(f"max-corpus-in-memory must be at least 1, got {resources.max_corpus_in_memory}")
        self._miner, self._output, self._options, self._half = miner, output, options, half
        self._search = choose_search(resources.search)
        executor = resources.executor
        # Each worker loads the model: as many as there are cores would not fit.
        workers = executor.workers or (1 if executor.name == "local" else None)
        self._executor, self._tasks = replace(executor, workers=workers), workers or _REMOTE_TASKS
        self._shard_texts = resources.max_corpus_in_memory
        self._cache = Path(resources.cache or output / _EMBEDDINGS).resolve()
        check_output(self._cache, reads, option="--cache")
        self._report = self._read_report()
        check_output(output, ours=self._ours())
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{output}: the folder cannot be written ({error.strerror}); give another") from None
        # Left by a command that was killed.
        clear_partials(output)
        self._fingerprints: dict[str, str] = {}

    def _read_report(self) -> dict[str, Any]:
        path = self._output / REPORT
        if not path.exists():
            return {"sources": {}}
        try:
            # Sources that an earlier run mined stay.
            return {"sources": dict(json.loads(path.read_text())["sources"])}
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not a report of mining; move it or give another --output") from None

    def _ours(self) -> list[str]:
        """What may stand in the output folder already: other sources that were mined into it, too."""
        names = [_EMBEDDINGS, ".*"]
        if self._cache.is_relative_to(self._output):
            names.append(escape(self._cache.relative_to(self._output).parts[0]))
        if (self._output / REPORT).exists():
            names += [MANIFEST, REPORT, *(escape(f"{name}.parquet") for name in self._report["sources"])]
        return names

    def unfinished(self, sources: Sequence[Source], bitext: Sequence[Source]) -> list[Source]:
        """Sources that are not there yet, of the same input and options."""
        memory = self._cache / ".hashes"
        guard = [_described(source, memory) for source in bitext]
        for source in sources:
            made_by = [_FORMAT, self._miner.made_by(), asdict(self._options), self._half, guard]
            made_by.append(_described(source, memory))
            self._fingerprints[source.name] = _fingerprint(made_by)
        return [source for source in sources if not self._is_finished(source)]

    def _is_finished(self, source: Source) -> bool:
        entry = self._report["sources"].get(source.name, {})
        same = entry.get("fingerprint") == self._fingerprints[source.name]
        return same and (not entry["kept"] or self._file(source).is_file())

    def _file(self, source: Source) -> Path:
        return self._output / f"{source.name}.parquet"

    def mine(self, source: Source, rows: SourceRows, translations: Translations) -> None:
        """Mines one source and notes what came of it."""
        started = time.monotonic()
        work = self._work_folder(source)
        tasks = MiningTasks(
            name=source.name,
            folder=work,
            cache=self._cache,
            miner=replace(self._miner, model=_absolute(self._miner.model)),
            instruction=source.instruction if self._options.instructions else None,
            options=self._options,
            # Room for positives, which are among the nearest: as mine_hard_negatives has it.
            window=self._options.top + int(np.bincount(rows.numbers["query"]).max()),
            shard_texts=self._shard_texts,
            search=self._search,
            half=self._half,
            tasks=self._tasks,
        )
        for side in SIDES:
            tasks.embedding_cache(side)
        if not (work / "ready").exists():
            _lay_out(source, rows, translations, tasks)
        self._run(tasks)
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
                "%s: in %d of %d rows the query is the passage, in whatever spelling", source.name, same, len(rows)
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
        self._write_report()
        shutil.rmtree(work)
        logger.info("%s: %d of %d rows kept, in %.0f s", source.name, counts["kept"], counts["rows"], seconds)

    def _work_folder(self, source: Source) -> Path:
        """The folder of a run with just this input; those of other runs of the source are removed."""
        parent = self._output / ".work" / source.name
        folder = parent / self._fingerprints[source.name]
        for other in parent.glob("*"):
            if other != folder:
                shutil.rmtree(other)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _run(self, tasks: MiningTasks) -> None:
        # Task 0 of 2 is another than task 0 of 3.
        logs = tasks.folder / "tasks"
        embed = Phase(f"embed-{tasks.tasks}", tasks.embed, tasks.tasks)
        run_phases([embed], logs, self._executor)
        if not tasks.locate():
            # The cache was emptied since a run that was stopped had noted them as done.
            shutil.rmtree(logs / embed.name)
            run_phases([embed], logs, self._executor)
            tasks.locate()
        count = min(tasks.tasks, tasks.blocks)
        search = replace(tasks, tasks=count)
        run_phases([Phase(f"search-{count}", search.search_blocks, count)], logs, self._executor)

    def _write_report(self) -> None:
        partial = self._output / f".{REPORT}.partial"
        partial.write_text(json.dumps(self._report, indent=2) + "\n")
        partial.replace(self._output / REPORT)

    def finish(self, sources: Sequence[Source], others: Sequence[Source]) -> dict[str, Any]:
        """Writes the manifest of all sources in the folder that have rows, and of those that were not mined."""
        report = self._report["sources"]
        empty = [source.name for source in sources if not report[source.name]["kept"]]
        for name in empty:
            logger.warning("%s: no row has %d negatives", name, self._options.negatives)
        if len(empty) == len(sources):
            raise UserError(
                f"no row of any source has {self._options.negatives} negatives (see {self._output / REPORT} for what "
                "refused them); raise --top, loosen the thresholds, lower --negatives or add --keep-short"
            )
        for source in sources:
            # Of an earlier run: only now is there a result to take its place.
            if source.name in empty:
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
    """A source as a manifest has it."""
    described = {**asdict(source), "files": [escape(file) for file in files]}
    return {key: value for key, value in described.items() if value is not None and value != []}


def _lay_out(source: Source, rows: SourceRows, translations: Translations, tasks: MiningTasks) -> None:
    """Writes everything that tasks read."""
    rows.write_texts(source, tasks.folder)
    passages = rows.ids["passage"]
    order = np.argsort(passages)
    rank = np.empty(len(passages), dtype=np.int64)
    rank[order] = np.arange(len(passages))
    forms = {side: np.concatenate([form_ids(texts) for texts in tasks.texts(side).chunks()]) for side in SIDES}
    numbers = distinct(np.concatenate([forms[side] for side in SIDES]))[1]
    number = dict(zip(SIDES, np.split(numbers, [len(forms[SIDES[0]])]), strict=True))
    for side in SIDES:
        tasks.save(f"{side}_ids", rows.ids[side])
        tasks.save(f"{side}_group", translations.groups(forms[side]))
        tasks.save(f"{side}_form", number[side])
    tasks.save("passage_rank", rank)
    query, passage = positives(number["query"], *(rows.numbers[side] for side in SIDES))
    tasks.save("pair_query", query)
    tasks.save("pair_passage", passage)
    (tasks.folder / "ready").touch()
