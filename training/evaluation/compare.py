"""Two models on the same tasks: whether one is better, task by task and overall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.common.errors import UserError
from training.evaluation.records import Evaluation, Score, load_evaluation
from training.evaluation.selection import by_task, labels, model_scores
from training.evaluation.significance import PairedTest, examples_of, holm, paired_test


@dataclass(frozen=True)
class TaskComparison:
    """Two models on one task.

    Attributes:
        task: Its name.
        first: The first model's score, a mean over the subsets that both models have.
        second: The second model's.
        subsets: Number of these subsets.
        test: The paired test; None where examples have no scores of their own.
        p_adjusted: Its p-value after Holm's correction for the number of tasks tested.
        differs: Whether the difference is one; None if untested.
    """

    task: str
    first: float
    second: float
    subsets: int
    test: PairedTest | None
    p_adjusted: float | None
    differs: bool | None

    @property
    def verdict(self) -> str:
        """What the test says, in words."""
        if self.differs is None:
            return "not tested: its metric is no mean over examples"
        return _verdict(self.differs, self.first - self.second)


@dataclass(frozen=True)
class Comparison:
    """Two models on all tasks that both have.

    Attributes:
        first: Label of the first model.
        second: Label of the second model.
        level: Confidence level.
        tasks: By task.
        overall: The paired test of the mean over the tested tasks; None if no task could be tested.
        left_out: Tasks that only one of the two has.
    """

    first: str
    second: str
    level: float
    tasks: list[TaskComparison]
    overall: PairedTest | None
    left_out: list[str]

    @property
    def verdict(self) -> str:
        """What the overall test says, in words."""
        if self.overall is None:
            return "no task could be tested"
        return _verdict(self.overall.differs, self.overall.difference.mean)


def _verdict(differs: bool, difference: float) -> str:
    if not differs:
        return "no difference found"
    return "the first is better" if difference > 0 else "the second is better"


def compare_models(
    evaluation: Evaluation,
    first: str,
    second: str,
    dimension: int | None = None,
    precision: str = "float32",
    level: float = 0.95,
) -> Comparison:
    """Compares two models on the tasks and subsets that both were scored on.

    Args:
        evaluation: Scores of both.
        first: Label of the first model.
        second: Label of the second model.
        dimension: Dimensions of both; each model's own most if None.
        precision: Precision of both.
        level: Confidence level of the intervals and tests; all tasks' tests together keep to it.

    Raises:
        UserError: If a model has no such scores, the two are one model or have no task in common, or they were not
            scored on the same examples of a task.
    """
    if first == second:
        raise UserError(f"cannot compare {first!r} with itself; name two models")
    ours, theirs = (by_task(model_scores(evaluation, model, dimension, precision)) for model in (first, second))
    pairs = {task: _common(ours[task], theirs[task]) for task in ours if task in theirs}
    pairs = {task: pair for task, pair in pairs.items() if pair[0]}
    if not pairs:
        raise UserError(f"{first!r} and {second!r} have no task in common; evaluate both on the same tasks")
    examples = {task: _examples(evaluation, task, *pair) for task, pair in pairs.items()}
    tests = {task: paired_test(*found, level=level) for task, found in examples.items() if found is not None}
    adjusted = dict(zip(tests, holm([test.p_value for test in tests.values()]), strict=True))
    return Comparison(
        first=first,
        second=second,
        level=level,
        tasks=[_task(task, pair, tests.get(task), adjusted.get(task), level) for task, pair in pairs.items()],
        overall=_overall([found for found in examples.values() if found is not None], level),
        left_out=sorted((ours.keys() | theirs.keys()) - pairs.keys()),
    )


Pair = tuple[list[Score], list[Score]]
Examples = tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]


def _common(ours: Sequence[Score], theirs: Sequence[Score]) -> Pair:
    """The scores of both on the subsets that both have, in one order."""
    of_first = {(score.split, score.subset): score for score in ours}
    of_second = {(score.split, score.subset): score for score in theirs}
    both = [key for key in of_first if key in of_second]
    for key in both:
        if of_first[key].data != of_second[key].data:
            raise UserError(
                f"task {of_first[key].task!r}, subset {key[1]!r}: the two models were scored on different data; "
                "evaluate both on the same version of the task"
            )
    return [of_first[key] for key in both], [of_second[key] for key in both]


def _examples(evaluation: Evaluation, task: str, ours: list[Score], theirs: list[Score]) -> Examples | None:
    first, second = examples_of(evaluation, ours), examples_of(evaluation, theirs)
    if first is None or second is None:
        return None
    for score, a, b in zip(ours, first, second, strict=True):
        if len(a) != len(b):
            raise UserError(
                f"task {task!r}, subset {score.subset!r}: {len(a)} examples of the first model against {len(b)} of the "
                "second; evaluate both on the same version of the task"
            )
    return first, second


def _task(task: str, pair: Pair, test: PairedTest | None, p_adjusted: float | None, level: float) -> TaskComparison:
    return TaskComparison(
        task=task,
        first=fmean(score.value for score in pair[0]),
        second=fmean(score.value for score in pair[1]),
        subsets=len(pair[0]),
        test=test,
        p_adjusted=p_adjusted,
        differs=None if p_adjusted is None else p_adjusted <= 1 - level,
    )


def _overall(examples: Sequence[Examples], level: float) -> PairedTest | None:
    """Tests the mean over tasks: an example counts by its share of its subset, the subset by its share of its task."""
    if not examples:
        return None
    # The test weighs all groups the same; scaled by (groups / tasks / subsets) their mean is the mean over tasks.
    groups = sum(len(first) for first, _ in examples)
    scaled: Examples = ([], [])
    for task in examples:
        weight = groups / len(examples) / len(task[0])
        for side, values in zip(scaled, task, strict=True):
            side.extend(weight * np.asarray(each, np.float64) for each in values)
    return paired_test(*scaled, level=level)


def comparison_of_folders(first: Path, second: Path, models: tuple[str, str] | None = None) -> Comparison:
    """Compares the models of two evaluations' folders.

    Args:
        first: Folder of the first evaluation.
        second: Folder of the second evaluation.
        models: Labels of the models; may be left out where each folder has one.

    Raises:
        UserError: If a folder holds no whole evaluation, or several models and none is named, or as
            :func:`compare_models`.
    """
    merged = Evaluation()
    chosen = []
    for place, folder in enumerate((first, second)):
        evaluation = load_evaluation(folder)
        model = models[place] if models else _only_model(evaluation, folder)
        # The same name may stand for two trainings: the folder tells them apart.
        label = model if model not in chosen else f"{folder}: {model}"
        names = {score.key: replace(score, model=label) for score in evaluation.select(model=model)}
        merged.scores += names.values()
        merged.examples |= {
            score.key: evaluation.examples[key] for key, score in names.items() if key in evaluation.examples
        }
        chosen.append(label)
    return compare_models(merged, *chosen)


def _only_model(evaluation: Evaluation, folder: Path) -> str:
    there = labels(evaluation)
    if len(there) != 1:
        raise UserError(f"{folder}: has scores of {len(there)} models ({', '.join(there[:10])}); name one of them")
    return there[0]


def comparison_as_dict(comparison: Comparison) -> Mapping[str, Any]:
    """A comparison as JSON has it, with its verdicts in words."""
    content = asdict(comparison)
    for fields, task in zip(content["tasks"], comparison.tasks, strict=True):
        fields["verdict"] = task.verdict
    return {**content, "verdict": comparison.verdict}
