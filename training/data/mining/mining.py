"""Hard-negative mining: from pairs of query and passage to rows of the published format with negatives.

Thresholds and their order are those of ``sentence_transformers.util.mine_hard_negatives``, and a test checks that the
negatives are the same. That function is not called: it holds the embeddings of the whole corpus and the candidates of
all queries in memory, and has neither a guard against translations nor counts.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from tqdm.auto import tqdm

from training.common.errors import UserError
from training.common.executor import Executor, Phase, run_phases
from training.common.outputs import check_output, clear_partials, locked, write_whole
from training.data.manifest import MANIFEST, Source, read_manifest, write_manifest
from training.data.mining import corpus
from training.data.mining.rows import mined_rows
from training.data.mining.search import (
    RERANKER,
    RULES,
    MiningOptions,
    Nearest,
    Relations,
    ShardIndex,
    Translations,
    choose_negatives,
    choose_search,
    merge,
    pair_scores,
    rerank,
)
from training.data.published import write_parquet
from training.data.storage import identity

logger = logging.getLogger(__name__)

REPORT = "mining.json"
_EMBEDDINGS, _WORK = "embeddings", ".work"
# Increase it when the same input gives other negatives than before.
_FORMAT = 5
# Queries whose candidates are in memory together, and whose results a killed run keeps; scores of a reranker cost more.
BLOCK_QUERIES, RERANKED_QUERIES = 16_384, 2048
# Positives whose scores are computed at once.
_PAIRS = 1024
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
    reranker: Any = None,
    bitext: Sequence[Source] = (),
    others: Sequence[Source] = (),
    resources: Resources | None = None,
    manifest: Path | None = None,
) -> dict[str, Any]:
    """Mine the negatives of each source among its own passages, and return the content of ``mining.json``.

    The output folder gets one parquet file per source, ``manifest.yaml`` and ``mining.json``. Finished, unchanged
    sources are not mined again, and other sources in the folder stay. A killed run continues where it was.

    ``miner`` is a model from :func:`training.models.encoders.find_miner`, ``reranker`` one from
    :func:`training.models.rerankers.find_reranker` or None. The pairs of ``bitext`` sources are
    translations, which are never negatives of each other. ``others`` are listed in the new manifest, not mined.
    """
    options, resources, output = options or MiningOptions(), resources or Resources(), Path(output).resolve()
    cache, search = Path(resources.cache or output / _EMBEDDINGS).resolve(), choose_search(resources.search)
    reads = [file for source in (*sources, *bitext, *others) for file in source.files if isinstance(file, Path)]
    models = [miner, *([reranker] if reranker else [])]
    reads += [*(Path(each.model) for each in models), *([manifest] if manifest else [])]
    check_output(output, reads)
    check_output(cache, reads, option="--cache")
    with locked(output), closing(miner):
        report = _read_report(output)
        output.mkdir(exist_ok=True)
        clear_partials(output)

        def described(source: Source) -> dict[str, Any]:
            # A file keeps its identity when its folder moves.
            return {**asdict(source), "files": [identity(file, cache / ".hashes") for file in source.files]}

        settings = [_FORMAT, [each.made_by() for each in models], asdict(options), list(map(described, bitext))]
        left: list[tuple[Source, str, corpus.PairIds, MiningOptions]] = []
        small: list[Source] = []
        for source in sources:
            made_by = json.dumps([*settings, described(source)], sort_keys=True, default=str)
            fingerprint = blake2b(made_by.encode(), digest_size=16).hexdigest()
            entry = report.get(source.name, {"fingerprint": None, "kept": 0})
            missing = entry["kept"] and not (output / f"{source.name}.parquet").is_file()
            if entry["fingerprint"] != fingerprint or missing:
                # Checked before any work: a long run must not fail at its last source.
                ids, fitting = corpus.read_ids(source.files, corpus.text_ids), options
                if (passages := len(np.unique(ids.passage))) < options.top:
                    fault = f"its {passages} distinct passages are fewer than top {options.top}"
                    if not options.fit:
                        remedy = "lower --top, add --fit or leave it out of --sources"
                        raise UserError(f"source {source.name!r}: {fault}; {remedy}")
                    # One of them is the positive.
                    if passages - 1 <= options.skip:
                        logger.info("%s: is not mined: %d passages, of which skip leaves none", source.name, passages)
                        report.pop(source.name, None)
                        small.append(source)
                        continue
                    fitting = replace(options, top=passages)
                left.append((source, fingerprint, ids, fitting))
        translations = Translations(bitext if left else [])
        # Each worker loads the model: one per core would not fit. Workers may run in another folder.
        workers = resources.executor.workers or (1 if resources.executor.name == "local" else None)
        miner, reranker = map(_anywhere, (miner, reranker))
        for source, fingerprint, ids, fitting in left:
            texts = {side: corpus.numbered(getattr(ids, side)) for side in corpus.SIDES}
            numbers = texts["query"].numbers
            tasks = MiningTasks(
                source=source,
                folder=output / _WORK / source.name / fingerprint,
                cache=cache,
                miner=miner,
                reranker=reranker,
                options=fitting,
                # Positives are among the nearest, as in mine_hard_negatives.
                window=fitting.top + int(np.bincount(numbers).max()),
                shard_texts=resources.max_corpus_in_memory,
                search=search,
                tasks=workers or _REMOTE_TASKS,
            )
            counts = tasks.run(texts, ids.document, translations, replace(resources.executor, workers=workers))
            report[source.name] = {
                **tasks.write(output / f"{source.name}.parquet", numbers[ids.first]),
                **counts,
                "model": miner.model,
                "revision": miner.revision,
                **({"reranker": {"model": reranker.model, "revision": reranker.revision}} if reranker else {}),
                "options": asdict(fitting),
                "fingerprint": fingerprint,
                "manifest": {**asdict(source), "files": [f"{source.name}.parquet"]},
            }
            write_whole(output / REPORT, json.dumps({"sources": report}, indent=2) + "\n")
            shutil.rmtree(tasks.folder)
            done = report[source.name]
            mean = done["negatives"] / done["rows"]
            logger.info(
                "%s: %d of %d rows kept; %.3g negatives found a row", source.name, done["kept"], done["rows"], mean
            )
            if options.keep_short and not done["negatives"]:
                refused = ", ".join(f"{rule} {number}" for rule, number in counts["refused"].items())
                what = "%s: no row has got a negative; refused by rule: %s; try another model"
                logger.warning(what, source.name, refused)
        stage_caps = read_manifest(manifest).stage_caps if manifest else {}
        mined = [source for source in sources if source not in small]
        entries = _manifest_entries(output, report, mined, [*others, *small], options.negatives)
        write_manifest(output / MANIFEST, entries, stage_caps=stage_caps)
        shutil.rmtree(output / _WORK, ignore_errors=True)
    return {"sources": report}


def _anywhere(model: Any) -> Any:
    """Return a model with its folder as it is named in any working directory."""
    return replace(model, model=str(Path(model.model).resolve())) if model and Path(model.model).is_dir() else model


def _read_report(output: Path) -> dict[str, Any]:
    """Return the entries of earlier runs by source, which stay."""
    path = output / REPORT
    if not path.exists():
        if not (output / _WORK).exists():
            check_output(output, ours=[_EMBEDDINGS, ".*"])
        return {}
    try:
        return dict(json.loads(path.read_text())["sources"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a report of mining; give another --output") from None


def _manifest_entries(
    output: Path, report: Mapping[str, Any], sources: Sequence[Source], others: Sequence[Source], negatives: int
) -> list[dict[str, Any]]:
    """Return the manifest's entries of all mined sources with rows and of the sources that were not mined."""
    empty = [source.name for source in sources if not report[source.name]["kept"]]
    if empty and len(empty) == len(sources):
        fault = f"no row of any source has {negatives} negatives (see {output / REPORT} for what refused them)"
        raise UserError(f"{fault}; raise --top, loosen the thresholds, lower --negatives or add --keep-short")
    for name in empty:
        logger.warning("%s: no row has %d negatives", name, negatives)
        # The file of an earlier run, which is replaced only now that there are other results.
        (output / f"{name}.parquet").unlink(missing_ok=True)
    entries = [entry["manifest"] for entry in report.values() if entry["kept"]]
    for source in others:
        if source.name not in report:
            files = [os.path.relpath(Path(file).resolve(), output) for file in source.files]
            entries.append({**asdict(source), "files": files})
    return entries


