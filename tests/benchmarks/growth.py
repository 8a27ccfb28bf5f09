"""How time and memory grow with the batch, the length of the texts and the corpus.

Each point runs in a process of its own (``growth_point.py``): the peak of a process never falls again.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tests.benchmarks.hardware import available_memory
from tests.benchmarks.settings import Settings
from tests.benchmarks.suite import Suite
from tests.benchmarks.texts import NEGATIVES, write_texts

__all__ = ["run"]

_ROOT = Path(__file__).resolve().parents[2]
# A point that would need more than this share of the memory left is not tried.
_MEMORY_SHARE = 0.6
_ROWS_PER_GROUP = 10_000


def run(settings: Settings, suite: Suite) -> None:
    """Measures all points of all axes."""
    budget = settings.pick(quick=1024, cpu=4096, cuda=65536)
    tokens = settings.pick(quick=256, cpu=8192, cuda=131072)
    suite.notes += [
        f"Batch: one training step (losses and AdamW included) on rows of the published shape; at most {budget:,} "
        "tokens in one forward pass where the trainer can split it.",
        f"Length: one forward and backward pass over texts of one length, {tokens:,} tokens in all.",
        "Corpus: preparation of a parquet file with seven negatives a row (passages log-normal around 40 tokens, each "
        "also a negative of other rows), then the first batch of 512 rows.",
        "Memory is the peak above that of the process with its libraries and the model loaded.",
    ]
    precision = settings.precisions[0]
    with TemporaryDirectory() as folder:
        axes = {
            "batch": (
                settings.pick(quick=[2], cpu=[1, 2, 4, 8, 16, 32], cuda=[8, 16, 32, 64, 128]),
                {"max_tokens": budget},
            ),
            "length": (
                settings.pick(quick=[64], cpu=[64, 128, 256, 512, 1024, 2048], cuda=[128, 512, 2048, 8192]),
                {"tokens": tokens},
            ),
            "corpus": (settings.pick(quick=[100], cpu=[1000, 10_000, 100_000], cuda=[1000, 10_000, 100_000]), {}),
        }
        if settings.quick:
            # One process for all: most of its time goes into its imports.
            tasks = [_task(axis, values[0], more, precision, Path(folder)) for axis, (values, more) in axes.items()]
            for point in _measure(settings, tasks):
                suite.add_point(point)
        else:
            for axis, (values, more) in axes.items():
                _measure_axis(settings, suite, [_task(axis, value, more, precision, Path(folder)) for value in values])


def _task(axis: str, value: int, more: dict[str, int], precision: str, folder: Path) -> dict[str, Any]:
    return {"axis": axis, "value": value, "precision": precision, "folder": str(folder), **more}


def _measure_axis(settings: Settings, suite: Suite, tasks: list[dict[str, Any]]) -> None:
    """Measures one axis upwards, and stops where a point fails or would not fit into memory."""
    last: dict[str, Any] | None = None
    for task in tasks:
        what = f"growth with {task['axis']}, {task['value']:,} and beyond"
        expected = _expected_bytes(last, task)
        limit = _MEMORY_SHARE * (available_memory() or math.inf)
        if expected > limit:
            suite.skip(what, f"expected to need {expected / 2**30:.1f} GiB, more than {limit / 2**30:.1f}")
            return
        try:
            last = _measure(settings, [task])[0]
        except RuntimeError as error:
            suite.skip(what, str(error))
            return
        suite.add_point(last)


def _expected_bytes(last: dict[str, Any] | None, task: dict[str, Any]) -> float:
    """Memory of a point if it grows in line with the last; with length the number of tokens stays, and so does it."""
    if last is None:
        return 0.0
    growth = 1.0 if task["axis"] == "length" else task["value"] / last["value"]
    return (last["peak_mib"] - last["before_mib"]) * growth * 2**20


def _measure(settings: Settings, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs tasks in a new process."""
    for task in tasks:
        if task["axis"] == "corpus":
            _write_corpus(Path(task["folder"]) / f"{task['value']}.parquet", task["value"])
    request = json.dumps({"settings": asdict(settings), "tasks": tasks})
    command = [sys.executable, "-m", "tests.benchmarks.growth_point"]
    finished = subprocess.run(command, input=request, cwd=_ROOT, capture_output=True, text=True, check=False)
    if finished.returncode:
        last_line = (finished.stderr.strip().splitlines() or ["no message"])[-1][:300]
        raise RuntimeError(f"the process ended with status {finished.returncode}: {last_line}")
    return json.loads(finished.stdout.splitlines()[-1])


def _write_corpus(path: Path, rows: int) -> None:
    """A source in the published format whose negatives are passages of other rows, as mined negatives are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = np.random.default_rng(0)
    lengths = generator.lognormal(np.log(40), 0.6, rows).clip(4, 1024).astype(int)
    passages = np.array(write_texts(lengths, seed=1), dtype=object)
    queries = write_texts(generator.lognormal(np.log(16), 0.4, rows).clip(4, 64).astype(int), seed=2)
    writer = None
    for start in range(0, rows, _ROWS_PER_GROUP):
        chosen = np.arange(start, min(start + _ROWS_PER_GROUP, rows))
        columns = {"query": [queries[i] for i in chosen], "passage": passages[chosen].tolist()}
        for k in range(1, NEGATIVES + 1):
            columns[f"negative_{k}"] = passages[(chosen + generator.integers(1, rows, len(chosen))) % rows].tolist()
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()
