"""Measures F2LLMModel beside stock implementations, side by side in one run.

    python tests/benchmarks/run.py [--only step encode] [--repeats 3] [--output runs/benchmarks]

Writes results.json and results.md. What the suites measure and how to
read them stands in README.md beside this file. Figures hold for the machine that is named in them.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import time
import traceback
import warnings
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tests.benchmarks.common import DISTRIBUTIONS, PRECISIONS, VOCAB_SIZE, Settings, build_models, describe_hardware
from tests.benchmarks.report import markdown
from tests.benchmarks.timing import Suite
from training.common.outputs import check_output

# Modules of this folder, each with a function run(settings, suite) that fills the suite in.
SUITES = (
    *("step", "trainer", "encode", "rate", "loss", "growth"),
    *("preparation", "pruning", "distillation", "evaluation", "scale"),
)
_PACKAGES = ("torch", "transformers", "sentence-transformers", "datasets", "numpy")


def make_parser():
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SUITES, default=list(SUITES), help="suites to run")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds of each comparison")
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--size", help="published shape; f2llm-v2-80m on a CPU and f2llm-v2-0.6b on a GPU if left out")
    parser.add_argument("--step-layers", type=int, help="layers of the model in step and trainer, if not all")
    parser.add_argument("--rows", type=int, help="rows of the training batch; 8 on a CPU and 16 on a GPU if left out")
    compiled = {"action": argparse.BooleanOptionalAction, "default": True}
    parser.add_argument("--compile", **compiled, help="measure it compiled too")
    parser.add_argument("--distributions", nargs="+", choices=list(DISTRIBUTIONS), help="of lengths in encode; all")
    parser.add_argument("--openvino-python", metavar="PATH", help="interpreter with sentence-transformers[openvino]")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    return parser


def main(arguments=None):
    """Run the suites that the command line names; 1 if one of them failed."""
    chosen = vars(make_parser().parse_args(arguments))
    suites, output = chosen.pop("only"), chosen.pop("output")
    # In the order of the tables, whatever the order on the command line.
    chosen["precisions"] = tuple(name for name in PRECISIONS if name in chosen["precisions"])
    chosen["distributions"] = tuple(chosen["distributions"] or ())
    settings, failed = Settings(**chosen), False
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    check_output(output, ours=["results.*", ".*"])
    output.mkdir(parents=True, exist_ok=True)
    if settings.quick:
        # At tiny sizes threads mostly wait for one another.
        torch.set_num_threads(1)
    parameters = build_models(settings)["ours"].num_parameters()
    results = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": describe_hardware(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}},
        "settings": asdict(settings),
        "model": {"name": settings.family_name, "parameters": parameters, "vocabulary": VOCAB_SIZE},
        "suites": {},
    }

    def write():
        """Write both files after each result, so that a run that is cut short leaves what it has."""
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (output / "results.md").write_text(markdown(results))

    for name in suites:
        start = time.perf_counter()
        suite = Suite(on_result=write)
        results["suites"][name] = suite.results()
        try:
            import_module(f"tests.benchmarks.{name}").run(settings, suite)
        except Exception as error:
            # One suite that fails must not cost the results of the others; an optional package may be missing.
            failed |= not isinstance(error, ImportError)
            traceback.print_exc()
            suite.skip(name, f"{type(error).__name__}: {error}")
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        write()
    print(markdown(results))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
