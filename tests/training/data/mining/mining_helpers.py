"""What the tests of mining share: a SentenceTransformer of chosen vectors, and sources of pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from training.data.manifest import Source

Rows = list[dict[str, Any]]


def save_vectors(folder: Path, vectors: Mapping[str, np.ndarray]) -> Path:
    """A model that gives each word the direction chosen for it; words it does not know, as in prompts, add nothing."""
    tokenizer = Tokenizer(WordLevel({"[unk]": 0} | {word: i for i, word in enumerate(vectors, 1)}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    rows = np.array(list(vectors.values()), dtype=np.float32)
    weights = np.concatenate([np.zeros_like(rows[:1]), rows])
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu").save(str(folder))
    return folder


def random_vectors(words: Sequence[str], dimensions: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(seed).standard_normal((len(words), dimensions))
    return dict(zip(words, drawn, strict=True))


def write_pairs(
    folder: Path,
    pairs: Sequence[tuple[str, ...]],
    name: str = "pairs",
    more: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Source:
    """A source of (query, passage, negative, …) and further columns."""
    folder.mkdir(exist_ok=True, parents=True)
    columns = list(zip(*pairs, strict=True))
    names = ["query", "passage", *(f"negative_{number}" for number in range(1, len(columns) - 1))]
    path = folder / f"{name}.parquet"
    pq.write_table(pa.table(dict(zip(names, columns, strict=True)) | dict(more or {})), path)
    return Source(name, [path], **{"task_type": "retrieval", "instruction": "Find it.", **fields})


def read_output(output: Path, name: str = "pairs") -> Rows:
    return pq.read_table(output / f"{name}.parquet").to_pylist()


def negatives_of(row: Mapping[str, Any]) -> list[str]:
    return [text for column, text in row.items() if column.startswith("negative_") and text is not None]


@contextmanager
def counted_texts() -> Iterator[list[str]]:
    """The texts that any SentenceTransformer of this process encodes meanwhile."""
    texts: list[str] = []
    encode = SentenceTransformer.encode

    def count(self: SentenceTransformer, inputs: list[str], *args: Any, **kwargs: Any) -> Any:
        texts.extend(inputs)
        return encode(self, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SentenceTransformer, "encode", count)
        yield texts
