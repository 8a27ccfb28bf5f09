"""Report of an evaluation: tables and figures as one HTML page, as Markdown and as JSON."""

from __future__ import annotations

import json
import logging
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from jinja2 import Environment

from training.common.outputs import check_output, write_whole
from training.evaluation.figures.plots import draw_curves, draw_dimensions, draw_languages, draw_learning, draw_pareto
from training.evaluation.records import (
    EXAMPLES,
    PRECISIONS,
    SCORES,
    Evaluation,
    bytes_per_vector,
    finished_models,
    load_evaluation,
    view_means,
)
from training.evaluation.significance import Comparison, Interval, PairedTest, compare_models
from training.evaluation.summary import Summary, as_dict, summarize, training_rows

logger = logging.getLogger("training")

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
# Files that evaluations and reports write into a folder.
_OURS = (SCORES, EXAMPLES, "mteb", "report.html", "report.md", "report.json", "*.svg", "*.png", ".*")

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table; floats are shown with one decimal, None is unknown."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[Cell, ...]]


def check_report_folder(folder: Path, reads: Iterable[Path] = (), option: str = "--output") -> None:
    """Refuse a folder for an evaluation or a report if it holds something else, or overlaps with what is read."""
    check_output(folder, reads, None if (folder / SCORES).exists() else _OURS, option)


def write_report(
    evaluation: Evaluation,
    output: Path,
    *,
    compare: Sequence[str] | None = None,
    rows: Mapping[str, int] | None = None,
    runs: Sequence[Path] = (),
    title: str = "Evaluation",
) -> Path:
    """Write ``report.html``, ``report.md``, ``report.json`` and the figures (SVG, PNG); return the HTML page.

    The report compares two models by label, and has resource classes by training rows and loss curves of runs if given.
    """
    output.mkdir(parents=True, exist_ok=True)
    summaries = [summarize(evaluation, model, rows) for model in finished_models(evaluation)]
    comparison = compare_models(evaluation, *compare) if compare else None
    tables = [comparison_table(comparison)] if comparison else []
    tables += evaluation_tables(evaluation)
    tables += [table for summary in summaries for table in summary_tables(summary)]
    figures: list[Path] = []
    if find_spec("matplotlib"):
        figures += [path for draw in (draw_dimensions, draw_pareto, draw_learning) for path in draw(evaluation, output)]
        for number, summary in enumerate(summaries):
            figures += draw_languages(summary, output, f"languages-{number}")
        for number, run in enumerate(runs):
            figures += draw_curves(run, output, f"curves-{number}")
    else:
        logger.warning("the report has no figures: they need matplotlib, pip install matplotlib")
    content = {
        "summaries": [as_dict(summary) for summary in summaries],
        "comparison": asdict(comparison) if comparison else None,
        "failures": evaluation.failures,
    }
    write_whole(output / "report.json", json.dumps(content, indent=1) + "\n")
    write_whole(output / "report.md", as_markdown(title, tables, figures[1::2]))
    write_whole(output / "report.html", as_html(title, tables, figures[::2]))
    return output / "report.html"


def report_again(args: Namespace) -> None:
    """Write the report of an evaluation again; see ``evaluate.py --report`` for the options."""
    evaluation, output = load_evaluation(args.report), args.output or args.report
    if output.resolve() != args.report.resolve():
        check_report_folder(output, [args.report / SCORES, *([args.manifest] if args.manifest else [])])
    rows = training_rows(args.manifest) if args.manifest else None
    page = write_report(evaluation, output, compare=args.compare, rows=rows, runs=args.run)
    compared = f"{comparison_text(evaluation, args.compare)}\n\n" if args.compare else ""
    sys.stdout.write(f"{compared}{page}\n")


def evaluation_tables(evaluation: Evaluation) -> Iterator[Table]:
    """Yield tables of the models, of scores by width and precision, and of failures."""
    models = [
        (each.label, each.parameters, each.dimension, each.texts_per_second and round(each.texts_per_second))
        for each in evaluation.models
    ]
    yield Table("Models", ("model", "parameters", "dimensions", "texts per second"), models)
    means = view_means(evaluation.scores)
    # A baseline such as TF-IDF has no width.
    rows = [
        (model, task, width or None, precision, bytes_per_vector(width, precision) or None, 100 * means[view])
        for view in sorted(means, key=lambda view: (view[1], view[0], -view[2], list(PRECISIONS).index(view[3])))
        for model, task, width, precision, _ in [view]
    ]
    head = ("model", "task", "dimensions", "precision", "bytes per vector", "score (%), mean over subsets")
    yield Table("Dimensions and precisions", head, rows)
    if evaluation.failures:
        yield Table("Failed", ("model and task", "reason"), list(evaluation.failures.items()))


