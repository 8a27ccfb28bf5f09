"""How sure a score is, and whether two models differ: bootstrap intervals and paired tests on the examples' scores.

Examples are resampled within their group (one subset of one task), so that a score that is a mean of groups' means, as
a task's over its subsets, gets the interval of that mean. They count as independent: where one text is asked for
in many languages, intervals over these languages together are somewhat too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.common.errors import UserError
from training.evaluation.records import Evaluation, Score

Floats = NDArray[np.float64]

# Resampled values held at a time: 32 MiB of float64.
_BLOCK = 1 << 22
# Up to so many distinct values, drawing how often each occurs is quicker than drawing every example.
_FEW_VALUES = 32
# Up to so many differences that are not zero, all their signs are tried.
_EXACT = 13


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: The mean.
        low: Lower end.
        high: Upper end.
        level: Share of samples whose interval covers the true mean, nominally.
        examples: Number of examples.
    """

    mean: float
    low: float
    high: float
    level: float
    examples: int


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same examples.

    Attributes:
        first: Mean of the first model.
        second: Mean of the second model.
        difference: First less second, with its bootstrap interval.
        p_value: Of the two-sided sign-flip test that neither is better.
    """

    first: float
    second: float
    difference: Interval
    p_value: float

    @property
    def differs(self) -> bool:
        """Whether the difference is one at the interval's level, this test alone considered."""
        return self.p_value <= 1 - self.difference.level


def bootstrap_interval(
    groups: Sequence[ArrayLike], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean of groups' means (Efron and Tibshirani, 1993, chapter 13).

    Args:
        groups: ``(n_g,)`` values of each group; one group for a plain mean.
        level: Confidence level, between 0 and 1.
        resamples: Samples drawn with replacement.
        seed: The same seed draws the same samples.

    Raises:
        UserError: If there are no examples, one is not finite, or the level or the number of samples is out of range.
    """
    arrays = _checked(groups, level, resamples)
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for values in arrays:
        means += _resampled_means(values, resamples, rng) / len(arrays)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    mean = _mean_of_means(arrays)
    return Interval(mean, float(low), float(high), level, sum(map(len, arrays)))


def _resampled_means(values: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """``(resamples,)`` means of samples drawn with replacement."""
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _FEW_VALUES:
        drawn = rng.multinomial(len(values), counts / len(values), size=resamples)
        return drawn @ distinct / len(values)
    return np.concatenate(
        [
            values[rng.integers(len(values), size=(rows, len(values)), dtype=np.int32)].mean(axis=1)
            for rows in _blocks(resamples, len(values))
        ]
    )


def paired_test(
    first: Sequence[ArrayLike], second: Sequence[ArrayLike], level: float = 0.95, resamples: int = 9999, seed: int = 0
) -> PairedTest:
    """Tests whether two models differ on the same examples, by flipping the signs of their differences.

    If neither model is better, each example's difference could as well have had the other sign (Fisher's
    randomization test for pairs). Few differences have all their signs tried, which is exact; of many, ``resamples``
    random ones, with the p-value of Phipson and Smyth (2010), which is never zero.

    Args:
        first: ``(n_g,)`` values of the first model by group.
        second: ``(n_g,)`` values of the second model on the same examples in the same order.
        level: Confidence level of the difference's interval.
        resamples: Random signs at most.
        seed: The same seed draws the same signs and samples.

    Raises:
        UserError: If the two do not have the same groups of the same sizes, or as :func:`bootstrap_interval`.
    """
    ours, theirs = _checked(first, level, resamples), _checked(second, level, resamples)
    if [len(values) for values in ours] != [len(values) for values in theirs]:
        raise UserError(
            f"the two models were not scored on the same examples ({_sizes(ours)} against {_sizes(theirs)}); "
            "evaluate both on the same version of the task"
        )
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    # What each example adds to the mean of the groups' means.
    shares = np.concatenate([values / (len(values) * len(differences)) for values in differences])
    return PairedTest(
        _mean_of_means(ours),
        _mean_of_means(theirs),
        bootstrap_interval(differences, level, min(resamples, 2000), seed),
        _sign_flip_p_value(shares[shares != 0], resamples, np.random.default_rng(seed)),
    )


def _sign_flip_p_value(shares: Floats, resamples: int, rng: np.random.Generator) -> float:
    count = len(shares)
    if not count:
        return 1.0
    # A sum of the same numbers in another order may come out smaller by a rounding error.
    observed = abs(shares.sum()) * (1 - 1e-9)
    if count <= _EXACT:
        flipped = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        return float(np.mean(np.abs((1 - 2 * flipped) @ shares) >= observed))
    extreme = 0
    for rows in _blocks(resamples, count):
        random = np.frombuffer(rng.bytes(-(-rows * count // 8)), np.uint8)
        flipped = np.unpackbits(random, count=rows * count).reshape(rows, count)
        extreme += int((np.abs(shares.sum() - 2 * (flipped.astype(np.float64) @ shares)) >= observed).sum())
    return (extreme + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts the p-values of several tests, so that one false finding among all is as rare as the level says.

    Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def examples_of(evaluation: Evaluation, scores: Sequence[Score]) -> list[NDArray[np.float32]] | None:
    """``(n,)`` examples of each score, or None where a score has none, its metric being no mean over examples."""
    found = [evaluation.examples.get(score.key) for score in scores]
    return None if not found or any(values is None or not len(values) for values in found) else found


def _blocks(rows: int, columns: int) -> Iterator[int]:
    """Splits rows into blocks of bounded size."""
    at_once = max(1, _BLOCK // columns)
    for start in range(0, rows, at_once):
        yield min(at_once, rows - start)


def _mean_of_means(groups: Sequence[Floats]) -> float:
    return math.fsum(float(values.mean()) for values in groups) / len(groups)


def _sizes(groups: Sequence[Floats]) -> str:
    shown = ", ".join(str(len(values)) for values in groups[:5])
    return f"{shown}, ..." if len(groups) > 5 else shown


def _checked(groups: Sequence[ArrayLike], level: float, resamples: int) -> list[Floats]:
    if not 0 < level < 1:
        raise UserError(f"the confidence level must lie between 0 and 1, got {level}; use 0.95, say")
    if resamples < 1:
        raise UserError(f"the number of resamples must be at least 1, got {resamples}")
    arrays = [np.asarray(values, np.float64) for values in groups]
    if not arrays or any(values.ndim != 1 or not len(values) for values in arrays):
        raise UserError("there are no examples to draw from; every group needs one value per example")
    if not all(np.isfinite(values).all() for values in arrays):
        raise UserError("an example's score is not finite; evaluate the model again")
    return arrays
