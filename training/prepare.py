"""The command line of ``prepare.py``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

# Run as a script from a checkout: the recipe is not an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import AutoConfig, PreTrainedTokenizerBase

from training.common.command import run_command
from training.common.errors import OutputError, UserError
from training.common.executor import read_executor
from training.common.outputs import check_output
from training.data.manifest import load_manifest, select_sources
from training.data.manifest_file import TASK_TYPES
from training.data.options import ON_BAD_ROW, PreparationOptions
from training.data.preparation.pipeline import prepare
from training.data.prepared import PreparedSource, put_aside
from training.data.survey import survey
from training.data.survey_report import report
from training.models.tokenizer import load_tokenizer


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status, as :func:`~training.common.command.run_command` has it."""
    arguments = _parser().parse_args(words)

    def work() -> None:
        try:
            (_look if arguments.dry_run else _prepare)(arguments)
        except OutputError as error:
            raise error.advising("give another --output") from None
        except UserError as error:
            raise UserError(_with_options(str(error), vars(arguments))) from None

    return run_command(work)


def _with_options(message: str, options: Collection[str]) -> str:
    """A message about the keys of a recipe with those that are options here written as such.

    Example:
        >>> _with_options("max_length is 0; give on_bad_row: quarantine", ["max_length", "on_bad_row"])
        '--max-length is 0; give --on-bad-row quarantine'
    """
    # Not single words, which may be anything, nor parts of paths.
    names = "|".join(name for name in options if "_" in name)
    message = re.sub(rf"'({names}): ([^']*)'", r"\1: \2", message)
    key = rf"(?:\bkey )?(?<![\w./-])'?({names})'?(?![\w./-])(?:: )?"
    return re.sub(key, lambda found: f"--{found[1].replace('_', '-')}" + " " * found[0].endswith(": "), message)


def _look(arguments: argparse.Namespace) -> None:
    if arguments.sources or arguments.task_types or arguments.cap is not None:
        raise UserError("--dry-run looks at the whole manifest: leave out --sources, --task-types and --cap")
    sys.stdout.write(report(survey(arguments.manifest, arguments.data_dir, arguments.stage)) + "\n")


def _parser() -> argparse.ArgumentParser:
    defaults = PreparationOptions()
    parser = argparse.ArgumentParser(
        prog="prepare.py",
        description="Tokenises the sources of a manifest for training. Finished, unchanged sources are kept, and a run "
        "that was killed goes on where it was.",
        allow_abbrev=False,
    )
    parser.add_argument("--manifest", required=True, help="YAML file of the sources")
    parser.add_argument("--data-dir", help="folder or hf:// address of the files, instead of the manifest's own")
    parser.add_argument("--stage", help="take the sources of this stage, under its caps")
    parser.add_argument("--dry-run", action="store_true", help="show what would be read and what is missing; no more")
    parser.add_argument("--tokenizer", help="name or folder of a tokenizer")
    parser.add_argument("--output", help="folder of the prepared sources")
    parser.add_argument("--sources", nargs="+", metavar="NAME", help="these sources only, * as in file names")
    parser.add_argument("--task-types", nargs="+", choices=TASK_TYPES, help="sources of these types only")
    parser.add_argument("--cap", type=int, help="rows per source at most, drawn by key")
    parser.add_argument("--max-length", type=int, default=defaults.max_length, help="tokens of a text at most")
    parser.add_argument("--raw", action="store_true", help="no instructions, as in stage 1")
    parser.add_argument(
        "--document-instruction-share",
        type=float,
        default=defaults.document_instruction_share,
        help="share of the documents of symmetric sources that carry the instruction too",
    )
    parser.add_argument("--validation-share", type=float, default=defaults.validation_share)
    for task_type, number in defaults.num_hard_negatives:
        parser.add_argument(f"--num-hard-negatives-{task_type}", type=int, default=number, help="that rows must have")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--on-bad-row", choices=ON_BAD_ROW, default=defaults.on_bad_row)
    parser.add_argument(
        "--keep-texts", action="store_true", help="keep texts beside their tokens, for a teacher of another tokenizer"
    )
    parser.add_argument("--text-forms", action="store_true", help="tell texts in another spelling, for mask_duplicates")
    parser.add_argument("--executor", help="local, ray, slurm or jobs; or JSON of name, workers and datatrove's keys")
    return parser


def _prepare(arguments: argparse.Namespace) -> None:
    for name in ("tokenizer", "output"):
        if getattr(arguments, name) is None:
            raise UserError(f"--{name} is missing; add it, or --dry-run to look only")
    executor = read_executor(arguments.executor)
    sources = load_manifest(arguments.manifest, arguments.data_dir, arguments.stage)
    sources = select_sources(sources, arguments.sources, arguments.task_types)
    files = [file for source in sources for file in source.files if isinstance(file, Path)]
    check_output(Path(arguments.output), [Path(arguments.manifest), *files, Path(arguments.tokenizer)])
    if arguments.cap is not None and arguments.cap < 1:
        raise UserError(f"--cap must be at least 1, got {arguments.cap}")
    if arguments.cap is not None:
        sources = [replace(source, cap=min(arguments.cap, source.cap or arguments.cap)) for source in sources]
    types = [task_type for task_type, _ in PreparationOptions().num_hard_negatives]
    options = PreparationOptions(
        max_length=arguments.max_length,
        instructions=not arguments.raw,
        document_instruction_share=arguments.document_instruction_share,
        validation_share=arguments.validation_share,
        num_hard_negatives=tuple((name, getattr(arguments, f"num_hard_negatives_{name}")) for name in types),
        seed=arguments.seed,
        on_bad_row=arguments.on_bad_row,
        keep_texts=arguments.keep_texts,
        text_forms=arguments.text_forms,
    )
    tokenizer = load_tokenizer(arguments.tokenizer)
    longest = _longest(arguments.tokenizer, tokenizer)
    if arguments.max_length > longest:
        raise UserError(
            f"--max-length {arguments.max_length} is more than the {longest} tokens of a text that "
            f"{arguments.tokenizer} reads; give --max-length {longest}"
        )
    prepared = prepare(sources, tokenizer, arguments.output, options, executor)
    sys.stdout.write(_summary(prepared))


def _longest(name: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a text that a tokenizer reads, and the model beside it, if there is one."""
    try:
        positions = AutoConfig.from_pretrained(name, trust_remote_code=False).max_position_embeddings
    # A tokenizer alone, or the model of another library; the tokenizer is what matters here.
    except Exception:
        return tokenizer.model_max_length
    return min(positions, tokenizer.model_max_length)


def _summary(prepared: Sequence[PreparedSource]) -> str:
    """A line for each source, the sum, and what was put aside."""
    lines = [f"{'source':<32}{'train':>12}{'validation':>12}{'texts':>12}{'tokens':>16}{'aside':>8}"]
    totals = [0] * 5
    for source in prepared:
        about = source.description
        aside = sum(about["quarantined"].values())
        numbers = [about["rows"]["train"], about["rows"]["validation"], about["texts"], about["tokens"], aside]
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        lines.append(_line(source.name, numbers))
    lines.append(_line("all", totals))
    lines += [line for line in map(put_aside, prepared) if line]
    return "\n".join(lines) + "\n"


def _line(name: str, numbers: Sequence[int]) -> str:
    widths = (12, 12, 12, 16, 8)
    return f"{name:<32}" + "".join(f"{number:>{width},}" for number, width in zip(numbers, widths, strict=True))


if __name__ == "__main__":
    raise SystemExit(main())
