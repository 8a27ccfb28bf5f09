"""Preparation of sources, as several tests do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from tests.training.data.prepared_rows import Decode, Row, Run, Write
from training.data.manifest import Source
from training.data.preparation.pipeline import prepare
from training.data.preparation.plan import PreparationOptions
from training.data.prepared import PreparedSource


@pytest.fixture
def run(tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase, options: PreparationOptions) -> Run:
    """Prepares a source or several: with whole texts and without validation rows, unless changed."""

    def run(sources: Source | Sequence[Source], folder: str = "prepared", executor: Any = None, **changes: Any) -> Any:
        chosen = replace(options, **{"max_length": 2048, "validation_share": 0.0, **changes})
        given = [sources] if isinstance(sources, Source) else sources
        prepared = prepare(given, small_tokenizer, tmp_path / folder, chosen, executor)
        return prepared[0] if isinstance(sources, Source) else prepared

    return run


@pytest.fixture
def decode(small_tokenizer: PreTrainedTokenizerBase) -> Decode:
    """The texts of the rows of a split, decoded, without the negatives that a row does not have."""

    def decode(prepared: PreparedSource, split: str = "train") -> list[Row]:
        texts = [small_tokenizer.decode(prepared.tokens(text)[:-1]) for text in range(prepared.description["texts"])]
        return [tuple(texts[position] for position in row if position >= 0) for row in prepared.rows[split].tolist()]

    return decode


@pytest.fixture
def write_columns(tmp_path: Path) -> Write:
    """Writes a source of the given columns."""

    def write(columns: Mapping[str, Any], name: str = "a", row_group_size: int | None = None, **keys: Any) -> Source:
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table(dict(columns)), path, row_group_size=row_group_size)
        return Source(name, [path], **{"task_type": "retrieval", "instruction": "Find.", **keys})

    return write