def summary_tables(summary: Summary) -> Iterator[Table]:
    """Yield one model's tables of means, tasks, languages, scripts, classes and bitexts."""
    of_model = f"{summary.model}, {summary.dimension} dimensions, {summary.precision}"
    means = [
        ("macro: mean over tasks", 100 * summary.macro),
        ("micro: mean over examples", 100 * summary.micro),
        ("mean over languages", None if summary.language_macro is None else 100 * summary.language_macro),
    ]
    yield Table(f"{of_model}: means", ("mean", "score (%)"), means)
    head = ("task", "type", "metric", "score (%)", "95 % interval, from", "to", "subsets", "examples")
    rows = [
        (each.task, each.task_type, each.metric, 100 * each.value, *_ends(each.interval), each.subsets, each.examples)
        for each in summary.tasks
    ]
    yield Table(f"{of_model}: tasks", head, rows)
    # From the worst language on.
    groups = {
        "languages": summary.languages,
        "scripts": summary.scripts,
        "resource classes, by share of training rows": summary.classes,
        "bitexts": summary.bitext,
    }
    head = ("name", "macro (%)", "micro (%)", "languages", "examples")
    for name, found in groups.items():
        rows = [(each.name, 100 * each.macro, 100 * each.micro, each.languages, each.examples) for each in found]
        if rows:
            yield Table(f"{of_model}: {name}", head, rows)


def comparison_table(comparison: Comparison) -> Table:
    """Return the table of two models, task by task and overall."""
    rows: list[tuple[Cell, ...]] = []
    for task in comparison.tasks:
        rows.append((task.task, *_difference(task.first, task.second, task.test, task.p_adjusted), task.verdict))
    if (test := comparison.overall) is not None:
        rows.append(("overall", *_difference(test.first, test.second, test, test.p_value), comparison.verdict))
    interval = f"{100 * comparison.level:g} % interval, from"
    head = ("task", "first (%)", "second (%)", "difference (points)", interval, "to", "p (Holm)", "verdict")
    return Table(f"{comparison.first} (first) against {comparison.second} (second)", head, rows)


def comparison_text(evaluation: Evaluation, models: Sequence[str]) -> str:
    """Compare two models, by label, in a table for a terminal."""
    return as_text(comparison_table(compare_models(evaluation, *models)))


def _difference(first: float, second: float, test: PairedTest | None, p_value: float | None) -> tuple[Cell, ...]:
    p = "" if p_value is None else f"{p_value:.3g}"
    return (100 * first, 100 * second, 100 * (first - second), *_ends(test and test.difference), p)


def _ends(interval: Interval | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else (100 * interval.low, 100 * interval.high)


def as_html(title: str, tables: Sequence[Table], figures: Sequence[Path]) -> str:
    """Return a page with tables and SVG figures that loads nothing from elsewhere."""
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["shown"] = _shown
    drawn = [path.read_text(encoding="utf-8").partition("<svg") for path in figures]
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, tables=tables, figures=["<svg" + svg for _, _, svg in drawn]) + "\n"


def as_markdown(title: str, tables: Sequence[Table], figures: Sequence[Path]) -> str:
    """Return the same as Markdown, with images that lie beside it."""
    parts = [f"# {title}", *(f"![{path.stem}]({path.name})" for path in figures)]
    for table in tables:
        lines = [table.head, ["---"] * len(table.head), *([_shown(cell) for cell in row] for row in table.rows)]
        escaped = (" | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) for line in lines)
        parts.append(f"## {table.title}\n\n" + "\n".join(f"| {line} |" for line in escaped))
    return "\n\n".join(parts) + "\n"


def as_text(table: Table) -> str:
    """Return a table for a terminal, texts left-aligned and numbers right-aligned."""
    columns = list(zip(table.head, *table.rows, strict=True))
    padded = []
    for head, *cells in columns:
        texts = [head, *map(_shown, cells)]
        width = max(map(len, texts))
        right = any(isinstance(cell, int | float) for cell in cells)
        padded.append([text.rjust(width) if right else text.ljust(width) for text in texts])
    return "\n".join([table.title, "", *("  ".join(line).rstrip() for line in zip(*padded, strict=True))])


def _shown(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.1f}"
    return f"{cell:,}" if isinstance(cell, int) else cell
