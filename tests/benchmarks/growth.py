"""How time and memory grow with the batch and the length of the texts (``preparation.py``: and with the corpus).

Each point runs in a process of its own (``growth_point.py``): the peak of a process never falls again.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.benchmarks.hardware import available_memory
from tests.benchmarks.settings import Settings
from tests.benchmarks.suite import Suite

__all__ = ["measure_apart", "run"]

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
        "Memory is the peak above that of the process with its libraries and the model loaded.",
    ]
    precision = settings.precisions[0]
    axes = {
        "batch": (
            settings.pick(quick=[2], cpu=[1, 2, 4, 8, 16, 32], cuda=[8, 16, 32, 64, 128]),
            {"max_tokens": budget},
        ),
        "length": (
            settings.pick(quick=[64], cpu=[64, 128, 256, 512, 1024, 2048], cuda=[128, 512, 2048, 8192]),
            {"tokens": tokens},
        ),
    }
    if settings.quick:
        # One process for all: most of its time goes into its imports.
        tasks = [_task(axis, values[0], more, precision) for axis, (values, more) in axes.items()]
        for point in measure_apart("growth_point", settings, tasks):
            suite.add_point(point)
        return
    for axis, (values, more) in axes.items():
        _measure_axis(settings, suite, [_task(axis, value, more, precision) for value in values])


def _task(axis: str, value: int, more: dict[str, int], precision: str) -> dict[str, Any]:
    return {"axis": axis, "value": value, "precision": precision, **more}


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
            last = measure_apart("growth_point", settings, [task])[0]
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


def measure_apart(module: str, settings: Settings, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs tasks in a new process, by a module of this folder.

    Raises:
        RuntimeError: If the process fails.
    """
    request = json.dumps({"settings": asdict(settings), "tasks": tasks})
    command = [sys.executable, "-m", f"tests.benchmarks.{module}"]
    finished = subprocess.run(command, input=request, cwd=_ROOT, capture_output=True, text=True, check=False)
    if finished.returncode:
        last_line = (finished.stderr.strip().splitlines() or ["no message"])[-1][:300]
        raise RuntimeError(f"the process ended with status {finished.returncode}: {last_line}")
    return json.loads(finished.stdout.splitlines()[-1])
