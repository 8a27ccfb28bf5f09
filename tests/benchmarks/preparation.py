"""Preparation at scale: tokens per second beside a loop over strings, and time and memory as the rows grow."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tests.benchmarks.apart import measure_apart
from tests.benchmarks.common import NEGATIVES, process_memory
from tests.benchmarks.timing import Contestant, add_ratio, measure, spread
from training.data.manifest import Source
from training.data.preparation.pipeline import prepare
from training.data.preparation.plan import PreparationOptions
from training.data.published import ROW_GROUP_ROWS, rows_table, write_parquet
from training.models.loading import load_tokenizer, train_tokenizer

_GLOBAL_BATCH = 512


def run(settings, suite):
    """Time both ways to tokenise, then prepare larger and larger sources."""
    sizes = settings.pick(quick=[200], cpu=[200_000, 1_000_000, 2_000_000], cuda=[200_000, 1_000_000, 2_000_000])
    corpus = MadeUpCorpus(settings.pick(quick=200, cpu=40_000, cuda=40_000))
    passages = [corpus.passage(row) for row in range(corpus.rows)]
    tokenizer = train_tokenizer(iter(passages[:10_000]), settings.pick(quick=400, cpu=8192, cuda=8192))
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder / "tokenizer")
        suite.add(_rate(settings, tokenizer, passages, corpus.write(folder / "rate.parquet")))
        for rows in sizes:
            file = MadeUpCorpus(rows).write(folder / f"{rows}.parquet")
            task = {"axis": "corpus", "value": rows, "precision": None, "folder": name}
            point = measure_apart("preparation.prepare_rows", settings, task, watch=True)
            suite.add_point({**point, **measure_apart("preparation.open_rows", settings, {"file": str(file)})})
            file.unlink()


def _rate(settings, tokenizer, passages, file):
    """Measure tokens of the same texts, string by string, in calls of many, and by preparation from parquet to disk."""

    def prepare_again():
        """Return the tokens of distinct texts, and those of all texts of the rows, which a loop would tokenise."""
        shutil.rmtree(file.with_suffix(""), ignore_errors=True)
        source = Source("rate", [file], "retrieval", "Retrieve.")
        (prepared,) = prepare([source], tokenizer, file.with_suffix(""), PreparationOptions(instructions=False))
        of_rows = sum(int(prepared.lengths(rows.ravel()).sum()) for rows in prepared.rows.values())
        return prepared.description["tokens"], of_rows

    tokens = sum(map(len, tokenizer(passages)["input_ids"]))
    contestants = {
        "string_by_string": Contestant(lambda: [tokenizer(text)["input_ids"] for text in passages]),
        "many_in_a_call": Contestant(lambda: tokenizer(passages)["input_ids"]),
        "preparation": Contestant(prepare_again),
    }
    measurement = measure("tokenising", contestants, settings.repeats, facts={"texts": len(passages)})
    add_ratio(measurement, "string_by_string", "many_in_a_call")
    for label, found in zip(("tokens", "tokens of rows"), prepare_again(), strict=True):
        label = f"{label} per second, times as many"
        add_ratio(measurement, "string_by_string", "preparation", label, found / tokens)
    return measurement


def prepare_rows(settings, task):
    """Prepare a file from scratch."""
    folder, rows = Path(task["folder"]), str(task["value"])
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    source = Source(rows, [folder / f"{rows}.parquet"], "retrieval", "Retrieve.")
    start = time.perf_counter()
    (prepared,) = prepare([source], tokenizer, folder / "prepared", PreparationOptions())
    seconds = spread([time.perf_counter() - start])
    return {"seconds": seconds, "before_mib": 0.0, "tokens": prepared.description["tokens"]}


def open_rows(settings, task):
    """Open a prepared source, then collate its first batch.

    The memory is that of opening: the batch maps pages of the files, which stay the system's.
    """
    from training.data.prepared import PreparedSource

    # The folder is named after the source and its settings.
    file = Path(task["file"])
    (prepared,) = (file.parent / "prepared").glob(f"{file.stem}-*")
    before, start = process_memory("VmRSS"), time.perf_counter()
    sources = [PreparedSource(prepared)]
    found = {"opening_seconds": time.perf_counter() - start, "opening_mib": process_memory("VmRSS") - before}

    from training.trainer.batches import GlobalBatchSampler, PackedCollator, PreparedRows

    start = time.perf_counter()
    dataset = PreparedRows(sources, "train")
    keys = next(iter(GlobalBatchSampler([len(dataset)], _GLOBAL_BATCH)))
    batch = PackedCollator(sources, dict(PreparationOptions().num_hard_negatives))([dataset[key] for key in keys])
    assert batch["input_ids"].numel()
    return {**found, "first_batch_seconds": time.perf_counter() - start}


class MadeUpCorpus:
    """A large made-up source, never held in memory. Its negatives are passages of other rows, as mined ones are."""

    def __init__(self, rows, seed=0):
        self.rows = rows
        self._generator = generator = np.random.default_rng(seed)
        frequencies = 1 / np.arange(1, 27)
        alphabet = list("etaoinshrdlucmfwypvbgkjqxz")
        letters = generator.choice(alphabet, (50_000, 9), p=frequencies / frequencies.sum())
        words = ["".join(word)[: 2 + i % 8] for i, word in enumerate(letters)]
        # Zipf's law: a few words are most of a text, as in every language.
        self._text = " ".join(words[i] for i in generator.zipf(1.3, 400_000) % len(words))
        self._query_lengths = generator.lognormal(np.log(60), 0.4, rows).clip(10, 400).astype(int)
        self._lengths = generator.lognormal(np.log(200), 0.6, rows).clip(20, 4000).astype(int)
        self._starts = generator.integers(0, len(self._text) - 4000, (2, rows))

    def passage(self, row):
        """The passage of a row, unlike every other by its number."""
        start = int(self._starts[0, row])
        return f"{row} {self._text[start : start + int(self._lengths[row])]}"

    def _query(self, row):
        start = int(self._starts[1, row])
        return f"{self._text[start : start + int(self._query_lengths[row])]} {row}"

    def write(self, path):
        """Write the rows to a parquet file."""
        write_parquet(path, self._tables())
        return path

    def _tables(self):
        for start in range(0, self.rows, ROW_GROUP_ROWS):
            rows = np.arange(start, min(start + ROW_GROUP_ROWS, self.rows))
            others = (rows + self._generator.integers(1, self.rows, (NEGATIVES, len(rows)))) % self.rows
            negatives = [[self.passage(row) for row in column] for column in others]
            yield rows_table([self._query(row) for row in rows], [self.passage(row) for row in rows], negatives)
