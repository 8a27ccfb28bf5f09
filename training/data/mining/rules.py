"""Which of a query's nearest texts become its negatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.common.errors import UserError
from training.data.mining.index import Nearest

# A candidate that several rules refuse counts for the first.
RULES = ("positive", "same_text", "translation", "score", "relative", "repeated")


@dataclass(frozen=True)
class MiningOptions:
    """The thresholds, by default the published ones.

    Attributes:
        top: Candidates a query, the nearest first.
        skip: Candidates passed over, the nearest of those that no rule refuses.
        max_score: A negative scores less.
        relative: A negative scores less than this share of the positive's score.
        negatives: Negatives a row.
        keep_short: Keep rows with fewer negatives, instead of dropping them.
        replace: Mined negatives take the place of those that a row has, rather than follow them.
        instructions: Whether queries are embedded under their source's instruction, not the model's own prompt.
    """

    top: int = 100
    skip: int = 5
    max_score: float = 0.8
    relative: float = 0.95
    negatives: int = 24
    keep_short: bool = False
    replace: bool = False
    instructions: bool = True

    def check(self) -> None:
        """Checks the values.

        Raises:
            UserError: If a value is out of range.
        """
        for name, least in (("top", 1), ("skip", 0), ("negatives", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.skip + self.negatives > self.top:
            raise UserError(
                f"top {self.top} leaves no {self.negatives} negatives after skip {self.skip}; raise top to "
                f"{self.skip + self.negatives} at least, or lower the others"
            )
        if not -1 <= self.max_score <= 1.01:
            raise UserError(f"max-score must be a cosine, -1 to 1, or 1.01 for no limit; got {self.max_score}")
        if not 0 < self.relative <= 2:
            raise UserError(f"relative must be above 0 and at most 2, got {self.relative}")


class Relations(NamedTuple):
    """What is known of some queries and all passages.

    Texts of one form differ in spelling only: case, spacing, punctuation, composition of characters.

    Attributes:
        form: ``(queries,)`` number of the query's form.
        group: ``(queries,)`` group of translations, or -1.
        positive_query: ``(pairs,)`` positions of queries, of ...
        positive: ``(pairs,)`` ... their positives' numbers.
        positive_score: ``(pairs,)`` scores of those.
        passage_group: Groups of all passages, by number.
        passage_form: Forms of all passages, by number.
    """

    form: NDArray[np.int64]
    group: NDArray[np.int64]
    positive_query: NDArray[np.int64]
    positive: NDArray[np.int64]
    positive_score: NDArray[np.float32]
    passage_group: NDArray[np.int64]
    passage_form: NDArray[np.int64]


def choose_negatives(
    nearest: Nearest, relations: Relations, options: MiningOptions
) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Applies the rules in the order of ``sentence_transformers.util.mine_hard_negatives``.

    First the rules refuse candidates, then the ``skip`` nearest of the rest are passed over, then come the negatives.
    Where a query has several positives, the lowest of their scores counts.

    Args:
        nearest: The candidates.
        relations: Of the same queries.
        options: The thresholds.

    Returns:
        ``(queries, options.negatives)`` numbers of passages, -1 where there are too few, and how many candidates each
        of ``RULES`` refused.
    """
    refused, counts = np.zeros(nearest.texts.shape, dtype=bool), {}
    for rule, refuses in _rules(nearest, relations, options).items():
        counts[rule] = int((refuses & ~refused).sum())
        refused |= refuses
    # What is left, numbered from 0 along each row.
    place = np.cumsum(~refused, axis=1) - 1
    chosen = ~refused & (place >= options.skip) & (place < options.skip + options.negatives)
    row, column = np.nonzero(chosen)
    negatives = np.full((len(nearest.texts), options.negatives), -1, dtype=np.int64)
    negatives[row, place[row, column] - options.skip] = nearest.texts[row, column]
    return negatives, counts


def _rules(nearest: Nearest, relations: Relations, options: MiningOptions) -> dict[str, NDArray[np.bool_]]:
    """What each rule refuses, in the order of ``RULES``."""
    scores, texts = nearest
    group, form = relations.passage_group[texts], relations.passage_form[texts]
    owner, positives = relations.positive_query, relations.positive
    lowest = np.full(len(scores), np.inf, dtype=np.float32)
    np.minimum.at(lowest, owner, relations.positive_score)
    # Of a negative score, 0.95 times it would be more.
    limit = lowest - np.abs(lowest) * np.float32(1 - options.relative)
    return {
        "positive": _listed(form, owner, relations.passage_form[positives]),
        "same_text": form == relations.form[:, None],
        "translation": (group >= 0)
        & ((group == relations.group[:, None]) | _listed(group, owner, relations.passage_group[positives])),
        "score": scores >= np.float32(options.max_score),
        "relative": scores >= limit[:, None],
        "repeated": _repeated(form),
    }


def _repeated(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each value of a row stands further to the left in it, too."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    again = np.zeros(values.shape, dtype=bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    repeated = np.empty_like(again)
    np.put_along_axis(repeated, order, again, axis=1)
    return repeated


def _listed(values: NDArray[np.int64], row: NDArray[np.int64], value: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each value is listed for its row by a pair (row, value)."""
    width = max(values.max(initial=0), value.max(initial=0)) + 2
    rows = np.arange(len(values))[:, None]
    return np.isin(rows * width + values + 1, row * width + value + 1)
