"""Writes an evaluation as a page that works from a file, as Markdown and as JSON, with its figures.

python training/evaluation/report.py FOLDER [--compare A B] [--manifest FILE] [--run RUN ...] [--output DIR]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training.common.command import run_command
from training.common.outputs import check_output
from training.common.run_folder import write_whole
from training.evaluation.compare import compare_models, comparison_as_dict
from training.evaluation.figures.curves import draw_curves
from training.evaluation.figures.dimensions import draw_dimensions
from training.evaluation.figures.languages import draw_languages
from training.evaluation.figures.learning import draw_learning
from training.evaluation.figures.pareto import draw_pareto
from training.evaluation.records import EXAMPLES, SCORES, Evaluation, load_evaluation
from training.evaluation.reporting.tables import comparison_table, evaluation_tables, summary_tables
from training.evaluation.reporting.writing import as_html, as_markdown, as_text
from training.evaluation.resources import training_rows
from training.evaluation.summary import Summary, as_dict, summarize
from training.evaluation.sweeps import finished_models

logger = logging.getLogger("training")


# What evaluations and reports write into a folder.
_OURS = (SCORES, EXAMPLES, "mteb", "report.html", "report.md", "report.json", "*.svg", "*.png", ".*")


def check_report_folder(folder: Path, reads: Iterable[Path] = (), option: str = "--output") -> None:
    """Refuses a folder for an evaluation or its report in which something would be lost.

    Args:
        folder: The folder.
        reads: Files and folders that are read.
        option: What the user has to change.

    Raises:
        UserError: If the folder is, holds or lies in something that is read, or holds something else than an
            evaluation or a report.
    """
    check_output(folder, reads, None if (folder / SCORES).exists() else _OURS, option)


def write_report(
    evaluation: Evaluation,
    output: Path,
    *,
    compare: tuple[str, str] | None = None,
    rows: Mapping[str, int] | None = None,
    runs: Sequence[Path] = (),
    title: str = "Evaluation",
) -> Path:
    """Writes ``report.html``, ``report.md``, ``report.json`` and the figures, as SVG and PNG, into a folder.

    Without matplotlib there are no figures, and the log says so.

    Args:
        evaluation: The scores.
        output: The folder; it is made.
        compare: Labels of two models to compare.
        rows: Training rows by language, for the resource classes.
        runs: Output folders of trainings whose curves are drawn.
        title: Title of the page.

    Returns:
        The page.

    Raises:
        UserError: If a model that is compared has no scores, or a run has no log.
    """
    output.mkdir(parents=True, exist_ok=True)
    summaries = [summarize(evaluation, model, rows) for model in finished_models(evaluation)]
    comparison = compare_models(evaluation, *compare) if compare else None
    tables = [] if comparison is None else [comparison_table(comparison)]
    tables += evaluation_tables(evaluation)
    for summary in summaries:
        tables += summary_tables(summary)
    if find_spec("matplotlib"):
        figures = _draw(evaluation, summaries, runs, output)
    else:
        figures = []
        logger.warning("the report has no figures: they need matplotlib, pip install matplotlib")
    write_whole(output / "report.html", as_html(title, tables, [each for each in figures if each.suffix == ".svg"]))
    write_whole(output / "report.md", as_markdown(title, tables, [each for each in figures if each.suffix == ".png"]))
    content = {
        "summaries": [as_dict(summary) for summary in summaries],
        "comparison": None if comparison is None else comparison_as_dict(comparison),
        "failures": evaluation.failures,
    }
    write_whole(output / "report.json", json.dumps(content, indent=1) + "\n")
    return output / "report.html"


def _draw(evaluation: Evaluation, summaries: Sequence[Summary], runs: Sequence[Path], output: Path) -> list[Path]:
    figures = [
        *draw_dimensions(evaluation, output),
        *draw_pareto(evaluation, output),
        *draw_learning(evaluation, output),
    ]
    for number, summary in enumerate(summaries):
        figures += draw_languages(summary, output, f"languages-{number}")
    for number, run in enumerate(runs):
        figures += draw_curves(run, output, f"curves-{number}")
    return figures


def comparison_text(evaluation: Evaluation, first: str, second: str) -> str:
    """The paired test of two models as a table for a terminal.

    Raises:
        UserError: As :func:`~training.evaluation.compare.compare_models`.
    """
    return as_text(comparison_table(compare_models(evaluation, first, second)))


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command line; see :func:`~training.common.command.run_command` for its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of an evaluation")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="labels of two models")
    parser.add_argument("--manifest", type=Path, help="of the training, whose rows make the resource classes")
    parser.add_argument("--run", nargs="+", type=Path, default=[], help="output_dir of trainings, for their curves")
    parser.add_argument("--output", type=Path, help="where to write; FOLDER if left out")
    given = parser.parse_args(words)

    def work() -> None:
        evaluation = load_evaluation(given.folder)
        if given.output and given.output.resolve() != given.folder.resolve():
            check_report_folder(given.output, [given.folder / SCORES, *([given.manifest] if given.manifest else [])])
        page = write_report(
            evaluation,
            given.output or given.folder,
            compare=tuple(given.compare) if given.compare else None,
            rows=training_rows(given.manifest) if given.manifest else None,
            runs=given.run,
        )
        if given.compare:
            sys.stdout.write(f"{comparison_text(evaluation, *given.compare)}\n\n")
        sys.stdout.write(f"{page}\n")

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
