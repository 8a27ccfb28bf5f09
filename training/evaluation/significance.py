"""Bootstrap intervals, paired tests, and the comparison of two models by them.

Examples are resampled within their group (one subset of one task), so that a mean of group means, such as a task's
score, gets the interval of that mean. Examples are treated as independent: if one text is a query in many languages,
intervals over these languages together are somewhat too narrow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.common.errors import UserError
from training.evaluation.records import Evaluation, Score, by_task, model_scores

Floats = NDArray[np.float64]

LEVEL = 0.95
# Resampled values held at once: 32 MiB of float64.
_BLOCK = 1 << 22
# Up to this many distinct values, drawing how often each occurs is faster than drawing every example.
_FEW_VALUES = 32
# Up to this many differences that are not zero, all their signs are tried.
_EXACT = 13
# Otherwise so many random ones.
_FLIPS = 9999


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    examples: int


@dataclass(frozen=True)
class PairedTest:
    """Means of two models on the same examples, their difference, and the p-value of the two-sided sign-flip test."""

    first: float
    second: float
    difference: Interval
    p_value: float


def bootstrap_interval(groups: Sequence[ArrayLike], resamples: int = 2000) -> Interval:
    """Return the percentile bootstrap interval of the mean of group means (Efron and Tibshirani, 1993, chapter 13)."""
    arrays = _arrays(groups)
    rng = np.random.default_rng(0)
    means = np.mean([_resampled_means(values, resamples, rng) for values in arrays], axis=0)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(_mean_of_means(arrays), float(low), float(high), sum(map(len, arrays)))


def _resampled_means(values: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Return ``(resamples,)`` means of samples drawn with replacement."""
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _FEW_VALUES:
        return rng.multinomial(len(values), counts / len(values), size=resamples) @ distinct / len(values)
    draws = (rng.integers(len(values), size=(rows, len(values)), dtype=np.int32) for rows in _blocks(resamples, values))
    return np.concatenate([values[drawn].mean(axis=1) for drawn in draws])


def paired_test(first: Sequence[ArrayLike], second: Sequence[ArrayLike]) -> PairedTest:
    """Test whether two models differ on the same examples, by flipping the signs of their differences.

    If neither model is better, each difference could as well have the other sign (Fisher's randomization test for
    pairs). All signs of a few differences are tried, which is exact; of many, random ones, with the p-value of Phipson
    and Smyth (2010), which is never zero. Both have ``(n_g,)`` values by group, in the same order.
    """
    ours, theirs = _arrays(first), _arrays(second)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    # What each example adds to the mean of the group means.
    shares = np.concatenate([values / (len(values) * len(differences)) for values in differences])
    p_value = _sign_flip_p_value(shares[shares != 0])
    return PairedTest(_mean_of_means(ours), _mean_of_means(theirs), bootstrap_interval(differences), p_value)


def _sign_flip_p_value(shares: Floats) -> float:
    count = len(shares)
    # The same sum in another order may be smaller by a rounding error.
    observed = abs(shares.sum()) * (1 - 1e-9)
    if count <= _EXACT:
        flipped = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        return float(np.mean(np.abs((1 - 2 * flipped) @ shares) >= observed))
    rng, extreme = np.random.default_rng(0), 0
    for rows in _blocks(_FLIPS, shares):
        bits = np.frombuffer(rng.bytes(-(-rows * count // 8)), np.uint8)
        flipped = np.unpackbits(bits, count=rows * count).reshape(rows, count)
        extreme += int((np.abs(shares.sum() - 2 * (flipped.astype(np.float64) @ shares)) >= observed).sum())
    return (extreme + 1) / (_FLIPS + 1)


def _blocks(rows: int, values: Floats) -> Iterator[int]:
    """Yield the numbers of rows, as wide as the values, that are drawn at once."""
    at_once = max(1, _BLOCK // len(values))
    yield from (min(at_once, rows - start) for start in range(0, rows, at_once))


def _mean_of_means(groups: Sequence[Floats]) -> float:
    return float(np.mean([values.mean() for values in groups]))


def _arrays(groups: Sequence[ArrayLike]) -> list[Floats]:
    arrays = [np.asarray(values, np.float64) for values in groups]
    if not all(np.isfinite(values).all() for values in arrays):
        raise UserError("an example's score is not finite; evaluate the model again")
    return arrays


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of several tests (Holm, "A simple sequentially rejective multiple test procedure", 1979)."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.asarray(p_values, np.float64)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return adjusted.tolist()


def examples_of(evaluation: Evaluation, scores: Sequence[Score]) -> list[NDArray[np.float32]] | None:
    """Return the ``(n,)`` examples of each score; None if a score has none, because its metric is not their mean."""
    found = [evaluation.examples.get(score.key) for score in scores]
    return None if not found or any(values is None or not len(values) for values in found) else found


@dataclass(frozen=True)
class TaskComparison:
    """Means of two models over the subsets of a task that both have, and the test if examples have scores."""

    task: str
    first: float
    second: float
    test: PairedTest | None
    p_adjusted: float | None  # the p-value after Holm's correction over the tested tasks

    @property
    def verdict(self) -> str:
        """What the test found."""
        if self.p_adjusted is None:
            return "not tested: its metric is no mean over examples"
        if self.p_adjusted > 1 - LEVEL:
            return "no difference found"
        return "the first is better" if self.first > self.second else "the second is better"


def compare_models(evaluation: Evaluation, first: str, second: str) -> list[TaskComparison]:
    """Compare two models, by label, at full width on the tasks and subsets that both were scored on.

    The last row, ``overall``, is the mean over the tested tasks.
    """
    if first == second:
        raise UserError(f"cannot compare {first!r} with itself; name two models")
    found = (model_scores(evaluation, model) for model in (first, second))
    ours, theirs = ({(score.task, score.split, score.subset): score for score in scores} for scores in found)
    common = by_task([score for key, score in ours.items() if key in theirs])
    if not common:
        raise UserError(f"{first!r} and {second!r} have no task in common; evaluate both on the same tasks")
    means: dict[str, list[float]] = {}
    examples: dict[str, list[list[NDArray[np.float32]]]] = {}
    for task, own in common.items():
        sides = [own, [theirs[task, score.split, score.subset] for score in own]]
        means[task] = [fmean(score.value for score in scores) for scores in sides]
        found = [examples_of(evaluation, scores) for scores in sides]
        data = [[score.data for score in scores] for scores in sides]
        if all(found):
            examples[task] = found
            data = [[data, *map(len, values)] for data, values in zip(data, found, strict=True)]
        if data[0] != data[1]:
            raise UserError(f"task {task!r}: the two models were scored on different data; evaluate both on the same")
    tests = {task: paired_test(*sides) for task, sides in examples.items()}
    adjusted = dict(zip(tests, holm([test.p_value for test in tests.values()]), strict=True))
    rows = [TaskComparison(task, *of_task, tests.get(task), adjusted.get(task)) for task, of_task in means.items()]
    if examples:
        overall = paired_test(*(_weighted(groups) for groups in zip(*examples.values(), strict=True)))
        rows.append(TaskComparison("overall", overall.first, overall.second, overall, overall.p_value))
    return rows


def _weighted(tasks: Sequence[Sequence[NDArray[np.float32]]]) -> list[Floats]:
    """Scale the examples of tasks so that the mean over groups (subsets) is the mean over tasks of their means."""
    groups = sum(map(len, tasks))
    return [groups / len(tasks) / len(task) * np.asarray(values, np.float64) for task in tasks for values in task]
