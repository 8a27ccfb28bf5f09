"""Queries and the texts among which their passages are to be found, as mteb's retrieval has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from training.common.keyed import text_key
from training.data.cleaning.normalise import normalise


class Corpus:
    """Distinct texts that can be found.

    Args:
        texts: The texts; those that repeat count once.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        # Ids by text rather than by place: the order of rows shall not decide between equal scores.
        self._ids = {text: f"{text_key(text):016x}" for text in dict.fromkeys(texts)}
        self._spellings: dict[str, list[str]] = defaultdict(list)
        for text, own in self._ids.items():
            self._spellings[normalise(text)].append(own)
        self.dataset = Dataset.from_dict({"id": list(self._ids.values()), "text": list(self._ids)})

    def split(
        self, queries: Sequence[str], passages: Sequence[str], negatives: Sequence[Sequence[str]] | None = None
    ) -> dict[str, Any]:
        """One split of a retrieval or reranking task.

        All passages of rows with the same query are right, and so are texts of the corpus that differ from them in form
        only. A query is no candidate of its own, unless as its passage.

        Args:
            queries: ``n`` texts.
            passages: ``n`` texts of the corpus.
            negatives: ``n`` lists of texts of the corpus. If given, a query has none but its own passages and
                negatives as candidates; else the whole corpus.
        """
        relevant: dict[str, dict[str, int]] = {}
        candidates: dict[str, dict[str, None]] = {}
        for row, (query, passage) in enumerate(zip(queries, passages, strict=True)):
            relevant.setdefault(query, {}).update(dict.fromkeys(self._spellings[normalise(passage)], 1))
            if negatives is not None:
                own = candidates.setdefault(query, {})
                own.update(dict.fromkeys(self._ids[text] for text in (passage, *negatives[row])))
        for query, own in candidates.items():
            # What a query cannot find is none of its answers.
            relevant[query] = {each: 1 for each in relevant[query] if each in own}
        ids = {query: _query_id(query, found) for query, found in relevant.items()}
        return {
            "corpus": self.dataset,
            "queries": Dataset.from_dict({"id": list(ids.values()), "text": list(ids)}),
            "relevant_docs": {ids[query]: found for query, found in relevant.items()},
            "top_ranked": {ids[query]: list(own) for query, own in candidates.items()} or None,
        }


def _query_id(query: str, relevant: Mapping[str, int]) -> str:
    own = f"{text_key(query):016x}"
    return f"q{own}" if own in relevant else own
