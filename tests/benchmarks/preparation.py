"""Preparation at scale: tokens per second beside a loop over strings, and time and memory as the rows grow.

Each size is prepared in its own process, whose memory is watched, with that of its worker processes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from tests.benchmarks.machine import Settings
from tests.benchmarks.texts import NEGATIVES
from tests.benchmarks.timing import Contestant, Suite, add_ratio, measure, spread
from training.data.manifest import Source
from training.data.preparation.pipeline import prepare
from training.data.preparation.plan import PreparationOptions
from training.data.published import ROW_GROUP_ROWS, rows_table, write_parquet
from training.models.loading import train_tokenizer

_ROOT = Path(__file__).resolve().parents[2]
_POLL_SECONDS = 0.1


def run(settings: Settings, suite: Suite) -> None:
    """Time both ways to tokenise, then prepares larger and larger sources."""
    sizes = settings.pick(quick=[200], cpu=[200_000, 1_000_000, 2_000_000], cuda=[200_000, 1_000_000, 2_000_000])
    suite.notes += [
        "Rows have a query, a passage and seven negatives, passages of other rows; a byte-level BPE tokenizer "
        "of 8,192 tokens trained on the same texts.",
        "Memory of preparing is the peak of the whole tree of processes, libraries included, that of opening the peak "
        "of a process that does nothing else; then it collates a first batch of 512 rows.",
    ]
    corpus = MadeUpCorpus(settings.pick(quick=200, cpu=40_000, cuda=40_000))
    passages = [corpus.passage(row) for row in range(corpus.rows)]
    tokenizer = train_tokenizer(iter(passages[:10_000]), settings.pick(quick=400, cpu=8192, cuda=8192))
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder / "tokenizer")
        suite.add(_rate(settings, tokenizer, passages, folder))
        for rows in sizes:
            suite.add_point(_point(rows, folder))


def _rate(settings: Settings, tokenizer: PreTrainedTokenizerBase, passages: list[str], folder: Path) -> dict[str, Any]:
    """Measure tokens of the same texts, string by string, in calls of many, and by preparation from parquet to disk."""
    corpus = MadeUpCorpus(len(passages))
    file = corpus.write(folder / "rate.parquet")
    tokens = sum(map(len, tokenizer(passages)["input_ids"]))
    contestants = {
        "string_by_string": Contestant(lambda: [tokenizer(text)["input_ids"] for text in passages]),
        "many_in_a_call": Contestant(lambda: tokenizer(passages)["input_ids"]),
        "preparation": Contestant(_prepare(file, tokenizer, folder)),
    }
    measurement = measure("tokenising", contestants, settings.repeats, facts={"texts": len(passages)})
    prepared_tokens, row_tokens = contestants["preparation"].run()
    add_ratio(measurement, "string_by_string", "many_in_a_call")
    for label, found in (("tokens", prepared_tokens), ("tokens of rows", row_tokens)):
        label = f"{label} per second, times as many"
        add_ratio(measurement, "string_by_string", "preparation", label, found / tokens)
    return measurement


def _prepare(file: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Callable[[], tuple[int, int]]:
    """Prepare a file from scratch, reading and writing included.

    Returns the tokens of its distinct texts, and those of all texts of its rows, which a loop over rows would tokenise.
    """

    def run() -> tuple[int, int]:
        shutil.rmtree(folder / "rate", ignore_errors=True)
        source = Source("rate", [file], "retrieval", "Retrieve.")
        (prepared,) = prepare([source], tokenizer, folder / "rate", PreparationOptions(instructions=False))
        of_rows = sum(int(prepared.lengths(rows.ravel()).sum()) for rows in prepared.rows.values())
        return prepared.description["tokens"], of_rows

    return run


def _point(rows: int, folder: Path) -> dict[str, Any]:
    MadeUpCorpus(rows).write(folder / f"{rows}.parquet")
    peak, said = _watch(["prepare", str(folder), str(rows)])
    _, opened = _watch(["open", str(folder), str(rows)])
    (folder / f"{rows}.parquet").unlink()
    known = {"axis": "corpus", "value": rows, "precision": None, "tokens": said["tokens"]}
    opening = {"opening_seconds": opened["seconds"], "opening_peak_mib": opened["peak_mib"]}
    opening["first_batch_seconds"] = opened["first_batch_seconds"]
    return {**known, **opening, "seconds": spread([said["seconds"]]), "before_mib": 0.0, "peak_mib": peak}


def _watch(arguments: list[str]) -> tuple[float, dict[str, Any]]:
    """Return the peak MiB of a process and its children, and what it wrote."""
    command = [sys.executable, "-m", "tests.benchmarks.preparation_point", *arguments]
    peak = 0
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _resident(watched))
            time.sleep(_POLL_SECONDS)
        lines = process.stdout.read().splitlines()
    if process.returncode:
        raise RuntimeError(f"preparation ended with status {process.returncode}")
    return peak / 2**20, json.loads(lines[-1])


def _resident(process: psutil.Process) -> int:
    """Return the bytes of a tree of processes; pages that several share, such as those of libraries, count once."""
    total = 0
    try:
        for each in (process, *process.children(recursive=True)):
            memory = each.memory_full_info()
            total += getattr(memory, "pss", memory.uss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        pass
    return total


class MadeUpCorpus:
    """A large made-up source, never held in memory. Its negatives are passages of other rows, as mined ones are."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.rows = rows
        generator = np.random.default_rng(seed)
        frequencies = 1 / np.arange(1, 27)
        alphabet = list("etaoinshrdlucmfwypvbgkjqxz")
        letters = generator.choice(alphabet, (50_000, 9), p=frequencies / frequencies.sum())
        words = ["".join(word)[: 2 + i % 8] for i, word in enumerate(letters)]
        # Zipf's law: a few words are most of a text, as in every language.
        self._text = " ".join(words[i] for i in generator.zipf(1.3, 400_000) % len(words))
        self._query_lengths = generator.lognormal(np.log(60), 0.4, rows).clip(10, 400).astype(int)
        self._lengths = generator.lognormal(np.log(200), 0.6, rows).clip(20, 4000).astype(int)
        self._starts = generator.integers(0, len(self._text) - 4000, (2, rows))
        self._generator = generator

    def passage(self, row: int) -> str:
        """The passage of a row, unlike every other by its number."""
        start = int(self._starts[0, row])
        return f"{row} {self._text[start : start + int(self._lengths[row])]}"

    def _query(self, row: int) -> str:
        start = int(self._starts[1, row])
        return f"{self._text[start : start + int(self._query_lengths[row])]} {row}"

    def write(self, path: Path) -> Path:
        """Write the rows to a parquet file."""
        write_parquet(path, self._tables())
        return path

    def _tables(self) -> Iterator[pa.Table]:
        for start in range(0, self.rows, ROW_GROUP_ROWS):
            rows = np.arange(start, min(start + ROW_GROUP_ROWS, self.rows))
            others = (rows + self._generator.integers(1, self.rows, (NEGATIVES, len(rows)))) % self.rows
            yield rows_table(
                [self._query(row) for row in rows],
                [self.passage(row) for row in rows],
                [[self.passage(row) for row in column] for column in others],
            )
