"""Preparation at scale: tokens per second beside a loop over strings, and time and memory as the rows grow.

Each size is prepared in a process of its own, whose memory, that of its worker processes included, is watched.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from transformers import PreTrainedTokenizerBase

from tests.benchmarks.corpus import MadeUpCorpus
from tests.benchmarks.settings import Settings
from tests.benchmarks.suite import Suite
from tests.benchmarks.timing import Contestant, add_ratio, measure, spread

__all__ = ["run"]

_ROOT = Path(__file__).resolve().parents[2]
_POLL_SECONDS = 0.1


def run(settings: Settings, suite: Suite) -> None:
    """Times both ways to tokenise, then prepares larger and larger sources."""
    from training.models.tokenizer import train_tokenizer

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
    """Tokens of the same texts, string by string, in calls of many, and by preparation from parquet to disk."""
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
    for name in contestants:
        own = prepared_tokens if name == "preparation" else tokens
        seconds = measurement["contestants"][name]["median"]
        measurement["facts"][f"{name}, tokens per second"] = int(own / seconds)
    seconds = measurement["contestants"]["preparation"]["median"]
    measurement["facts"]["preparation, tokens of rows per second"] = int(row_tokens / seconds)
    add_ratio(measurement, "string_by_string", "many_in_a_call")
    add_ratio(
        measurement, "string_by_string", "preparation", "tokens per second, times as many", prepared_tokens / tokens
    )
    add_ratio(
        measurement, "string_by_string", "preparation", "tokens of rows per second, times as many", row_tokens / tokens
    )
    return measurement


def _prepare(file: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Callable[[], tuple[int, int]]:
    """Prepares a file from scratch, reading and writing included.

    Returns the tokens of its distinct texts, and those of all texts of its rows, which a loop over rows would tokenise.
    """
    import shutil

    from training.data.manifest import Source
    from training.data.options import PreparationOptions
    from training.data.preparation.pipeline import prepare

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
    return {
        "axis": "corpus",
        "value": rows,
        "precision": None,
        "tokens": said["tokens"],
        "seconds": spread([said["seconds"]]),
        "opening_seconds": opened["seconds"],
        "opening_peak_mib": opened["peak_mib"],
        "first_batch_seconds": opened["first_batch_seconds"],
        "before_mib": 0.0,
        "peak_mib": peak,
    }


def _watch(arguments: list[str]) -> tuple[float, dict[str, Any]]:
    """Peak MiB of a process and its children, and what it wrote."""
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
    """Bytes of a tree of processes; pages that several share, such as those of libraries, count once."""
    total = 0
    try:
        for each in (process, *process.children(recursive=True)):
            memory = each.memory_full_info()
            total += getattr(memory, "pss", memory.uss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        pass
    return total
