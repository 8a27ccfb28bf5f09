"""Report of an evaluation, of tasks or of a stage's pairs: tables and figures as one HTML page, Markdown and JSON."""

from __future__ import annotations

import json
import logging
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import fmean
from textwrap import indent
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader

from training.common.languages import iso639_3
from training.common.outputs import check_output, locked, write_whole
from training.common.run_folder import run_of
from training.config.arguments import StageArguments
from training.evaluation.figures import (
    curves_figure,
    dimensions_figure,
    find_log,
    languages_figure,
    learning_figure,
    load_curves,
    pareto_figure,
    save,
)
from training.evaluation.pairs import TASK, TFIDF, Pairs, encode_pairs, evaluate_pairs, load_pairs, nearest_by_tfidf
from training.evaluation.records import (
    EXAMPLES,
    PRECISIONS,
    SCORES,
    Evaluation,
    ModelRecord,
    Score,
    bytes_per_vector,
    finished_models,
    layers_text,
    load_evaluation,
)
from training.evaluation.significance import Interval, TaskComparison, compare_models
from training.evaluation.summary import Summary, known_rows, summarize, training_rows
from training.models.encoders import exit_sizes, load_encoder, trained_exits, with_exits
from training.models.model_ref import resolve

logger = logging.getLogger("training")

# Files that evaluations and reports write into a folder.
_OURS = (SCORES, EXAMPLES, "mteb", "report.html", "report.md", "report.json", "*.svg", "*.png", ".*")

_FIGURES = {"dimensions": dimensions_figure, "pareto": pareto_figure, "learning": learning_figure}

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
) -> str:
    """Write ``report.html``, ``report.md``, ``report.json`` and the figures (SVG, PNG).

    The report compares two models by label, and has resource classes by training rows and loss curves of runs if given.
    Returns what a terminal shows: the comparison, if any, and the path of the page.
    """
    output.mkdir(parents=True, exist_ok=True)
    summaries = [summarize(evaluation, model, rows) for model in finished_models(evaluation)]
    comparison = compare_models(evaluation, *compare) if compare else []
    tables = [comparison_table(comparison, *compare)] if compare else []
    tables += [*evaluation_tables(evaluation), *(table for summary in summaries for table in summary_tables(summary))]
    figures = []
    if find_spec("matplotlib"):
        drawn = {
            **{name: draw(evaluation) for name, draw in _FIGURES.items()},
            **{f"languages-{number}": languages_figure(summary) for number, summary in enumerate(summaries)},
            **{f"curves-{number}": curves_figure(load_curves(run), str(run)) for number, run in enumerate(runs)},
        }
        figures = [path for name, figure in drawn.items() for path in save(figure, output, name)]
    else:
        logger.warning("the report has no figures: they need matplotlib, pip install matplotlib")
    content = {
        "summaries": [asdict(summary) for summary in summaries],
        "comparison": [{**asdict(row), "verdict": row.verdict} for row in comparison],
        "failures": evaluation.failures,
    }
    write_whole(output / "report.json", json.dumps(content, indent=1) + "\n")
    svgs = ["<svg" + path.read_text(encoding="utf-8").partition("<svg")[2] for path in figures[::2]]
    for name, images in (("report.md", figures[1::2]), ("report.html", svgs)):
        template = _TEMPLATES.get_template(f"{name}.jinja")
        write_whole(output / name, template.render(title=title, tables=tables, figures=images))
    return "\n\n".join([*([as_text(tables[0])] if compare else []), f"{output / 'report.html'}\n"])


def report_again(args: Namespace) -> None:
    """Write the report of an evaluation again; see ``evaluate.py --report`` for the options."""
    evaluation, output = load_evaluation(args.report), args.output or args.report
    if output.resolve() != args.report.resolve():
        check_report_folder(output, [args.report / SCORES, *([args.manifest] if args.manifest else [])])
    rows = training_rows(args.manifest) if args.manifest else None
    sys.stdout.write(write_report(evaluation, output, compare=args.compare, rows=rows, runs=args.run))


def evaluation_tables(evaluation: Evaluation) -> Iterator[Table]:
    """Yield tables of the models, of scores by width and precision, and of failures."""
    models = [
        (each.label, each.parameters, each.dimension, each.texts_per_second and round(each.texts_per_second))
        for each in evaluation.models
    ]
    yield Table("Models", ("model", "parameters", "dimensions", "texts per second"), models)
    yield view_table(evaluation.scores)
    if evaluation.failures:
        yield Table("Failed", ("model and task", "reason"), list(evaluation.failures.items()))


