"""A small part of the pairs that stands for all of them: the same rows in every run, every language among them."""

from __future__ import annotations

import numpy as np

from training.evaluation.pairs import Pairs


def sample_pairs(pairs: Pairs, size: int, candidates: int) -> Pairs:
    """Takes queries and candidates at equal distances, by language and in the order of the file.

    Languages, if known, keep their shares, to a query; so one of fewer queries than one in ``n / size`` may have none.

    Args:
        pairs: All pairs, ``n`` queries.
        size: Queries to take; all if there are no more.
        candidates: Candidates to take at most. All passages of the queries taken come first and are never left out.
    """
    by_language = np.argsort(np.asarray(pairs.languages or [""] * len(pairs.queries)), kind="stable")
    rows = np.sort(by_language[_spread(len(by_language), size)])
    gold = np.unique(np.concatenate([pairs.relevant[row] for row in rows]))
    others = np.setdiff1d(np.arange(len(pairs.candidates)), gold)
    # In the order of the file: of candidates that are equally near, the first is found.
    kept = np.union1d(gold, others[_spread(len(others), max(candidates - len(gold), 0))])
    return Pairs(
        queries=[pairs.queries[row] for row in rows],
        candidates=[pairs.candidates[position] for position in kept],
        relevant=[tuple(np.searchsorted(kept, pairs.relevant[row]).tolist()) for row in rows],
        languages=pairs.languages and [pairs.languages[row] for row in rows],
        scripts=pairs.scripts and [pairs.scripts[row] for row in rows],
    )


def _spread(count: int, size: int) -> np.ndarray:
    """``size`` of the numbers below ``count`` at equal distances, in ascending order; all if there are no more."""
    if size >= count:
        return np.arange(count)
    return (2 * np.arange(size) + 1) * count // (2 * size)
