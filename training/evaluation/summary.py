"""Scores of one model by task, language, script and class of training data.

A score belongs to its language. A bitext with English belongs to the other language (otherwise English would be the
mean of all), any other bitext to both. Scores of more languages, or of none, count only by task.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

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
    """The score of one language, script, class or kind of bitext.

    ``macro`` is a language's mean over its tasks, or the mean over the languages of another group; ``micro`` is the
    mean over scores, weighted by their examples.
    """

    name: str
    macro: float
    micro: float
    languages: int
    examples: int


@dataclass(frozen=True)
class Summary:
    """The scores of one model; languages and scripts are sorted, the lowest first.

    ``macro`` is the mean over the tasks of their means over subsets, ``micro`` the mean over all scores, weighted by
    their examples. Without languages, ``language_macro`` is None; without known training rows, there are no classes.
    """

    model: str
    dimension: int
    precision: str
    tasks: list[TaskScore]
    languages: list[GroupScore]
    scripts: list[GroupScore]
    classes: list[GroupScore]
    bitext: list[GroupScore]
    macro: float
    micro: float
    language_macro: float | None

    @property
    def worst(self) -> list[GroupScore]:
        """The ten languages with the lowest scores."""
        return self.languages[:10]


def as_dict(summary: Summary) -> dict[str, Any]:
    """Return a summary as JSON holds it, with the names of its worst languages."""
    return {**asdict(summary), "worst": [group.name for group in summary.worst]}


def summarize(
    evaluation: Evaluation,
    model: str,
    rows: Mapping[str, int] | None = None,
    dimension: int | None = None,
    precision: str = "float32",
) -> Summary:
    """Summarize the scores of one model, by label; by class of training data if its rows by language are given."""
    scores = model_scores(evaluation, model, dimension, precision)
    of_language: dict[str, list[Score]] = {}
    for score in scores:
        for language in languages_of(score):
            of_language.setdefault(language, []).append(score)
    languages = _sorted(_group(code, found, task_mean(found), 1) for code, found in of_language.items())
    macro = {group.name: group.macro for group in languages}
    scripts = {code: code.partition("-")[2] or "unknown" for code in macro}
    classes = _grouped(macro, of_language, {code: resource_class(code, rows) for code in macro}) if rows else []
    return Summary(
        model=model,
        dimension=scores[0].dimension,
        precision=precision,
        tasks=[_task(evaluation, found) for found in by_task(scores).values()],
        languages=languages,
        scripts=_sorted(_grouped(macro, of_language, scripts)),
        classes=sorted(classes, key=lambda group: CLASSES.index(group.name)),
        bitext=_bitext(scores),
        macro=task_mean(scores),
        micro=_micro(scores),
        language_macro=fmean(macro.values()) if macro else None,
    )


def languages_of(score: Score) -> tuple[str, ...]:
    """Return the languages that a score belongs to."""
    if len(score.languages) == 2:
        others = tuple(language for language in score.languages if not _is_english(language))
        return tuple(dict.fromkeys(others)) or score.languages[:1]
    return score.languages if len(score.languages) == 1 else ()


def _sorted(groups: Iterable[GroupScore]) -> list[GroupScore]:
    return sorted(groups, key=lambda group: (group.macro, group.name))


def _grouped(
    macro: Mapping[str, float], of_language: Mapping[str, list[Score]], names: Mapping[str, str]
) -> list[GroupScore]:
    """Group languages by the name of each language's group."""
    groups = []
    for name in dict.fromkeys(names.values()):
        members = [code for code in macro if names[code] == name]
        # A bitext of two languages of the group is one score, not two.
        scores = list({score.key: score for code in members for score in of_language[code]}.values())
        groups.append(_group(name, scores, fmean(macro[code] for code in members), len(members)))
    return groups


def _group(name: str, scores: Sequence[Score], macro: float, languages: int) -> GroupScore:
    return GroupScore(name, macro, _micro(scores), languages, sum(score.examples for score in scores))


def _bitext(scores: Iterable[Score]) -> list[GroupScore]:
    bitexts = [score for score in scores if score.task_type == "BitextMining" and len(score.languages) == 2]
    groups = []
    for name, is_centred in (("English-centred", True), ("any-to-any", False)):
        found = [score for score in bitexts if any(map(_is_english, score.languages)) == is_centred]
        if found:
            languages = {language for score in found for language in score.languages}
            groups.append(_group(name, found, task_mean(found), len(languages)))
    return groups


def _task(evaluation: Evaluation, scores: Sequence[Score]) -> TaskScore:
    first, examples = scores[0], examples_of(evaluation, scores)
    value, count = fmean(score.value for score in scores), sum(score.examples for score in scores)
    interval = None if examples is None else bootstrap_interval(examples)
    return TaskScore(first.task, first.task_type, first.metric, value, len(scores), count, interval)


def _micro(scores: Sequence[Score]) -> float:
    weights = [score.examples for score in scores]
    return fmean((score.value for score in scores), weights if any(weights) else None)


def _is_english(language: str) -> bool:
    return language.split("-")[0] == "eng"


def resource_class(language: str, rows: Mapping[str, int]) -> str:
    """Return ``high`` for at least 1 % of all rows, ``middle`` for 0.1 %, ``low`` for fewer, ``none`` without rows.

    A language is an ISO 639-3 code with or without script; rows of a code without script count for each script.
    """
    code, _, script = language.partition("-")
    if script:
        own = rows.get(language, 0) + rows.get(code, 0)
    else:
        own = sum(count for name, count in rows.items() if name.split("-")[0] == code)
    if own <= 0:
        return "none"
    share = own / sum(rows.values())
    return next(name for name, least in SHARES.items() if share >= least)


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
    for file in source.files:
        counts += _counted(PublishedFile(file.name))
    # Rounded up: a language with a row is not one without.
    return Counter({code: -(-count * source.kept // counts.total()) for code, count in counts.items()})


def _counted(file: PublishedFile) -> Counter[str]:
    """Count the rows of a file by language, reading only the columns that name it."""
    names = [name for name in ("lang", "script") if name in file.schema.names]
    found: Counter[str] = Counter()
    for batch in file.further_columns(names):
        for row in pa.Table.from_batches([batch]).group_by(names).aggregate([([], "count_all")]).to_pylist():
            found[_code(file, row["lang"], row.get("script"))] += row["count_all"]
    return found


def _code(file: PublishedFile, tag: str | None, script: str | None) -> str:
    if tag is None:
        return SEVERAL
    try:
        code = iso639_3(tag)
    except ValueError as error:
        raise UserError(f"{file.path}: column 'lang' holds {tag!r}: {error}") from None
    script = script or Language.get(tag).script
    return f"{code}-{script}" if script else code


def known_rows(manifest: Path | None) -> dict[str, int] | None:
    """Return :func:`training_rows`, or None (with a warning) if the manifest is gone or has none."""
    try:
        return training_rows(manifest) if manifest is not None else None
    except UserError as error:
        logger.warning("no resource classes: %s", error)
        return None
