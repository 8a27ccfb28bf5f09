"""A model as mteb sees it: each width and precision is a view of the same embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mteb
import torch

# Private, but the only way to join titles, texts and instructions exactly as mteb's own models do.
from mteb._create_dataloaders import create_dataloader
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt, get_prompt_name
from mteb.types import PromptType
from torch import Tensor

from training.common.errors import UserError
from training.evaluation.encoding import EmbeddingStore, Floats, calibrate, quantized, unit_length

# Documents compared with queries at once, and queries per block: 512 MiB of float32 similarities.
_DOCUMENTS, _QUERIES = 1 << 16, 1 << 11

Results = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Prompts:
    """Prompts before the texts of a task, by mteb's names: task, type of task, ``query``, ``document``."""

    own: dict[str, str] = field(default_factory=dict)  # whole prompts
    by_task: dict[str, Any] | None = None  # instructions
    # Text with ``{instruction}``, or (in mteb's registry) a function of instruction and type of prompt.
    template: Any = None
    on_documents: bool = False  # whether documents get the template, too
    default: str = ""  # where no other fits
    described: str = "none"  # for the log


class EncoderView(AbsEncoder):
    """An mteb encoder over the leading dimensions of a store's embeddings in one precision.

    Beside int8 documents, queries stay in float32, as in FAISS; beside binary documents they are binary. Embeddings
    compared by cosine are normalized before they are stored in int8. int8 is calibrated on each corpus of retrieval,
    and otherwise on the first texts of a task, so that training and test texts share a scale.

    It implements mteb's ``SearchProtocol``, because mteb's wrapper around encoders would read and format the corpus
    again for each view and subset.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        meta: ModelMeta,
        dimension: int,
        precision: str = "float32",
        prompts: Prompts | None = None,
    ) -> None:
        if not 1 <= dimension <= store.width:
            raise UserError(f"dimension {dimension}: {meta.name} has {store.width}; choose from 1 to {store.width}")
        self.store, self.dimension, self.precision = store, dimension, precision
        self.prompts = prompts or Prompts()
        # Read by mteb's methods.
        self.model, self.model_prompts = store.model, self.prompts.own
        self.prompts_dict, self.instruction_template = self.prompts.by_task, self.prompts.template
        self._ranges: dict[str, Floats] = {}
        self._similarity = meta.similarity_fn_name or store.model.similarity_fn_name
        # mteb's cache keeps results by these: views must not share one.
        experiment = {**(meta.experiment_kwargs or {}), "dimension": dimension, "precision": precision}
        if precision == "int8":
            experiment["quantizer"] = "QT_8bit"
        full = dimension == store.width and precision == "float32"
        self.mteb_model_meta = meta if full else meta.model_copy(update={"experiment_kwargs": experiment})

    def prompt(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """Return the instruction for the task or its type, or else the model's prompt."""
        used = self.prompts
        # Local tasks get the model's own instruction: they are what it was trained for.
        instructed = not used.own or (
            get_prompt_name(used.by_task, task_metadata, prompt_type) and _is_of_mteb(task_metadata.name)
        )
        if used.template is not None and instructed:
            if prompt_type == PromptType.document and not used.on_documents:
                return ""
            return self.get_task_instruction(task_metadata, prompt_type)
        own = get_prompt(used.own, task_metadata, prompt_type)
        return used.default if own is None else own

    def encode(
        self, inputs: Any, *, task_metadata: Any, prompt_type: PromptType | None = None, **kwargs: Any
    ) -> Floats:
        """Return ``(n, dimension)`` embeddings of mteb's batches of texts."""
        return self.embed([text for batch in inputs for text in batch["text"]], task_metadata, prompt_type)

    def embed(self, texts: Sequence[str], task_metadata: Any, prompt_type: PromptType | None) -> Floats:
        """Return ``(n, dimension)`` embeddings of a task's texts."""
        found = self._leading(texts, task_metadata, prompt_type)
        if self.precision == "float32" or (self.precision == "int8" and prompt_type == PromptType.query):
            return found
        if task_metadata.name not in self._ranges:
            self._ranges[task_metadata.name] = calibrate(found)
        return quantized(found, self.precision, self._ranges[task_metadata.name])

    def _leading(self, texts: Sequence[str], task_metadata: Any, prompt_type: PromptType | None) -> Floats:
        prompt = self.prompt(task_metadata, prompt_type)
        found = self.store.encode(texts, prompt, prompt_type and prompt_type.value)[:, : self.dimension]
        return unit_length(found) if self.precision == "int8" and self._similarity == "cosine" else found

    def index(self, corpus: Any, *, task_metadata: Any, **kwargs: Any) -> None:
        """Set the documents that are searched, and their scale in int8."""
        self._ids, self._documents = self._read(corpus, task_metadata, PromptType.document)
        if self.precision == "int8":
            first = self._leading(self._documents[:_DOCUMENTS], task_metadata, PromptType.document)
            self._ranges[task_metadata.name] = calibrate(first)

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> Results:
        """Return the similarities of the ``top_k`` documents of each query, or of those in ``top_ranked``."""
        names, texts = self._read(queries, task_metadata, PromptType.query)
        embeddings = torch.from_numpy(self.embed(texts, task_metadata, PromptType.query))
        if top_ranked is not None:
            return self._rank(names, embeddings, top_ranked, task_metadata)
        values, rows = best_documents(embeddings, self._chunks(task_metadata), self.similarity, top_k)
        found = zip(names, rows.tolist(), values.tolist(), strict=True)
        return {name: {self._ids[row]: value for row, value in zip(*of, strict=True)} for name, *of in found}

    def _rank(
        self, names: Sequence[str], queries: Tensor, given: Mapping[str, Sequence[str]], task_metadata: Any
    ) -> Results:
        text_of = dict(zip(self._ids, self._documents, strict=True))
        results: Results = {name: {} for name in names}
        for name, query in zip(names, queries, strict=True):
            if documents := list(given.get(name, ())):
                embeddings = self.embed([text_of[each] for each in documents], task_metadata, PromptType.document)
                found = torch.as_tensor(self.similarity(query[None], torch.from_numpy(embeddings)))[0]
                results[name] = dict(zip(documents, found.tolist(), strict=True))
        return results

    def _chunks(self, task_metadata: Any) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, len(self._documents), _DOCUMENTS):
            texts = self._documents[first : first + _DOCUMENTS]
            yield first, torch.from_numpy(self.embed(texts, task_metadata, PromptType.document))

    def _read(self, dataset: Any, task_metadata: Any, prompt_type: PromptType) -> tuple[list[str], list[str]]:
        """Return ids and texts of a corpus or queries; they are read once for all views and subsets."""
        key = (prompt_type, id(dataset))
        if key not in self.store.read:
            loader = create_dataloader(dataset, task_metadata=task_metadata, prompt_type=prompt_type, batch_size=512)
            texts = [text for batch in loader for text in batch["text"]]
            # While the dataset is held, no other one gets its id.
            self.store.read[key] = (list(dataset["id"]), texts, dataset)
        return self.store.read[key][:2]


def best_documents(
    queries: Tensor, chunks: Iterator[tuple[int, Tensor]], similarity: Any, top_k: int
) -> tuple[Tensor, Tensor]:
    """Return ``(n, k)`` similarities and positions of the ``k <= top_k`` most similar documents, unsorted.

    ``queries`` are ``(n, d)`` embeddings; a chunk is the position of its first document and ``(m, d)`` embeddings.
    """
    values, rows = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for first, documents in chunks:
        found = [
            torch.as_tensor(similarity(block, documents)).float().topk(min(top_k, len(documents)), dim=1)
            for block in queries.split(_QUERIES)
        ]
        values = torch.cat([values, torch.cat([each.values for each in found])], dim=1)
        rows = torch.cat([rows, torch.cat([each.indices for each in found]) + first], dim=1)
        values, kept = values.topk(min(top_k, values.shape[1]), dim=1)
        rows = rows.gather(1, kept)
    return values, rows


@cache
def _is_of_mteb(task: str) -> bool:
    try:
        mteb.get_task(task)
    except KeyError:
        return False
    return True