def view_table(scores: Iterable[Score]) -> Table:
    """Return the table of means over subsets by task, model, width and precision."""
    values: dict[tuple[Cell, ...], list[float]] = defaultdict(list)
    for score in sorted(scores, key=lambda each: (each.task, each.model, -each.dimension, -PRECISIONS[each.precision])):
        # A baseline such as TF-IDF has no width.
        size = score.dimension or None, score.precision, bytes_per_vector(score.dimension, score.precision) or None
        values[(score.model, score.task, *size, score.metric)].append(100 * score.value)
    rows: list[tuple[Cell, ...]] = [(*view, fmean(found)) for view, found in values.items()]
    head = ("model", "task", "dimensions", "precision", "bytes per vector", "metric", "score (%), mean over subsets")
    return Table("Dimensions and precisions", head, rows)


def summary_tables(summary: Summary) -> Iterator[Table]:
    """Yield one model's tables of means, tasks, languages, scripts and classes."""
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
    groups = {"languages": summary.languages, "scripts": summary.scripts}
    groups["resource classes, by share of training rows"] = summary.classes
    head = ("name", "score (%)", "languages", "examples")
    for name, found in groups.items():
        if found:
            rows = [(each.name, 100 * each.macro, each.languages, each.examples) for each in found]
            yield Table(f"{of_model}: {name}", head, rows)


def comparison_table(comparison: Sequence[TaskComparison], first: str, second: str) -> Table:
    """Return the table of two models, task by task and overall."""
    rows: list[tuple[Cell, ...]] = []
    for row in comparison:
        scores = (100 * row.first, 100 * row.second, 100 * (row.first - row.second))
        p_value = "" if row.p_adjusted is None else f"{row.p_adjusted:.3g}"
        rows.append((row.task, *scores, *_ends(row.test and row.test.difference), p_value, row.verdict))
    head = ("task", "first (%)", "second (%)", "difference (points)", "95 % from", "to", "p (Holm)", "verdict")
    return Table(f"{first} (first) against {second} (second)", head, rows)


