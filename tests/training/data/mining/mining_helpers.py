"""What the tests of mining share: a SentenceTransformer of chosen vectors, and sources of pairs."""

from __future__ import annotations

from contextlib import contextmanager

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


def save_vectors(folder, vectors):
    """A model that gives each word the direction chosen for it; words it does not know, as in prompts, add nothing."""
    tokenizer = Tokenizer(WordLevel({"[unk]": 0} | {word: i for i, word in enumerate(vectors, 1)}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    rows = np.array(list(vectors.values()), dtype=np.float32)
    weights = np.concatenate([np.zeros_like(rows[:1]), rows])
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu").save(str(folder))
    return folder


def random_vectors(words, dimensions=8, seed=0):
    drawn = np.random.default_rng(seed).standard_normal((len(words), dimensions))
    return dict(zip(words, drawn, strict=True))


def write_pairs(folder, pairs, name="pairs", more=None, **fields):
    """A source of (query, passage, negative, …) and further columns."""
    folder.mkdir(exist_ok=True, parents=True)
    columns = list(zip(*pairs, strict=True))
    names = ["query", "passage", *(f"negative_{number}" for number in range(1, len(columns) - 1))]
    path = folder / f"{name}.parquet"
    pq.write_table(pa.table(dict(zip(names, columns, strict=True)) | dict(more or {})), path)
    return Source(name, [path], **{"task_type": "retrieval", "instruction": "Find it.", **fields})


def read_output(output, name="pairs"):
    return pq.read_table(output / f"{name}.parquet").to_pylist()


def negatives_of(row):
    return [text for column, text in row.items() if column.startswith("negative_") and text is not None]


@contextmanager
def encode_calls():
    """Texts and prompt of each call by which any SentenceTransformer of this process encodes meanwhile."""
    calls = []
    encode = SentenceTransformer.encode

    def record(self, inputs, *args, **kwargs):
        calls.append((inputs, kwargs["prompt"]))
        return encode(self, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SentenceTransformer, "encode", record)
        yield calls
