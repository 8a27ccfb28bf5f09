"""Tokenise the sources of a manifest for training. Finished, unchanged sources are kept; a killed run continues.

python training/prepare.py --manifest data/clean/manifest.yaml --tokenizer Qwen/Qwen3-0.6B --output data/prepared
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository is not an installed package

from training.common.command import command_parser, run_command
from training.common.errors import OutputError, UserError
from training.common.executor import read_executor
from training.common.outputs import check_output
from training.data.manifest import TASK_TYPES, load_manifest, select_sources
from training.data.preparation.pipeline import prepare
from training.data.preparation.plan import ON_BAD_ROW, PreparationOptions, least_negatives
from training.data.prepared import put_aside, sources_table
from training.data.survey import report, survey
from training.models.loading import load_tokenizer


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser("prepare.py", __doc__)
    add, defaults = parser.add_argument, PreparationOptions()
    add("--manifest", required=True, help="YAML file of the sources")
    add("--data-dir", help="folder or hf:// address of the files, instead of the manifest's")
    add("--stage", help="take the sources of this stage, under its caps")
    add("--dry-run", action="store_true", help="only show what would be read and what is missing")
    add("--tokenizer", help="name or folder of a tokenizer")
    add("--output", help="folder of the prepared sources")
    add("--sources", nargs="+", metavar="NAME", help="only these sources, * as in file names")
    add("--task-types", nargs="+", choices=TASK_TYPES, help="only sources of these types")
    add("--cap", type=int, help="maximum rows per source (deterministic sample)")
    add("--max-length", type=int, default=defaults.max_length, help="maximum tokens of a text")
    add("--raw", action="store_true", help="no instructions, as in stage 1")
    share, text = defaults.document_instruction_share, "share of a symmetric source's documents under the instruction"
    add("--document-instruction-share", type=float, default=share, help=text)
    add("--validation-share", type=float, default=defaults.validation_share)
    for task_type, number in defaults.num_hard_negatives:
        add(f"--num-hard-negatives-{task_type}", type=int, default=number, help="that are drawn from each row")
    add("--min-hard-negatives", type=int, help="that a row must have, if fewer than are drawn")
    add("--seed", type=int, default=defaults.seed)
    add("--on-bad-row", choices=ON_BAD_ROW, default=defaults.on_bad_row)
    add("--keep-texts", action="store_true", help="store texts beside tokens, for a teacher with another tokenizer")
    add("--text-forms", action="store_true", help="mark texts that differ only in spelling, for mask_duplicates")
    add("--document-scores", action="store_true", help="store scores of documents, for score_distillation_weight")
    add("--executor", help="local, ray, slurm or jobs; or JSON of name, workers and datatrove's keys")
    return parser


def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = make_parser().parse_args(words)
    return run_command(lambda: _dry_run(arguments) if arguments.dry_run else _prepare(arguments))


def _dry_run(arguments: argparse.Namespace) -> None:
    if arguments.sources or arguments.task_types or arguments.cap is not None:
        raise UserError("--dry-run looks at the whole manifest: leave out --sources, --task-types and --cap")
    sys.stdout.write(report(survey(arguments.manifest, arguments.data_dir, arguments.stage)) + "\n")


def _prepare(arguments: argparse.Namespace) -> None:
    for name in ("tokenizer", "output"):
        if getattr(arguments, name) is None:
            raise UserError(f"--{name} is missing; add it, or --dry-run to look only")
    if arguments.cap is not None and arguments.cap < 1:
        raise UserError(f"--cap must be at least 1, got {arguments.cap}")
    executor = read_executor(arguments.executor)
    sources = load_manifest(arguments.manifest, arguments.data_dir, arguments.stage)
    sources = select_sources(sources, arguments.sources, arguments.task_types)
    files = [file for source in sources for file in source.files if isinstance(file, Path)]
    check_output(Path(arguments.output), [Path(arguments.manifest), *files, Path(arguments.tokenizer)])
    if arguments.cap is not None:
        sources = [replace(source, cap=min(arguments.cap, source.cap or arguments.cap)) for source in sources]
    given = {key: value for key, value in vars(arguments).items() if key in PreparationOptions.__dataclass_fields__}
    names = [name for name, _ in PreparationOptions.num_hard_negatives]
    drawn = {name: getattr(arguments, f"num_hard_negatives_{name}") for name in names}
    counts = least_negatives(drawn, arguments.min_hard_negatives)
    options = PreparationOptions(**given, instructions=not arguments.raw, num_hard_negatives=counts)
    tokenizer = load_tokenizer(arguments.tokenizer)
    longest = tokenizer.model_max_length
    if options.max_length > longest:
        what = f"--max-length {options.max_length} is more than the {longest} tokens of a text that"
        raise UserError(f"{what} {arguments.tokenizer} reads; give --max-length {longest}")
    try:
        prepared = prepare(sources, tokenizer, arguments.output, options, executor)
    except OutputError as error:
        raise error.advising("give another --output") from None
    sys.stdout.write("\n".join([sources_table(prepared), *filter(None, map(put_aside, prepared))]) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