def _ends(interval: Interval | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else (100 * interval.low, 100 * interval.high)


def as_text(table: Table) -> str:
    """Return a table for a terminal."""
    frame = pd.DataFrame([map(_shown, row) for row in table.rows], columns=table.head)
    return f"{table.title}\n\n{frame.to_string(index=False)}"


def _shown(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.1f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


# Markdown names figures that lie beside it; the page holds them and loads nothing.
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: name == "report.html.jinja",
    trim_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters["shown"] = _shown


def evaluate_and_report(folder: Path, args: StageArguments, path: Path) -> dict[str, Any]:
    """Evaluate a finished model on a stage's pairs, write the result to ``path``, and print it.

    The report of all stages of the recipe goes to ``report/`` beside it.
    """
    pairs = load_pairs(args.evaluation_pairs, args.evaluation_candidates)
    reference = resolve(str(folder), "output_dir")
    model = load_encoder(reference, "output_dir")
    width = model.get_embedding_dimension()
    dims = args.train_dims(width) or [width]
    # The configuration of an adapter is its base's.
    depth = getattr(getattr(model[0], "config", None), "num_hidden_layers", 0)
    exits = trained_exits(model) if args.prunes else args.train_exits(depth)
    if exits:
        model = with_exits(model, exits, "exit_layers")
    by_exit = encode_pairs(model, pairs).by_exit(len(exits or [0]))
    encoded = by_exit[-1]
    baseline = pairs.hits(nearest_by_tfidf(pairs.queries, pairs.candidates))
    result = {**evaluate_pairs(encoded, baseline, dims), "model": str(folder), "identity": reference.identity}
    if exits:
        accuracies = [evaluate_pairs(found, baseline, dims)["accuracy"] for found in by_exit]
        result["exits"] = dict(zip(map(str, exits), accuracies, strict=True))
    # The same recipe may be resumed twice at once.
    with locked(path):
        write_whole(path, json.dumps(result, indent=2) + "\n")
    found = f"Finding the passages of {len(pairs.queries)} queries among {len(pairs.candidates)} candidates"
    sys.stdout.write(f"\n{found} ({args.evaluation_pairs})\n\n{table(result)}\n\n{path}\n")
    record = ModelRecord(
        str(folder.parent),
        parameters=sum(weights.numel() for weights in model.parameters()),
        dimension=width,
        texts_per_second=encoded.texts_per_second,
        identity=reference.identity,
    )
    output = path.parent / "report"
    with locked(output):
        # Beside earlier stages of the recipe and the baseline.
        evaluation = load_evaluation(output, missing_ok=True)
        *smaller, _ = exit_sizes(model).items() or [None]
        records = [*(record.of_exit(*each) for each in smaller), record]
        for each in (*records, ModelRecord(TFIDF)):
            evaluation.add_model(each)
        evaluation.put(*language_scores(TFIDF, pairs, baseline, 0, "float32"))
        for (each, found), precision, dim in product(zip(records, by_exit, strict=True), PRECISIONS, dims):
            evaluation.put(*language_scores(each.label, pairs, found.hits(dim, precision), dim, precision))
        evaluation.save(output)
        names = dict.fromkeys(each.name for each in evaluation.models)
        shown = write_report(
            evaluation,
            output,
            compare=(record.label, TFIDF),
            rows=known_rows(Path(args.manifest) if args.manifest else None),
            runs=[run for name in names if (run := run_of(name)) is not None and find_log(run)],
            title=f"Evaluation of {output.parent}",
        )
    sys.stdout.write(f"{shown}\nUse the model:\n\n{indent(usage(folder, pairs, result['accuracy']), '    ')}")
    return result


def language_scores(
    label: str, pairs: Pairs, hits: np.ndarray, dimension: int, precision: str
) -> tuple[list[Score], dict[str, np.ndarray]]:
    """Return accuracy@1 of a model's width and precision by language, and the hits of each language's queries."""
    known = pairs.languages is not None
    # mteb's name of a task without subsets.
    codes = list(map(_code, pairs.languages, pairs.scripts)) if known else ["default"] * len(pairs.queries)
    scores, examples = [], {}
    for code, found in pd.Series(hits, dtype=np.float32).groupby(np.array(codes), sort=False):
        task = (TASK, "Retrieval", code, (code,) if known else ())
        value = round(float(found.mean()), 6)
        scores.append(Score(label, *task, dimension, precision, "accuracy_at_1", value, len(found)))
        examples[scores[-1].key] = found.to_numpy()
    return scores, examples


def _code(language: str, script: str) -> str:
    try:
        return f"{iso639_3(language)}-{script}"
    except ValueError:
        # The user's name of a language.
        return f"{language}-{script}"


def table(result: Mapping[str, Any], most_scripts: int = 12) -> str:
    """Format the result for a terminal: widths, then the scripts with the most queries."""
    accuracies = pd.Series({**result["accuracy"], TFIDF: result["tfidf"]}, name="accuracy@1").rename_axis("dimensions")
    tables = [accuracies.reset_index()]
    if "exits" in result:
        exits = {layers_text(int(layers)): accuracies for layers, accuracies in result["exits"].items()}
        tables.append(pd.DataFrame(exits).rename_axis("dimensions").reset_index())
    if result["scripts"]:
        scripts = pd.DataFrame.from_dict(result["scripts"], orient="index").rename(columns={"tfidf": TFIDF})
        tables.append(scripts.nlargest(most_scripts, "pairs").rename_axis("script").reset_index())
    return "\n\n".join(each.to_string(index=False, float_format="%.3f") for each in tables)


def usage(folder: Path, pairs: Pairs, accuracy: Mapping[str, float]) -> str:
    """Return a program that finds a query's passage with the model, at the narrowest width that keeps 95 %."""
    full = max(map(int, accuracy))
    width = min(int(each) for each, score in accuracy.items() if score >= 0.95 * accuracy[str(full)])
    truncated = "" if width == full else f", truncate_dim={width}"
    candidates = dict.fromkeys([pairs.candidates[pairs.relevant[0][0]], *pairs.candidates[:3]])
    texts = [pairs.queries[0], *candidates][:4]
    query, *passages = (text if len(text) <= 60 else f"{text[:59]}…" for text in texts)
    return (
        "from sentence_transformers import SentenceTransformer\n\n"
        f"model = SentenceTransformer({str(folder)!r}{truncated})\n"
        f"query = model.encode_query({query!r})\n"
        f"passages = model.encode_document({passages!r})\n"
        # Cosine: truncated embeddings are not normalized.
        "print(model.similarity(query, passages))\n"
    )
