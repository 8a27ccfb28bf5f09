"""Writes an evaluation as one self-contained page: python training/evaluation/report.py FOLDER [--compare A B]."""

from __future__ import annotations

import argparse
import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training.checkpoints import write_whole
from training.data.command import run_command
from training.evaluation.compare import compare_models, comparison_as_dict
from training.evaluation.figures.curves import draw_curves
from training.evaluation.figures.dimensions import draw_dimensions
from training.evaluation.figures.languages import draw_languages
from training.evaluation.figures.pareto import draw_pareto
from training.evaluation.records import Evaluation, load_evaluation
from training.evaluation.selection import labels
from training.evaluation.summary import as_dict, summarize

__all__ = ["main", "write_report"]

_STYLE = "body{font-family:sans-serif}table{border-collapse:collapse}td,th{border:1px solid #999;padding:2px 8px}"


def write_report(
    evaluation: Evaluation,
    output: Path,
    *,
    compare: tuple[str, str] | None = None,
    rows: dict[str, int] | None = None,
    runs: Sequence[Path] = (),
    title: str = "Evaluation",
) -> Path:
    """Writes ``report.html`` and ``report.json``, and the figures, into a folder; returns the page.

    Raises:
        UserError: If a model that is compared has no scores, or matplotlib is missing.
    """
    summaries = [summarize(evaluation, model, rows) for model in labels(evaluation)]
    compared = comparison_as_dict(compare_models(evaluation, *compare)) if compare else None
    figures = [*draw_dimensions(evaluation, output), *draw_pareto(evaluation, output)]
    for number, summary in enumerate(summaries):
        figures += draw_languages(summary, output, f"languages-{number}")
    for number, run in enumerate(runs):
        figures += draw_curves(run, output, f"curves-{number}")
    parts = []
    for summary in summaries:
        tasks = [[t.task, f"{100 * t.value:.1f}", t.examples] for t in summary.tasks]
        parts.append(_table(f"{summary.model}: tasks", ["task", "score (%)", "examples"], tasks))
        languages = [[g.name, f"{100 * g.macro:.1f}", g.examples] for g in summary.languages]
        parts.append(_table(f"{summary.model}: languages", ["language", "score (%)", "examples"], languages))
    if compared:
        verdicts = [[t["task"], t["verdict"]] for t in compared["tasks"]] + [["overall", compared["verdict"]]]
        parts.append(_table(f"{compare[0]} against {compare[1]}", ["task", "verdict"], verdicts))
    for file in figures:
        if file.suffix == ".svg":
            text = file.read_text(encoding="utf-8")
            parts.append(text[text.index("<svg") :])
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    write_whole(output / "report.html", f"{head}<h1>{html.escape(title)}</h1>{''.join(parts)}\n")
    content = {"summaries": [as_dict(s) for s in summaries], "comparison": compared, "failures": evaluation.failures}
    write_whole(output / "report.json", json.dumps(content, indent=1) + "\n")
    return output / "report.html"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<h2>{html.escape(title)}</h2><table><tr>{names}</tr>{body}</table>"


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of an evaluation")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="labels of two models")
    parser.add_argument("--run", nargs="*", type=Path, default=[], help="output_dir of trainings, for their curves")
    given = parser.parse_args(words)
    pair = tuple(given.compare) if given.compare else None
    return run_command(lambda: write_report(load_evaluation(given.folder), given.folder, compare=pair, runs=given.run))


if __name__ == "__main__":
    sys.exit(main())
