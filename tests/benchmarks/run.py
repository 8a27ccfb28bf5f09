"""Measures F2LLMModel beside stock Qwen3Model, in one run on one machine, and prints one JSON object.

    python tests/benchmarks/run.py [--repeats 3] [--only step encode] [--compile]

Ratios are stock time / our time: above 1 we are faster. They hold for the machine that is named beside them.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tests.benchmarks import encode, step
from tests.benchmarks.hardware import describe_hardware

SUITES: dict[str, Callable[[torch.dtype, bool], dict[str, dict[str, Callable[[], Any]]]]] = {
    "step": step.cases,
    "encode": encode.cases,
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(case: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Times ``ours`` and ``stock`` in turn, so that both see the same disturbances; seconds, medians and ranges."""
    seconds: dict[str, list[float]] = {name: [] for name in case}
    for function in case.values():
        function()
    for _ in range(repeats):
        for name, function in case.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    ratios = [stock / ours for ours, stock in zip(seconds["ours"], seconds["stock"], strict=True)]
    return {
        **{f"{name}_seconds": round(statistics.median(values), 4) for name, values in seconds.items()},
        "ratio": round(statistics.median(ratios), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def main() -> None:
    """Runs the suites that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(SUITES), default=list(SUITES))
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--compile", action="store_true", help="measure F2LLMModel(config, compile=True)")
    arguments = parser.parse_args()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    result: dict[str, Any] = {
        "hardware": describe_hardware(),
        "repeats": arguments.repeats,
        "compile": arguments.compile,
    }
    for suite in arguments.only:
        result[suite] = {
            precision: {
                name: measure(case, arguments.repeats)
                for name, case in SUITES[suite](PRECISIONS[precision], arguments.compile).items()
            }
            for precision in arguments.precisions
        }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
