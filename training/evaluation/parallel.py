"""A benchmark at size: each text of all tasks encoded once, and tasks divided over the processes of a launch.

Three steps: rehearse the tasks, to learn which texts they ask for; encode those, sorted by length over all tasks, into
a cache on disk; let mteb score the tasks. In each step, whichever process is free claims the next part.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import mteb
import numpy as np
from mteb.abstasks.abstask import AbsTask
from mteb.types import PromptType
from tqdm import tqdm
from xxhash import xxh3_64_digest, xxh3_64_hexdigest

from training.evaluation.embedding_cache import CachedStore, EmbeddingCache
from training.evaluation.encoding import Floats
from training.evaluation.models import EncoderView, EvaluatedModel, load_model, views_of
from training.evaluation.records import Evaluation, load_evaluation
from training.evaluation.scoring import evaluate_task, find_tasks, is_known, load_data, quietly, run_task
from training.models.devices import LAUNCHED, on_all_processes, process_count

logger = logging.getLogger("training")

# A part of the texts ends with the batch that reaches one of these: a minute of work for a large model.
_PART_BATCHES, _PART_CHARACTERS = 32, 1 << 20

# By side (of a model with a router) and prompt, distinct texts.
Texts = Mapping[tuple[str | None, str], Sequence[str]]


class Job(NamedTuple):
    """What every process needs to know about the evaluation of a model."""

    model: tuple[Any, ...]  # arguments of `load_model`, with no devices
    tasks: tuple[Any, ...]  # arguments of `find_tasks`
    dims: tuple[int, ...]
    precisions: tuple[str, ...]
    output: Path

    @property
    def folder(self) -> Path:
        """The folder of unfinished work in the output."""
        return self.output / ".parallel"


def evaluate_tasks(
    job: Job, model: EvaluatedModel, tasks: Sequence[AbsTask], evaluation: Evaluation, cache_bytes: float
) -> None:
    """Add the scores of a model to an evaluation as ``evaluate_model`` does, with all processes of a launch.

    At once, the embeddings of as many tasks are on disk as ``cache_bytes`` hold, and of at least one. After a kill,
    tasks that were scored are not scored again, and texts that were encoded are not encoded again.
    """
    record, names = model.record, [task.metadata.name for task in tasks]
    # First: results of a killed command may be of another model, or of an earlier state of this one.
    left_behind = sorted((job.folder / "scores").glob("*"))
    _collect(evaluation, job, names, [load_evaluation(folder, missing_ok=True) for folder in left_behind])
    for each in model.records:
        evaluation.add_model(each)
    worker = Worker(job, model, tasks)
    left = []
    for name, task in worker.tasks.items():
        evaluation.failures.pop(f"{record.label}: {name}", None)
        evaluation.forget_failures(f"{record.label}: {name}, ")
        if not all(is_known(view, task, evaluation) for view in worker.views):
            left.append(name)
    evaluation.save(job.output)
    for folder in worker.cache.folder.parent.iterdir():
        # Of another model, or of another state of this one.
        if folder != worker.cache.folder:
            shutil.rmtree(folder)
    asked: dict[str, Texts] = {}
    for answer in _together(worker, "rehearse", left):
        asked |= answer
    encoded, seconds = 0, 0.0
    for wave in _waves({name: asked[name] for name in left}, cache_bytes // (4 * model.store.columns)):
        parts = _write_parts(worker, [asked[name] for name in wave])
        started = time.perf_counter()
        encoded += sum(_together(worker, "encode", parts))
        seconds += time.perf_counter() - started
        scored = _together(worker, "score", sorted(wave, key=lambda name: -_size(asked[name])))
        if encoded:
            evaluation.add_model(replace(record, texts_per_second=encoded / seconds))
        _collect(evaluation, job, names, scored)
        worker.cache.clear()
    # Otherwise the other processes would hold two models when the next one is loaded.
    on_all_processes([_worker.cache_clear] * process_count())
    shutil.rmtree(job.folder)
    total = sum(map(_size, asked.values()))
    logger.info("%s: %d texts of %d tasks, %d encoded in %.0f s", record.label, total, len(left), encoded, seconds)


def _together(worker: Worker, step: str, parts: Sequence[str]) -> list[Any]:
    """Let all processes do a step of the job until no part is left; return what each of them returns."""
    claims = worker.job.folder / "claims"
    shutil.rmtree(claims, ignore_errors=True)
    claims.mkdir(parents=True)
    others = [partial(_elsewhere, worker.job, step, parts)] * (process_count() - 1)
    return on_all_processes([partial(getattr(worker, step), parts), *others]) if parts else []


def _elsewhere(job: Job, step: str, parts: Sequence[str]) -> Any:
    return getattr(_worker(job), step)(parts)


@lru_cache(maxsize=1)
def _worker(job: Job) -> Worker:
    return Worker(job, load_model(*job.model), find_tasks(*job.tasks))


def _collect(evaluation: Evaluation, job: Job, names: Sequence[str], found: Sequence[Evaluation]) -> None:
    """Add what processes have scored to the evaluation, in the order of the tasks, and drop their files."""
    for record in (record for each in found for record in each.models):
        evaluation.add_model(record)
    place = {name: number for number, name in enumerate(names)}
    scores = [score for each in found for score in each.scores]
    examples = {key: values for each in found for key, values in each.examples.items()}
    evaluation.put(sorted(scores, key=lambda score: place.get(score.task, len(place))), examples)
    for each in found:
        evaluation.failures |= each.failures
    evaluation.save(job.output)
    shutil.rmtree(job.folder / "scores", ignore_errors=True)


def _waves(asked: Mapping[str, Texts], most: float) -> Iterator[list[str]]:
    """Divide tasks, in their order, into groups with at most so many distinct texts, or of one task."""
    wave: list[str] = []
    held: set[tuple[Any, str]] = set()
    for name, texts in asked.items():
        own = {(group, text) for group, each in texts.items() for text in each}
        if wave and len(held) + len(own - held) > most:
            yield wave
            wave, held = [], set()
        wave.append(name)
        held |= own
    if wave:
        yield wave


def _write_parts(worker: Worker, asked: Sequence[Texts]) -> list[str]:
    """Write the texts that the cache lacks, in parts; return the files, longest texts first."""
    folder, cache, parts = worker.job.folder / "parts", worker.cache, []
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for side, prompt in sorted({group for texts in asked for group in texts}, key=str):
        texts = {text for each in asked for text in each.get((side, prompt), ())}
        new = (text for text in texts if cache.key(text, prompt, side) not in cache)
        parts += [(side, prompt, part) for part in cut(new, worker.store.batch_size)]
    parts.sort(key=lambda part: -len(part[2][0]))
    for number, part in enumerate(parts):
        (folder / f"{number}.json").write_text(json.dumps(part), encoding="utf-8")
    return [str(folder / f"{number}.json") for number in range(len(parts))]


def cut(texts: Iterable[str], batch_size: int) -> Iterator[list[str]]:
    """Sort texts by length, longest first, and cut them into parts of whole batches.

    A part ends where its own texts say: without those of some parts, the others are the same again.
    """
    ordered, part = sorted(texts, key=lambda text: (-len(text), text)), []
    for start in range(0, len(ordered), batch_size):
        part += ordered[start : start + batch_size]
        if len(part) >= _PART_BATCHES * batch_size or sum(map(len, part)) >= _PART_CHARACTERS:
            yield part
            part = []
    if part:
        yield part


def _size(texts: Texts) -> int:
    return sum(map(len, texts.values()))


class Worker:
    """What a process does of a job: in each step, it takes the parts that nobody has claimed yet."""

    def __init__(self, job: Job, model: EvaluatedModel, tasks: Sequence[AbsTask]) -> None:
        self.job, self.tasks = job, {task.metadata.name: task for task in tasks}
        self.record, encoder = model.record, model.store.encoder
        digest = xxh3_64_hexdigest(repr((self.record.label, self.record.identity, *model.exits)).encode())
        self.cache = EmbeddingCache(job.folder / "embeddings" / digest, model.store.columns)
        # In a launch, each process encodes on its own.
        self.store = CachedStore(encoder.model if encoder.devices == LAUNCHED else encoder, self.cache)
        self.model = replace(model, store=self.store)
        self.views = views_of(self.model, job.dims, job.precisions)
        self._rank = int(os.environ.get("RANK", 0))

    def rehearse(self, names: Sequence[str]) -> dict[str, Texts]:
        """Return, by task, the texts that it asks for."""
        found = {}
        for name in self._claimed(names, "rehearse"):
            view, task = _Rehearsal(self.model), self.tasks[name]
            # Faults are reported when the task is scored; here, made-up embeddings may be the cause.
            with self._forgetting(task), suppress(Exception), quietly():
                load_data(task)
                run_task(view, task)
            found[name] = {group: list(texts) for group, texts in view.texts.items()}
        return found

    def encode(self, parts: Sequence[str]) -> int:
        """Encode files of texts into the cache; return the number of texts."""
        before = self.store.encoded
        for path in self._claimed(parts, "encode"):
            side, prompt, texts = json.loads(Path(path).read_text(encoding="utf-8"))
            embeddings = self.store.compute(texts, prompt, side)
            self.cache.add([self.cache.key(text, prompt, side) for text in texts], embeddings)
        return self.store.encoded - before

    def score(self, names: Sequence[str]) -> Evaluation:
        """Return the scores of tasks; after each, its results are on disk, in mteb's format and for a new start."""
        self.cache.refresh()
        label, known, own = self.record.label, load_evaluation(self.job.output), Evaluation(self.model.records)
        for name in self._claimed(names, "score"):
            task = self.tasks[name]
            left = [view for view in self.views if not is_known(view, task, known)]
            with self._forgetting(task), quietly():
                evaluate_task(label, task, left, own, mteb.ResultCache(self.job.output / "mteb"))
            own.save(self.job.folder / "scores" / str(self._rank))
        self.cache.close()
        return own

    def _claimed(self, parts: Sequence[str], step: str) -> Iterator[str]:
        for number in tqdm(range(len(parts)), desc=f"{self.record.label}: {step}", disable=self._rank > 0):
            try:
                # Whoever creates the file has the part.
                (self.job.folder / "claims" / str(number)).touch(exist_ok=False)
            except FileExistsError:
                continue
            yield parts[number]

    @contextmanager
    def _forgetting(self, task: AbsTask) -> Iterator[None]:
        """Drop the data of a task when the block ends, and its embeddings: batches must not depend on earlier tasks."""
        loaded_before = task.data_loaded
        try:
            yield
        finally:
            self.store.forget()
            if task.data_loaded and not loaded_before:
                task.unload_data()


