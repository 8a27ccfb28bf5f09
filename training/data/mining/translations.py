"""Which texts are known translations of each other: what bitext sources connect, directly or by a chain of pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from training.data.manifest import Source
from training.data.mining.text_ids import ID, Ids, find, form_ids
from training.data.published import PublishedFile


class Translations:
    """Groups of texts that say the same, in whatever spelling.

    Args:
        queries: ``(n,)`` ids of forms.
        passages: ``(n,)`` ids of their translations.
    """

    def __init__(self, queries: Ids, passages: Ids) -> None:
        pairs = len(queries)
        self._ids, ends = np.unique(np.concatenate([queries, passages]), return_inverse=True)
        ends = ends.reshape(-1)
        shape = (len(self._ids), len(self._ids))
        graph = coo_array((np.ones(pairs, dtype=bool), (ends[:pairs], ends[pairs:])), shape=shape)
        self._groups = connected_components(graph, directed=False)[1] if pairs else np.zeros(0, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._ids)

    def groups(self, ids: Ids) -> NDArray[np.int64]:
        """``(n,)`` numbers of the groups of forms, -1 for those that are in none."""
        at = find(ids, self._ids)
        if not len(self._groups):
            return at
        return np.where(at >= 0, self._groups[at], -1).astype(np.int64)


def bitext_sources(sources: Sequence[Source]) -> list[Source]:
    """Sources whose pairs are taken for translations: symmetric retrieval.

    Symmetric clustering pairs texts of one class: chains of them would make one group of all its texts.
    """
    return [source for source in sources if source.symmetric and source.task_type == "retrieval"]


def find_translations(sources: Sequence[Source]) -> Translations:
    """Reads the pairs of bitext sources.

    Raises:
        UserError: If a file is faulty.
    """
    queries, passages = [np.zeros(0, dtype=ID)], [np.zeros(0, dtype=ID)]
    for source in sources:
        for path in source.files:
            for batch in PublishedFile(path).batches(raw=True):
                queries.append(form_ids(batch.columns["query"]))
                passages.append(form_ids(batch.columns["passage"]))
    return Translations(np.concatenate(queries), np.concatenate(passages))
