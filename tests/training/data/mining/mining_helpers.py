"""What the tests of mining share: a SentenceTransformer of chosen vectors, a reranker, and sources of pairs."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

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
    texts = {column: text for column, text in row.items() if column.removeprefix("negative_").isdecimal()}
    return [text for text in texts.values() if text is not None]


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


def save_reranker(folder, words, seed=0, **shape):
    """A CrossEncoder with random weights, whose scores of these words are spread between 0 and 1."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **{"num_labels": 1, **sizes, **shape})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config)
        # Initial weights are so small that all pairs would score the same.
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.data.normal_(0.0, 0.5)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder
