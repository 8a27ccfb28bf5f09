"""One model's scores by task, language, script and resource class.

A score belongs to its language. That of a bitext with English belongs to the other language, or English would be the
mean of all; that of any other bitext to both. Scores of more languages, or of none, count in the tasks' table alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from training.evaluation.records import Evaluation, Score
from training.evaluation.resources import CLASSES, resource_class
from training.evaluation.selection import by_task, model_scores, task_mean
from training.evaluation.significance import Interval, bootstrap_interval, examples_of

WORST = 10


@dataclass(frozen=True)
class TaskScore:
    """One task.

    Attributes:
        task: Its name.
        task_type: Its type.
        metric: Its main metric.
        value: Mean over its subsets.
        subsets: Number of subsets.
        examples: Number of examples.
        interval: Confidence interval of the value, where examples have scores of their own.
    """

    task: str
    task_type: str
    metric: str
    value: float
    subsets: int
    examples: int
    interval: Interval | None


@dataclass(frozen=True)
class GroupScore:
    """The scores of one language, script, class or kind of bitext.

    Attributes:
        name: Its name: ``deu-Latn``, ``Latn``, ``high``.
        macro: A language's mean over its tasks; for other groups the mean over their languages.
        micro: The mean over scores weighted by their examples.
        languages: Number of languages.
        examples: Number of examples.
    """

    name: str
    macro: float
    micro: float
    languages: int
    examples: int


@dataclass(frozen=True)
class Summary:
    """What one model scored.

    Attributes:
        model: Its label.
        dimension: Dimensions of its embeddings.
        precision: Their precision.
        tasks: By task.
        languages: By language, the lowest first.
        scripts: By script, the lowest first.
        classes: By resource class; empty without the training rows.
        bitext: ``English-centred`` against ``any-to-any`` pairs, as far as there are any.
        macro: Mean over the tasks of their means over subsets.
        micro: Mean over all scores weighted by their examples.
        language_macro: Mean over the languages; None if no score has a language.
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
        return self.languages[:WORST]


def languages_of(score: Score) -> tuple[str, ...]:
    """The languages that a score belongs to; none if it belongs to no language in particular."""
    if len(score.languages) == 1:
        return score.languages
    if len(score.languages) == 2:
        others = tuple(language for language in score.languages if not _is_english(language))
        return tuple(dict.fromkeys(others)) or (score.languages[0],)
    return ()


def summarize(
    evaluation: Evaluation,
    model: str,
    rows: Mapping[str, int] | None = None,
    dimension: int | None = None,
    precision: str = "float32",
) -> Summary:
    """Summarizes the scores of one model.

    Args:
        evaluation: The evaluation.
        model: Label of the model.
        rows: Training rows by language, for the resource classes.
        dimension: Dimensions; the most if None.
        precision: Precision.

    Raises:
        UserError: If the model has no such scores.
    """
    scores = model_scores(evaluation, model, dimension, precision)
    of_language = _by_language(scores)
    languages = sorted(
        (_group(code, found, task_mean(found), 1) for code, found in of_language.items()),
        key=lambda group: (group.macro, group.name),
    )
    macro = {group.name: group.macro for group in languages}
    scripts = _grouped(macro, of_language, {code: _script(code) for code in macro})
    classes = _grouped(macro, of_language, {code: resource_class(code, rows) for code in macro}) if rows else []
    return Summary(
        model=model,
        dimension=scores[0].dimension,
        precision=precision,
        tasks=[_task(evaluation, found) for found in by_task(scores).values()],
        languages=languages,
        scripts=sorted(scripts, key=lambda group: (group.macro, group.name)),
        classes=sorted(classes, key=lambda group: CLASSES.index(group.name)),
        bitext=_bitext(scores),
        macro=task_mean(scores),
        micro=_micro(scores),
        language_macro=fmean(macro.values()) if macro else None,
    )


def _by_language(scores: Iterable[Score]) -> dict[str, list[Score]]:
    found: dict[str, list[Score]] = {}
    for score in scores:
        for language in languages_of(score):
            found.setdefault(language, []).append(score)
    return found


def _grouped(
    macro: Mapping[str, float], of_language: Mapping[str, list[Score]], names: Mapping[str, str]
) -> list[GroupScore]:
    """Gathers languages into groups by the name of each language's group."""
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
    pairs = [score for score in scores if score.task_type == "BitextMining" and len(score.languages) == 2]
    kinds = {
        "English-centred": [score for score in pairs if any(map(_is_english, score.languages))],
        "any-to-any": [score for score in pairs if not any(map(_is_english, score.languages))],
    }
    return [
        _group(name, found, task_mean(found), len({language for score in found for language in score.languages}))
        for name, found in kinds.items()
        if found
    ]


def _task(evaluation: Evaluation, scores: Sequence[Score]) -> TaskScore:
    first = scores[0]
    examples = examples_of(evaluation, scores)
    return TaskScore(
        task=first.task,
        task_type=first.task_type,
        metric=first.metric,
        value=fmean(score.value for score in scores),
        subsets=len(scores),
        examples=sum(score.examples for score in scores),
        interval=None if examples is None else bootstrap_interval(examples),
    )


def _micro(scores: Sequence[Score]) -> float:
    examples = sum(score.examples for score in scores)
    if not examples:
        return fmean(score.value for score in scores)
    return sum(score.value * score.examples for score in scores) / examples


def _is_english(language: str) -> bool:
    return language.split("-")[0] == "eng"


def _script(language: str) -> str:
    _, _, script = language.partition("-")
    return script or "unknown"


def as_dict(summary: Summary) -> dict[str, Any]:
    """A summary as JSON has it, with its worst languages named."""
    return {**asdict(summary), "worst": [group.name for group in summary.worst]}
