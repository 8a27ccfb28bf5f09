"""One command for the first minutes on a GPU: is everything equal there, and how fast is it?

    python tests/benchmarks/gpu.py [--output runs/gpu] [--minutes 9.5]

Needs torch, transformers, sentence-transformers, peft and numpy with what they bring, and no network. Every part runs
in a process of its own with a limit on its time, and results.json, results.md and log.txt are written after each, so
that what fails or takes too long costs itself only. ``--tiny`` runs the same code with tiny shapes on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.gpu_report import draw, failures, markdown, matrix_rate

_SHAPES = ("f2llm-v2-80m", "f2llm-v2-330m", "f2llm-v2-0.6b", "f2llm-v2-4b")
# Name → module and function, its arguments, and the seconds that it may take on an H200.
PARTS = {
    # Nobody loads libraries ahead of the first, which may find a cold disk.
    "rate": ("gpu_checks.rate", (), 90),
    "equality": ("gpu_checks.equality", (), 90),
    **{f"training {name}": ("gpu_speed.training", (name,), 90) for name in _SHAPES},
    **{f"encoding {name}": ("gpu_speed.encoding", (name,), 60) for name in _SHAPES},
    "growth": ("gpu_speed.growth", (_SHAPES[0],), 60),
    "lora": ("gpu_speed.lora", (_SHAPES[2],), 90),
}
# Chunks differ in size: without the last, the allocator's holes would cost memory that a plan counts on.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
# Tiny shapes are all alike.
_ONCE = ("rate", "equality", f"training {_SHAPES[0]}", f"encoding {_SHAPES[0]}", "growth", "lora")


def make_parser():
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help=f"of these, in quotes: {', '.join(PARTS)}"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.5, help="time for all parts together")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes in one process, to see that everything runs")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser


def main(arguments=None):
    """Run the parts; 1 if one failed or something was not equal."""
    args = make_parser().parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.part:
        # What a part needs follows once the one before it has ended; libraries are loaded meanwhile.
        _run_part(args.part, args.output, args.tiny, lambda: json.loads(sys.stdin.readline()))
        return 0
    chosen = args.only or (_ONCE if args.tiny else PARTS)
    # The rate is always measured: all fractions are of it.
    begun, names = time.monotonic(), [name for name in PARTS if name == "rate" or name in chosen]
    results = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "tiny": args.tiny, "parts": {}}
    processes = [] if args.tiny else [_start(names[0], args.output)]
    for position, name in enumerate(names):
        left = 60 * args.minutes - (time.monotonic() - begun)
        if left <= 0:
            results["parts"][name] = {"seconds": 0.0, "ended": "not begun: the time was over", "records": []}
            continue
        limit = min(PARTS[name][2], left)
        told = {"rate": matrix_rate(results), "limit": limit}
        part_begun, ended = time.monotonic(), None
        _records_file(name, args.output).unlink(missing_ok=True)
        if args.tiny:
            _run_part(name, args.output, True, lambda told=told: told)
        else:
            processes += [_start(following, args.output) for following in names[position + 1 : position + 2]]
            ended = finish(processes.pop(0), told, limit)
        results["parts"][name] = {
            "seconds": round(time.monotonic() - part_begun, 1),
            "ended": ended,
            "records": _read_records(name, args.output),
        }
        _write(results, args.output)
        print(f"{name}: {results['parts'][name]['seconds']:.0f} s {ended or ''}", file=sys.stderr, flush=True)
    for process in processes:
        _kill(process)
    results["figure"] = draw(results, args.output / "figure.png")
    _write(results, args.output)
    print(markdown(results))
    return int(bool(failures(results)))


def _run_part(name, output, tiny, ask):
    """Run one part in this process; each record is a line of a file, which outlives the process."""
    path, arguments, _ = PARTS[name]
    module, function = path.split(".")
    run = getattr(import_module(f"tests.benchmarks.{module}"), function)
    import torch

    from tests.benchmarks.gpu_common import Bench

    if not tiny:
        # Collections, which free memory of the GPU between measurements, need not look at what was imported.
        gc.freeze()
    told = ask()
    with (
        _records_file(name, output).open("a") as records,
        torch.compiler.set_stance("force_eager") if tiny else nullcontext(),
    ):

        def emit(record):
            records.write(json.dumps(record) + "\n")
            records.flush()

        bench = Bench(emit, tiny, told["rate"], time.monotonic() + told["limit"])
        # What is outside of the attempts: building a model, for one.
        bench.attempt({"way": "whole part"}, lambda: run(bench, *arguments) or {"done": True})


def _records_file(name, output):
    return output / f".{name.replace(' ', '-')}.jsonl"


def _read_records(name, output):
    """Records of a part, but for a last line that was cut off."""
    path = _records_file(name, output)
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def _start(name, output):
    """Start the process of a part, which loads its libraries and waits."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--output", str(output)]
    with (output / "log.txt").open("a") as log:
        return start(command, log)


def start(command, log):
    """Start a process that heads a group of its own, so that what it starts ends with it."""
    streams = {"stdin": subprocess.PIPE, "stdout": log, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, start_new_session=True, env={**os.environ, **_ENVIRONMENT}, **streams)


def finish(process, told, limit):
    """Tell a process what it waits for, await its end, and return why it ended early, if it did."""
    try:
        process.communicate(json.dumps(told) + "\n", timeout=limit)
    except subprocess.TimeoutExpired:
        _kill(process)
        return f"stopped after its {limit:.0f} s"
    return None if process.returncode == 0 else f"ended with status {process.returncode}; see log.txt"


def _kill(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _write(results, output):
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (output / "results.md").write_text(markdown(results))


if __name__ == "__main__":
    sys.exit(main())
