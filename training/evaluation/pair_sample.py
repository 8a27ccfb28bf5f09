"""A small part of the pairs that stands for all of them: the same rows in every run, every language among them."""

from __future__ import annotations

import numpy as np

from training.evaluation.pairs import Pairs

__all__ = ["sample_pairs"]


def sample_pairs(pairs: Pairs, size: int, candidates: int) -> Pairs:
    """Takes pairs and candidates at equal distances, by language and in the order of the file.

    Languages keep their shares, to a pair; so a language of fewer rows than one in ``n / size`` may have none.

    Args:
        pairs: All ``n`` pairs.
        size: Pairs to take; all if there are no more.
        candidates: Candidates to take at most. The passages of the pairs taken come first and are never left out.
    """
    by_language = np.argsort(np.asarray(pairs.languages), kind="stable")
    rows = np.sort(by_language[_spread(len(by_language), size)])
    gold = np.unique(pairs.labels[rows])
    others = np.setdiff1d(np.arange(len(pairs.candidates)), gold)
    # In the order of the file: of candidates that are equally near, the first is found.
    kept = np.union1d(gold, others[_spread(len(others), max(candidates - len(gold), 0))])
    return Pairs(
        queries=[pairs.queries[row] for row in rows],
        candidates=[pairs.candidates[position] for position in kept],
        labels=np.searchsorted(kept, pairs.labels[rows]),
        languages=[pairs.languages[row] for row in rows],
        scripts=[pairs.scripts[row] for row in rows],
    )


def _spread(count: int, size: int) -> np.ndarray:
    """``size`` of the numbers below ``count`` at equal distances, in ascending order; all if there are no more."""
    if size >= count:
        return np.arange(count)
    return (2 * np.arange(size) + 1) * count // (2 * size)
