"""Points that are measured in a process of their own: the peak memory of a process never falls again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import psutil
import torch

from tests.benchmarks.common import Settings, process_memory
from tests.benchmarks.timing import spread, time_call

_ROOT = Path(__file__).resolve().parents[2]
_POLL_SECONDS = 0.1


def measure_apart(function, settings, task, watch=False):
    """Measure a point in a new process, by ``MODULE.FUNCTION(settings, task)`` of this folder.

    With ``watch``, ``peak_mib`` is the peak of the process and its children, libraries included.

    Raises:
        RuntimeError: If the process fails.
    """
    command = [sys.executable, "-m", "tests.benchmarks.apart", function, json.dumps([asdict(settings), task])]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=_ROOT, **pipes) as process:
        peak = 0
        while watch and process.poll() is None:
            peak = max(peak, _resident(psutil.Process(process.pid)))
            time.sleep(_POLL_SECONDS)
        written, errors = process.communicate()
    if process.returncode:
        last_line = (errors.strip().splitlines() or ["no message"])[-1][:300]
        raise RuntimeError(f"the process ended with status {process.returncode}: {last_line}")
    point = json.loads(written.splitlines()[-1])
    return {**task, **point, **({"peak_mib": peak / 2**20} if watch else {})}


def _resident(process):
    """Return the bytes of a tree of processes; pages that several share, such as those of libraries, count once."""
    total = 0
    try:
        for each in (process, *process.children(recursive=True)):
            memory = each.memory_full_info()
            total += getattr(memory, "pss", memory.uss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        pass
    return total


def time_and_memory(work, repeats, where):
    """Return the seconds after one warm-up call, and the memory before and at the peak."""
    cuda = where.type == "cuda"
    before = torch.cuda.memory_allocated() / 2**20 if cuda else process_memory("VmRSS")
    work()
    seconds = [time_call(work)[0] for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else process_memory("VmHWM")
    return {"seconds": spread(seconds), "before_mib": before, "peak_mib": peak}


if __name__ == "__main__":
    module, function = sys.argv[1].split(".")
    known, task = json.loads(sys.argv[2])
    # JSON has lists for tuples.
    settings = Settings(**{key: tuple(value) if isinstance(value, list) else value for key, value in known.items()})
    if settings.quick:
        torch.set_num_threads(1)
    point = getattr(import_module(f"tests.benchmarks.{module}"), function)(settings, task)
    sys.stdout.write(json.dumps(point) + "\n")
