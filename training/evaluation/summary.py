"""Scores of one model by task, language, script and class of training data."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pandas as pd
import pyarrow as pa
from langcodes import Language

from training.common.errors import UserError
from training.common.languages import SEVERAL, iso639_3
from training.data.manifest import read_manifest
from training.data.published import PublishedFile
from training.data.survey import CollectionSurvey, divided, survey
from training.evaluation.records import Evaluation, Score, by_task, model_scores, task_mean
from training.evaluation.significance import Interval, bootstrap_interval, examples_of

logger = logging.getLogger("training")

# Minimum share of all training rows. Of the 60 million published rows, 1 % are 600 000 and 0.1 % are 60 000; shares
# classify a run on little data, too.
SHARES = {"high": 0.01, "middle": 0.001, "low": 0.0}
CLASSES = (*SHARES, "none")


@dataclass(frozen=True)
class TaskScore:
    """The score of one task: the mean over its subsets, with its interval if examples have scores."""

    task: str
    task_type: str
    metric: str
    value: float
    subsets: int
    examples: int
    interval: Interval | None


@dataclass(frozen=True)
class GroupScore:
    """The score of one language, script or class."""

    name: str
    macro: float  # a language's mean over its tasks, or the mean over the languages of another group
    languages: int
    examples: int


@dataclass(frozen=True)
class Summary:
    """The scores of one model; languages and scripts are sorted, the lowest first."""

    model: str
    dimension: int
    precision: str
    tasks: list[TaskScore]
    languages: list[GroupScore]
    scripts: list[GroupScore]
    classes: list[GroupScore]  # none without known training rows
    macro: float  # the mean over the tasks of their means over subsets
    micro: float  # the mean over all scores, weighted by their examples
    language_macro: float | None  # None without languages


def summarize(evaluation: Evaluation, model: str, rows: Mapping[str, int] | None = None) -> Summary:
    """Summarize the float32 scores of a model, by label, at full width; by class if its rows by language are given."""
    scores = model_scores(evaluation, model)
    rows_of_languages = [(s.key, s.task, s.value, s.examples, language) for s in scores for language in languages_of(s)]
    frame = pd.DataFrame(rows_of_languages, columns=["key", "task", "value", "examples", "language"])
    languages = _groups(frame, lambda language: language)
    classes = _groups(frame, lambda language: resource_class(language, rows)) if rows else []
    weights = [score.examples for score in scores]
    return Summary(
        model=model,
        dimension=scores[0].dimension,
        precision=scores[0].precision,
        tasks=[_task(evaluation, found) for found in by_task(scores).values()],
        languages=languages,
        scripts=_groups(frame, lambda language: language.partition("-")[2] or "unknown"),
        classes=sorted(classes, key=lambda group: CLASSES.index(group.name)),
        macro=task_mean(scores),
        micro=fmean((score.value for score in scores), weights if any(weights) else None),
        language_macro=fmean(group.macro for group in languages) if languages else None,
    )


def _groups(scores: pd.DataFrame, name_of: Callable[[str], str]) -> list[GroupScore]:
    """Group languages by name; the macro mean of a language is that over its tasks."""
    macro = scores.groupby(["language", "task"]).value.mean().groupby("language").mean()
    groups = []
    for name, own in scores.groupby(scores.language.map(name_of)):
        languages = own.language.unique()
        # A bitext of two languages of the group is one score, not two.
        examples = own.drop_duplicates("key").examples.sum()
        groups.append(GroupScore(name, float(macro[languages].mean()), len(languages), int(examples)))
    return sorted(groups, key=lambda group: (group.macro, group.name))


def _task(evaluation: Evaluation, scores: Sequence[Score]) -> TaskScore:
    first, examples = scores[0], examples_of(evaluation, scores)
    value, count = fmean(score.value for score in scores), sum(score.examples for score in scores)
    interval = None if examples is None else bootstrap_interval(examples)
    return TaskScore(first.task, first.task_type, first.metric, value, len(scores), count, interval)


def languages_of(score: Score) -> tuple[str, ...]:
    """Return the languages that a score belongs to; of more than two languages, or of none, it counts only by task.

    A bitext with English belongs to the other language (otherwise English would be the mean of all), others to both.
    """
    if len(score.languages) == 2:
        others = tuple(language for language in score.languages if language.split("-")[0] != "eng")
        return tuple(dict.fromkeys(others)) or score.languages[:1]
    return score.languages if len(score.languages) == 1 else ()


def resource_class(language: str, rows: Mapping[str, int]) -> str:
    """Return ``high`` for at least 1 % of all rows, ``middle`` for 0.1 %, ``low`` for fewer, ``none`` without rows.

    A language is an ISO 639-3 code with script; rows of a code without script count for each script.
    """
    own = rows.get(language, 0) + rows.get(language.partition("-")[0], 0)
    share = own / sum(rows.values())
    return next(name for name, least in SHARES.items() if share >= least) if own > 0 else "none"


def training_rows(manifest: Path) -> dict[str, int]:
    """Count the rows of a manifest by language, under its caps; the published rows if its files are not there.

    Languages are ISO 639-3 codes, with script if the files have it: ``deu``, ``srp-Cyrl``. Rows of sources in several
    languages count for that of their query if the files have a column ``lang`` (and ``script``), otherwise for none.
    Under a cap each language keeps its share.
    """
    found: Counter[str] = Counter()
    for collection in survey(manifest).collections:
        for source in collection.sources:
            found += _rows(source, pair=collection.entry.each_file)
    del found[SEVERAL]
    if not found:
        found.update(read_manifest(manifest).published_language_rows)
    if not found:
        raise UserError(f"{manifest}: has no rows by language; give its 'languages' and have its files in place")
    return dict(found)


def _rows(source: CollectionSurvey, pair: bool) -> Counter[str]:
    if len(source.languages) == 1 or not source.files or not all(file.tells_language for file in source.files):
        return divided(source.kept, source.languages, pair)
    counts: Counter[str] = Counter()
    for name in (each.name for each in source.files):
        file = PublishedFile(name)
        names = [column for column in ("lang", "script") if column in file.schema.names]
        for batch in file.further_columns(names):
            for row in pa.Table.from_batches([batch]).group_by(names).aggregate([([], "count_all")]).to_pylist():
                counts[_code(name, row["lang"], row.get("script"))] += row["count_all"]
    # Rounded up: a language with a row is not one without.
    return Counter({code: -(-count * source.kept // counts.total()) for code, count in counts.items()})


def _code(file: str, tag: str | None, script: str | None) -> str:
    if tag is None:
        return SEVERAL
    try:
        code = iso639_3(tag)
    except ValueError as error:
        raise UserError(f"{file}: column 'lang' holds {tag!r}: {error}") from None
    script = script or Language.get(tag).script
    return f"{code}-{script}" if script else code


def known_rows(manifest: Path | None) -> dict[str, int] | None:
    """Return :func:`training_rows`, or None (with a warning) if the manifest is gone or has none."""
    try:
        return training_rows(manifest) if manifest is not None else None
    except UserError as error:
        logger.warning("no resource classes: %s", error)
        return None