@dataclass(frozen=True)
class MiningTasks:
    """The work on one source: embed its texts, then search its passages, in tasks that any worker can do."""

    source: Source
    folder: Path  # texts, arrays by name and results, shared by all workers
    cache: Path  # folder of cached embeddings
    miner: Any  # a training.models.encoders.Miner
    reranker: Any  # a training.models.rerankers.Reranker, or None
    options: MiningOptions
    window: int  # candidates per query that the rules see
    shard_texts: int  # passages whose embeddings are in memory together
    search: str  # faiss or torch
    tasks: int  # number of tasks that share the work

    def run(
        self,
        texts: Mapping[str, corpus.Numbered],
        documents: corpus.Ids,
        translations: Translations,
        executor: Executor,
    ) -> dict[str, Any]:
        """Do what is left of the work; return how many texts were embedded and how many candidates were refused.

        ``documents`` are the ``(pairs,)`` ids of documents, empty without one.
        """
        if not self._arrays.exists():
            self._lay_out(texts, documents, translations)
        missing = np.concatenate([self._located(side).file for side in corpus.SIDES]) < 0
        phases = [Phase("embed", self.embed, self.tasks)] if missing.any() else []
        if not all(result.exists() for result in self._results()):
            phases.append(Phase("search", self.search_blocks, self.tasks))
        # Tasks see what is left. Marks of a stopped run would be wrong if its cache was emptied since.
        shutil.rmtree(self.folder / "tasks", ignore_errors=True)
        run_phases(phases, self.folder / "tasks", executor)
        refused = sum(corpus.load_arrays(result, "refused")[0] for result in self._results())
        counts = {"embedded": int(missing.sum()), "cached": int((~missing).sum())}
        rules = (*RULES, RERANKER) if self.reranker else RULES
        return {"texts": counts, "refused": dict(zip(rules, refused.tolist(), strict=True))}

    @property
    def _arrays(self) -> Path:
        return self.folder / "arrays.npz"

    def _texts(self, side: str) -> corpus.TextStore:
        return corpus.TextStore(self.folder / f"{side}.arrow")

    def _lay_out(self, texts: Mapping[str, corpus.Numbered], documents: corpus.Ids, translations: Translations) -> None:
        """Write everything that tasks read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for side in corpus.SIDES:
            written = corpus.distinct_texts(self.source, side, texts[side].first)
            corpus.TextStore.write(self.folder / f"{side}.arrow", written)
        query, passage = (texts[side].numbers for side in corpus.SIDES)
        forms = {side: corpus.form_ids(self._texts(side)) for side in corpus.SIDES}
        form = np.unique(np.concatenate([*forms.values()]), return_inverse=True)[1]
        form = corpus.join_documents(form, form[len(forms["query"]) :][passage], documents)
        query_form, passage_form = np.split(form, [len(forms["query"])])
        # The positives of a query are those of all rows whose query is a spelling of it, sorted by query.
        passages_of_form = csr_array((np.ones(len(query), dtype=bool), (query_form[query], passage)))
        corpus.save_arrays(
            self._arrays,
            **{side: texts[side].ids for side in corpus.SIDES},
            query_form=query_form,
            query_group=translations.groups(forms["query"]),
            passage_form=passage_form,
            passage_group=translations.groups(forms["passage"]),
            pairs=np.stack(passages_of_form[query_form].nonzero()).astype(np.int64),
        )

    def _bar(self, total: int, what: str, unit: str, task: int) -> tqdm:
        what = f"{self.source.name}: {what}"
        return tqdm(total=total, desc=what, unit=unit, position=task, disable=None if total else True)

    def _instruction(self, side: str) -> dict[str, Any]:
        own = self.source.instruction if self.options.instruction else None
        return {"instruction": own} if side == "query" else {}

    def _cache(self, side: str) -> corpus.EmbeddingCache:
        return corpus.EmbeddingCache(self.cache, {"role": side, **self.miner.made_by(), **self._instruction(side)})

    def _located(self, side: str) -> corpus.Located:
        return self._cache(side).locate(*corpus.load_arrays(self._arrays, side))

    def embed(self, task: int) -> None:
        """Embed the texts that are not cached in every ``tasks``-th chunk; the tasks change no bit of them."""
        for side in corpus.SIDES:
            (ids,) = corpus.load_arrays(self._arrays, side)
            cache, store = self._cache(side), self._texts(side)
            missing = cache.locate(ids).file < 0
            starts = range(task * corpus.CHUNK_TEXTS, len(ids), self.tasks * corpus.CHUNK_TEXTS)
            chunks = [start + np.flatnonzero(missing[start : start + corpus.CHUNK_TEXTS]) for start in starts]
            with self._bar(sum(map(len, chunks)), f"embed {side}", "text", task) as bar:
                for numbers in filter(len, chunks):
                    embed = self.miner.embed_queries if side == "query" else self.miner.embed_passages
                    cache.add(ids[numbers], embed(store.take(numbers).tolist(), **self._instruction(side)))
                    bar.update(len(numbers))

    def _results(self) -> list[Path]:
        """Return the file of each block of queries."""
        (ids,) = corpus.load_arrays(self._arrays, "query")
        return [self.folder / f"negatives-{block:05d}.npz" for block in range(-(-len(ids) // self._block))]

    @property
    def _block(self) -> int:
        return min(BLOCK_QUERIES, RERANKED_QUERIES) if self.reranker else BLOCK_QUERIES

    def search_blocks(self, task: int) -> None:
        """Choose the negatives of every ``tasks``-th block of queries."""
        left = [(block, path) for block, path in enumerate(self._results()) if block % self.tasks == task]
        left = [(block * self._block, path) for block, path in left if not path.exists()]
        queries, passages = (self._located(side) for side in corpus.SIDES)
        names = ("pairs", "query_form", "query_group", "passage_form", "passage_group")
        (pair_query, pair_passage), form, group, passage_form, passage_group = corpus.load_arrays(self._arrays, *names)
        firsts = range(0, len(passages.file), self.shard_texts)
        shard: ShardIndex | None = None
        total = sum(len(queries.file[start : start + self._block]) for start, _ in left) * len(firsts)
        with self._bar(total, "search", "query", task) as bar:
            for start, path in left:
                vectors = queries.read(start, start + self._block)
                own = slice(start, start + len(vectors))
                pairs = slice(*np.searchsorted(pair_query, [own.start, own.stop]).tolist())
                owner, positive = pair_query[pairs] - start, pair_passage[pairs]
                score = np.zeros(len(positive), dtype=np.float32)
                nearest: list[Nearest] = []
                for first in firsts:
                    if shard is None or shard.first != first:
                        # Freed before the next one is read: two may not fit.
                        shard = None
                        shard = ShardIndex(passages.read(first, first + self.shard_texts), first, self.search)
                    nearest = [merge([*nearest, shard.search(vectors, self.window, bar.update)], self.window)]
                    here = np.flatnonzero((positive >= first) & (positive < first + len(shard.vectors)))
                    for some in np.split(here, range(_PAIRS, len(here), _PAIRS)):
                        texts = shard.vectors[positive[some] - first]
                        score[some] = pair_scores(vectors[owner[some]], texts[:, None])[:, 0]
                relations = Relations(form[own], group[own], owner, positive, score, passage_group, passage_form)
                pool = self.options.negatives * (self.options.reranker_pool if self.reranker else 1)
                negatives, refused = choose_negatives(nearest[0], relations, self.options, pool)
                if self.reranker:
                    score = partial(self._rerank_scores, start)
                    negatives, refused[RERANKER] = rerank(negatives, owner, positive, score, self.options)
                corpus.save_arrays(path, negatives=negatives, refused=np.array([*refused.values()]))

    def _rerank_scores(self, start: int, query: NDArray[np.int64], passage: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the reranker's ``(n,)`` scores of queries, numbered from ``start``, with passages."""
        texts = (self._texts("query").take(query + start), self._texts("passage").take(passage))
        return self.reranker.scores(*(each.tolist() for each in texts))

    def write(self, path: Path, numbers: NDArray[np.int64]) -> dict[str, int]:
        """Write the rows, whose queries have these ``(rows,)`` numbers, with all columns; return how many there are."""
        mined = np.concatenate([corpus.load_arrays(result, "negatives")[0] for result in self._results()])
        passages = self._texts("passage")
        tables = mined_rows(self.source.files, lambda rows: passages.take(mined[numbers[rows]]), self.options)
        kept = write_parquet(path, tables)
        found = int((mined[numbers] >= 0).sum())
        return {"rows": len(numbers), "kept": kept, "dropped": len(numbers) - kept, "negatives": found}
