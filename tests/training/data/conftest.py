"""Preparation of sources, as several tests do it."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.data.manifest import Source
from training.data.preparation.pipeline import prepare


@pytest.fixture
def run(tmp_path, small_tokenizer, options):
    """Prepares a source or several: with whole texts and without validation rows, unless changed."""

    def run(sources, folder="prepared", executor=None, **changes):
        chosen = replace(options, **{"max_length": 2048, "validation_share": 0.0, **changes})
        given = [sources] if isinstance(sources, Source) else sources
        prepared = prepare(given, small_tokenizer, tmp_path / folder, chosen, executor)
        return prepared[0] if isinstance(sources, Source) else prepared

    return run


@pytest.fixture
def decode(small_tokenizer):
    """The texts of the rows of a split, decoded, without the negatives that a row does not have."""

    def decode(prepared, split="train"):
        texts = [small_tokenizer.decode(prepared.tokens(text)[:-1]) for text in range(prepared.description["texts"])]
        return [tuple(texts[position] for position in row if position >= 0) for row in prepared.rows[split].tolist()]

    return decode


@pytest.fixture
def write_columns(tmp_path):
    """Writes a source of the given columns."""

    def write(columns, name="a", row_group_size=None, **keys):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table(dict(columns)), path, row_group_size=row_group_size)
        return Source(name, [path], **{"task_type": "retrieval", "instruction": "Find.", **keys})

    return write
