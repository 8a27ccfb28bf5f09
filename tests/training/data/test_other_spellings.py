"""Texts that differ in spelling only: no negatives of one another in a batch, and told where a row has both."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from modeling_f2llm.prompts import instruct
from training.data.manifest import Source
from training.data.options import PreparationOptions
from training.data.preparation.pipeline import prepare
from training.data.prepared import PreparedSource
from training.trainer.collator import PackedCollator, PreparedRows
from training.trainer.objective import Objective
from training.trainer.sampler import RowKey

Prepare = Callable[..., PreparedSource]
# Rows 0 and 1 have one passage, in two spellings; rows 2 and 3 one query; the query of row 4 is the passage of row 5.
QUERIES = ["where is it", "which island", "Name the river.", "name the river", "Bonaire", "largest of the three"]
PASSAGES = ["Curaçao", "Curac\u0327ao ", "Rhine", "Danube", "Kralendijk", "BONAIRE!"]
PAIRS = {(0, 1), (1, 0), (2, 3), (3, 2), (4, 5)}


@pytest.fixture
def prepared(tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase) -> Prepare:
    def build(queries: list[str] = QUERIES, passages: list[str] = PASSAGES, **keys: object) -> PreparedSource:
        pq.write_table(pa.table({"query": queries, "passage": passages}), tmp_path / "a.parquet")
        source = Source("names", [tmp_path / "a.parquet"], "retrieval", "Find it.", symmetric=True)
        options = PreparationOptions(validation_share=0, num_hard_negatives=(("retrieval", 0),), **keys)
        return prepare([source], small_tokenizer, tmp_path / "prepared", options)[0]

    return build


@pytest.mark.parametrize("keys", [{"instructions": False}, {}, {"document_instruction_share": 1.0}])
def test_spellings_of_one_text_are_masked_in_a_batch(prepared: Prepare, keys: dict[str, object]) -> None:
    source = prepared(text_forms=True, **keys)
    rows = [PreparedRows([source])[RowKey(0, 0, row)] for row in range(6)]
    batch = PackedCollator([source], {"retrieval": 0})(rows)
    embeddings = torch.randn(len(batch["forms"]), 8, generator=torch.Generator().manual_seed(0))
    exclude = torch.tensor([[(row, other) in PAIRS for other in range(6)] for row in range(6)])
    query, positive = (torch.nn.functional.normalize(embeddings[batch[name]], dim=-1) for name in ("query", "positive"))
    logits = (query @ positive.T / 0.05).masked_fill(exclude, -torch.inf)
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(6))
    masked = Objective(0.05, mask_duplicates=True).terms(embeddings, batch)["in_batch"]
    torch.testing.assert_close(masked, expected, rtol=1e-5, atol=1e-5)
    assert masked < Objective(0.05).terms(embeddings, batch)["in_batch"]


def test_forms_are_those_of_the_texts(prepared: Prepare) -> None:
    source = prepared(text_forms=True)
    forms = source.forms(np.arange(source.description["texts"]))
    # Twelve texts; three pairs of them are spellings of one.
    assert len(forms) == 12 and len(np.unique(forms)) == 9
    plain = prepared(seed=1)
    assert plain.forms(np.array([3, 1])).tolist() == [3, 1]


def test_rows_whose_query_is_their_passage_are_told_and_kept(
    prepared: Prepare, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    prepared()
    assert not caplog.messages
    queries = ["Curaçao", instruct("Find it.", "Bonaire."), "Aruba"]
    source = prepared(queries, ["curac\u0327ao!", "bonaire", "Oranjestad"])
    assert source.description["query_is_passage"] == 2 and len(source.rows["train"]) == 3
    assert "source 'names': in 2 of 3 rows the query is the passage" in caplog.text
