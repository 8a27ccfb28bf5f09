"""Mine hard negatives for the sources of a manifest.

python training/mine.py --manifest data/manifest.yaml --model codefuse-ai/F2LLM-v2-0.6B --output data/mined
"""

from __future__ import annotations

import argparse
import sys
from argparse import BooleanOptionalAction
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository is not an installed package

from transformers.utils.logging import disable_progress_bar

from training.common.command import command_parser, run_command
from training.common.errors import UserError
from training.common.executor import Executor, read_executor
from training.data.manifest import load_manifest, require_local, select_sources
from training.data.mining.mining import Resources, mine
from training.data.mining.search import SEARCHES, MiningOptions, bitext_sources
from training.models.devices import choose_devices, with_all_processes
from training.models.encoders import find_miner
from training.models.rerankers import find_reranker


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser("mine.py", __doc__)
    parser.add_argument("--manifest", type=Path, required=True, help="sources in the published format")
    parser.add_argument("--model", required=True, help="any SentenceTransformer: a folder or a Hub name")
    parser.add_argument("--output", type=Path, required=True, help="folder of the mined sources")
    parser.add_argument("--data-dir", help="folder of the files, instead of the manifest's")
    parser.add_argument("--sources", nargs="+", help="mine these (`*` as in file names; default: retrieval sources)")

    group = parser.add_argument_group("negatives (defaults: the published thresholds)")
    for each in fields(MiningOptions):
        option, default = f"--{each.name.replace('_', '-')}", each.default
        kind = {"action": BooleanOptionalAction} if isinstance(default, bool) else {"type": type(default)}
        group.add_argument(option, default=default, help=f"{each.metadata['help']} (%(default)s)", **kind)
    group.add_argument("--reranker", help="CrossEncoder that refuses candidates: a folder or a Hub name")

    group = parser.add_argument_group("cross-lingual guard: a translation of the positive or query is never a negative")
    group.add_argument("--bitext", nargs="+", help="sources of translations (default: all symmetric retrieval sources)")
    group.add_argument("--no-guard", action="store_true", help="treat no pairs as translations")

    group = parser.add_argument_group("model (data type, batch size and code hold for the reranker, too)")
    group.add_argument("--max-length", type=int, help="maximum tokens per text")
    group.add_argument("--truncate-dim", type=int, help="leading dimensions used")
    group.add_argument("--dtype", default="float32", help="of the weights: float32 (default), bfloat16 or float16")
    group.add_argument("--batch-size", type=int, default=32, help="texts at once (%(default)s)")
    trust = "run code that comes with the model; it can do and read all that you can, your Hub token included"
    group.add_argument("--trust-remote-code", action="store_true", help=trust)

    group = parser.add_argument_group("resources")
    group.add_argument("--cache", type=Path, help="folder of cached embeddings (default: in the output folder)")
    most, at_once = Resources.max_corpus_in_memory, "passages searched at once; more are searched N by N (%(default)s)"
    group.add_argument("--max-corpus-in-memory", type=int, default=most, metavar="N", help=at_once)
    group.add_argument("--search", choices=SEARCHES, default=Resources.search, help="(%(default)s)")
    devices = "encode on all of these, such as cuda:0 cuda:1 or cpu cpu (default: all CUDA devices)"
    group.add_argument("--devices", nargs="+", metavar="DEVICE", help=devices)
    group.add_argument("--executor", help="local, ray, slurm, jobs, or JSON with name, workers and datatrove's keys")
    return parser


def main(words: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = make_parser().parse_args(words)
    disable_progress_bar()
    return with_all_processes(lambda: run_command(lambda: _run(arguments)))


def _run(arguments: argparse.Namespace) -> None:
    given = vars(arguments)
    sources = load_manifest(arguments.manifest, arguments.data_dir)
    require_local(sources)
    # The negatives of clustering and classification are texts of other classes, which scores do not tell.
    chosen = select_sources(sources, arguments.sources, None if arguments.sources else ["retrieval"])
    bitext = select_sources(sources, arguments.bitext) if arguments.bitext else bitext_sources(sources)
    model = {key: given[key] for key in ("max_length", "truncate_dim", "dtype", "batch_size", "trust_remote_code")}
    options = MiningOptions(**{each.name: given[each.name] for each in fields(MiningOptions)})
    executor = read_executor(arguments.executor) or Executor()
    resources = Resources(arguments.cache, arguments.max_corpus_in_memory, arguments.search, executor)
    one_worker = executor.name == "local" and executor.workers in (None, 1)
    if arguments.devices and not one_worker:
        raise UserError("--devices: is for one worker of the local executor; take --executor or --devices out")
    devices = choose_devices(arguments.devices) if one_worker else ()
    others = [source for source in sources if source not in chosen]
    guard = {"bitext": [] if arguments.no_guard else bitext, "others": others}
    miner, shared = find_miner(arguments.model, **model, devices=devices), ("dtype", "batch_size", "trust_remote_code")
    if arguments.reranker:
        guard["reranker"] = find_reranker(arguments.reranker, **{key: given[key] for key in shared})
    mine(chosen, miner, arguments.output, options, **guard, resources=resources, manifest=arguments.manifest)


if __name__ == "__main__":
    raise SystemExit(main())