class _Rehearsal(EncoderView):
    """Notes the texts that a task asks for, and gives made-up embeddings of eight dimensions for them."""

    def __init__(self, model: EvaluatedModel) -> None:
        super().__init__(model)
        self.texts: dict[tuple[str | None, str], dict[str, None]] = {}

    def embed(self, texts: Sequence[str], task_metadata: Any, prompt_type: PromptType | None) -> Floats:
        """Return ``(n, 8)`` digests: equal for equal texts only, since some metrics need embeddings that differ."""
        prompt = self.prompt(task_metadata, prompt_type)
        given, prompt, side = self.store.as_encoded(texts, prompt, prompt_type and prompt_type.value)
        self.texts.setdefault((side, prompt), {}).update(dict.fromkeys(given))
        digests = b"".join(xxh3_64_digest(text.encode()) for text in given)
        return np.frombuffer(digests, np.uint8).reshape(len(given), 8).astype(np.float32) - 127.5

    def search(self, queries: Any, *, task_metadata: Any, **kwargs: Any) -> dict[str, dict[str, float]]:
        """Return one document for each query."""
        names, texts = self._read(queries, task_metadata, PromptType.query)
        self.embed(self._documents, task_metadata, PromptType.document)
        self.embed(texts, task_metadata, PromptType.query)
        return {name: {self._ids[0]: 1.0} for name in names}
