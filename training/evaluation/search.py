"""Retrieval for mteb over a store's embeddings: a corpus is read once, however many views and subsets search it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mteb._create_dataloaders import create_dataloader
from mteb.types import PromptType
from torch import Tensor

from training.evaluation.encoding import EncoderView

# Documents compared with the queries at a time, and queries whose scores of those are held: 512 MiB of float32.
_DOCUMENTS, _QUERIES = 1 << 16, 1 << 11

Results = dict[str, dict[str, float]]


def best_documents(
    queries: Tensor, chunks: Iterator[tuple[int, Tensor]], similarity: Any, top_k: int
) -> tuple[Tensor, Tensor]:
    """The most similar documents to each query, in no order.

    Args:
        queries: ``(n, d)`` embeddings.
        chunks: Position of the first document and ``(m, d)`` embeddings, until there are no more.
        similarity: Function of both that gives ``(n, m)`` similarities.
        top_k: Documents found for each query, at most.

    Returns:
        ``(n, k)`` similarities and positions, with ``k`` the smaller of ``top_k`` and the number of documents.
    """
    values, places = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for first, documents in chunks:
        found = [
            torch.as_tensor(similarity(block, documents)).float().topk(min(top_k, len(documents)), dim=1)
            for block in queries.split(_QUERIES)
        ]
        values = torch.cat([values, torch.cat([each.values for each in found])], dim=1)
        places = torch.cat([places, torch.cat([each.indices for each in found]) + first], dim=1)
        if values.shape[1] > top_k:
            values, kept = values.topk(top_k, dim=1)
            places = places.gather(1, kept)
    return values, places


class SearchView(EncoderView):
    """A view that searches by itself (mteb's ``SearchProtocol``), instead of by mteb's wrapper around an encoder.

    The results are the same; the wrapper would read and format the corpus anew for each view and subset.
    """

    def index(self, corpus: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, **kwargs: Any) -> None:
        """Takes note of the documents to be searched."""
        # The corpora of a task's languages are stored with a scale each.
        self._ranges.pop(task_metadata.name, None)
        self._documents = self._texts(corpus, task_metadata, PromptType.document)
        self._ids: list[str] = self.store.once(("ids", id(corpus)), corpus, lambda: list(corpus["id"]))

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> Results:
        """The ``top_k`` most similar documents to each query, or those of ``top_ranked``, with their similarities."""
        if self.precision == "int8":
            first = self._documents[:_DOCUMENTS]
            self._ranges_of(task_metadata, lambda: self._leading(first, task_metadata, PromptType.document))
        texts = self._texts(queries, task_metadata, PromptType.query)
        embeddings = torch.from_numpy(self.embed(texts, task_metadata, PromptType.query))
        names = list(queries["id"])
        if top_ranked is not None:
            return self._rank(names, embeddings, top_ranked, task_metadata)
        values, places = best_documents(embeddings, self._chunks(task_metadata), self.similarity, top_k)
        return {
            name: {self._ids[place]: value for value, place in zip(*found, strict=True)}
            for name, found in zip(names, zip(values.tolist(), places.tolist(), strict=True), strict=True)
        }

    def _rank(
        self, names: Sequence[str], queries: Tensor, given: Mapping[str, Sequence[str]], task_metadata: Any
    ) -> Results:
        place_of = {name: place for place, name in enumerate(self._ids)}
        results: Results = {}
        for name, query in zip(names, queries, strict=True):
            documents = list(given.get(name, ()))
            results[name] = {}
            if documents:
                texts = [self._documents[place_of[each]] for each in documents]
                embeddings = torch.from_numpy(self.embed(texts, task_metadata, PromptType.document))
                found = torch.as_tensor(self.similarity(query[None], embeddings))[0]
                results[name] = dict(zip(documents, found.tolist(), strict=True))
        return results

    def _chunks(self, task_metadata: Any) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, len(self._documents), _DOCUMENTS):
            texts = self._documents[first : first + _DOCUMENTS]
            yield first, torch.from_numpy(self.embed(texts, task_metadata, PromptType.document))

    def _texts(self, dataset: Any, task_metadata: Any, prompt_type: PromptType) -> list[str]:
        """Texts as mteb's own loader makes them, of title and text or of query and instruction."""

        def read() -> list[str]:
            loader = create_dataloader(dataset, task_metadata=task_metadata, prompt_type=prompt_type, batch_size=512)
            return [text for batch in loader for text in batch["text"]]

        return self.store.once((prompt_type.value, id(dataset)), dataset, read)
