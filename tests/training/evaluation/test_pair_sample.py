from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from training.evaluation.pair_sample import sample_pairs
from training.evaluation.pairs import Pairs


@pytest.fixture
def pairs() -> Pairs:
    """A hundred pairs of fifty candidates: sixty rows of one language, thirty of another, ten of a third, by turns."""
    languages = [("deu" if row % 10 == 9 else "fra" if row % 10 > 5 else "kor") for row in range(100)]
    candidates = [f"passage {number}" for number in range(50)]
    # Every fifth query has two passages.
    relevant = [(row * 7 % 50,) if row % 5 else (row % 50, row % 50 + 1) for row in range(100)]
    return Pairs(
        [f"query {row}" for row in range(100)], candidates, relevant, languages, [f"s{row}" for row in range(100)]
    )


def passages(pairs: Pairs) -> dict[str, set[str]]:
    texts = [{pairs.candidates[place] for place in own} for own in pairs.relevant]
    return dict(zip(pairs.queries, texts, strict=True))


@pytest.mark.parametrize("size", [100, 1000])
def test_all_are_taken_if_there_are_no_more(pairs: Pairs, size: int) -> None:
    sample = sample_pairs(pairs, size, 50)
    assert (sample.queries, sample.candidates, sample.languages) == (pairs.queries, pairs.candidates, pairs.languages)
    assert sample.relevant == pairs.relevant


def test_languages_keep_their_shares_and_pairs_their_passages(pairs: Pairs) -> None:
    sample = sample_pairs(pairs, 10, 50)
    assert Counter(sample.languages) == {"kor": 6, "fra": 3, "deu": 1}
    assert passages(sample).items() <= passages(pairs).items()
    rows = [int(query.split()[1]) for query in sample.queries]
    assert rows == sorted(rows) and [f"s{row}" for row in rows] == sample.scripts
    # All over the file.
    assert min(rows) < 20 and max(rows) >= 80


@pytest.mark.parametrize(("size", "candidates"), [(10, 50), (10, 20), (10, 3), (100, 1), (100, 50)])
def test_candidates_are_bounded_but_never_lack_a_passage(pairs: Pairs, size: int, candidates: int) -> None:
    sample = sample_pairs(pairs, size, candidates)
    taken = set.union(*passages(sample).values())
    assert len(sample.candidates) == max(candidates, len(taken)) and taken <= set(sample.candidates)
    positions = [pairs.candidates.index(candidate) for candidate in sample.candidates]
    assert positions == sorted(set(positions))
    assert passages(sample).items() <= passages(pairs).items()


def test_without_languages_rows_are_taken_at_equal_distances(pairs: Pairs) -> None:
    untold = replace(pairs, languages=None, scripts=None)
    sample = sample_pairs(untold, 10, 50)
    assert (
        sample.queries == [f"query {row}" for row in range(5, 100, 10)] and sample.languages is sample.scripts is None
    )
    assert passages(sample).items() <= passages(pairs).items()
