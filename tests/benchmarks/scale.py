"""Tens of millions of rows without their texts: the sampler, a resumed epoch, the teacher's cache, texts to mine."""

from __future__ import annotations

import os
import time
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from accelerate.data_loader import SkipBatchSampler

from tests.benchmarks.apart import measure_apart
from tests.benchmarks.common import process_memory
from tests.benchmarks.timing import spread
from training.data.mining.corpus import ID, numbered
from training.distillation import teacher_cache as teacher_cache_module
from training.distillation.teacher_cache import TeacherCache
from training.trainer.batches import GlobalBatchSampler

_GLOBAL_BATCH, _SOURCES, _WIDTH = 512, 157, 1024
# Distinct texts of a batch: query, passage and seven negatives of each row.
_BATCH_TEXTS = 9 * _GLOBAL_BATCH


def run(settings, suite):
    """Measure each point in a process of its own, but for a quick run."""
    epochs = [f"{kind}, sources: {number}" for kind in ("epoch", "resumed epoch") for number in (1, _SOURCES)]
    points = [(first_batches, axis, (27_000_000, 60_000_000)) for axis in epochs]
    points.append((teacher_cache, "teacher cache, texts", (250_000, 1_000_000)))
    points.append((numbered_texts, "mining, texts", (1_000_000, 27_000_000)))
    for work, axis, values in points:
        for value in [2000] if settings.quick else values:
            task = {"axis": axis, "value": value}
            here = {**task, **work(settings, task)} if settings.quick else None
            suite.add_point(here or measure_apart(f"scale.{work.__name__}", settings, task))


def _point(work):
    """Return the processor time and the memory of a call, and what it returns."""
    before, start = process_memory("VmRSS"), time.process_time()
    more = work()
    seconds = spread([time.process_time() - start])
    return {"seconds": seconds, "before_mib": before, "peak_mib": process_memory("VmHWM"), **(more or {})}


def first_batches(settings, task):
    """Make 2,000 batches of an epoch from its start or its middle, as many as need the order of every source."""
    parts = np.random.default_rng(0).lognormal(0, 1.3, int(task["axis"].rsplit(" ", 1)[1]))
    sizes = (parts / parts.sum() * task["value"]).astype(int).tolist()

    def work():
        start = time.process_time()
        sampler = GlobalBatchSampler(sizes, _GLOBAL_BATCH)
        batches = iter(SkipBatchSampler(sampler, len(sampler) // 2 * task["axis"].startswith("resumed")))
        list(next(batches))
        first = time.process_time() - start
        for keys in islice(batches, 1999):
            list(keys)
        return {"first_batch_seconds": first}

    return _point(work)


def teacher_cache(settings, task):
    """Fill a cache and check it; then read the texts of a batch that are not in the system's memory, page by page."""
    source = SimpleNamespace(name="texts", description={"fingerprint": "", "texts": task["value"]})
    embeddings = torch.randn(32_768, _WIDTH)
    with TemporaryDirectory() as folder, patch.object(teacher_cache_module, "_MEMORY_SHARE", 0):
        cache = TeacherCache(folder, [source], {}, _WIDTH)
        filled = _point(lambda: cache.fill(lambda _, positions: embeddings[: len(positions)]))
        start = time.perf_counter()
        cache.check()
        checked = time.perf_counter() - start
        for path in Path(folder).rglob("*.float16"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        positions = np.random.default_rng(0).integers(0, task["value"], _BATCH_TEXTS)
        start = time.perf_counter()
        cache.read("texts", positions, _WIDTH)
        return {**filled, "opening_seconds": checked, "first_batch_seconds": time.perf_counter() - start}


def numbered_texts(settings, task):
    """Number the distinct texts among the ids of pairs, as mining does with each source."""
    ids = np.frombuffer(np.random.default_rng(0).bytes(ID.itemsize * task["value"]), dtype=ID)

    def work():
        numbered(ids)

    return _point(work)
