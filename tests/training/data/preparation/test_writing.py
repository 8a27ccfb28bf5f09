"""Which rows are drawn, on which side of the split, and which texts and normal forms are stored beside their tokens."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from modeling_f2llm.prompts import instruct
from tests.training.data.prepared_rows import contents, published_rows
from training.common.keyed import keyed_bits
from training.data.manifest import Source
from training.data.preparation import plan, writing
from training.data.prepared import DESCRIPTION, TEXT_OFFSETS, TEXTS
from training.trainer.batches import PackedCollator, PreparedRows, RowKey
from training.trainer.step import Objective

# Cap


@pytest.mark.parametrize(("cap", "validation_share"), [(1, 0.0), (30, 0.2), (99, 0.2)])
def test_cap_is_exact(write_source, run, decode, cap, validation_share):
    source = write_source(rows=100, negatives=(2, 3, 2), cap=cap)
    prepared = run(source, validation_share=validation_share, instructions=False)
    rows = decode(prepared) + decode(prepared, "validation")
    assert len(rows) == len(set(rows)) == cap
    assert set(rows) <= set(published_rows(source))
    used = {position for part in prepared.rows.values() for position in part.ravel().tolist()}
    assert used - {-1} == set(range(prepared.description["texts"])), "texts of rows above the cap are stored"


def test_cap_draws_rows_by_seed_and_source(write_source, run, decode):
    source = write_source(rows=200, cap=50)

    def rows(source=source, **changes):
        return set(decode(run(source, instructions=False, **changes)))

    drawn = rows()
    assert drawn != set(published_rows(source)[:50])
    assert rows(num_hard_negatives=(("retrieval", 1),)) == drawn  # independent of other options
    assert len(rows(seed=1) & drawn) < 30  # 12.5 expected
    assert len(rows(replace(source, name="other")) & drawn) < 30
    assert rows(replace(source, cap=80)) > drawn  # a larger cap adds rows


def test_split_is_disjoint_complete_and_of_the_share_asked_for(write_source, run, decode):
    source, raw = write_source(rows=4000, negatives=2), {"instructions": False, "validation_share": 0.01}
    published = published_rows(source)
    prepared = run(source, **raw)
    train, validation = decode(prepared), decode(prepared, "validation")
    assert (len(train), len(validation)) == (3960, 40)
    assert set(train).isdisjoint(validation) and {*train, *validation} == set(published)
    positions = [published.index(row) for row in validation]
    # The published order is kept within a split.
    assert positions == sorted(positions) and positions[0] < 1000 < 3000 < positions[-1]
    # The share is as exact under a cap, and takes the same queries first; other draws would share 1 of 40.
    capped = run(replace(source, cap=2000), **raw)
    assert {split: len(rows) for split, rows in capped.rows.items()} == {"train": 1980, "validation": 20}
    assert len(set(decode(capped, "validation")) & set(validation)) >= 15
    assert set(decode(run(source, **raw, seed=1), "validation")) != set(validation)


@pytest.fixture
def write_rows(write_columns):
    """Writes a source of the given queries, each with other texts."""

    def write(queries, name="rows", task_type="retrieval"):
        columns = {"query": queries, "passage": [f"passage {row}" for row in range(len(queries))]}
        columns |= {f"negative_{k}": [f"negative {row} {k}" for row in range(len(queries))] for k in (1, 2, 3)}
        return write_columns(columns, name, 50, task_type=task_type)

    return write


@pytest.mark.parametrize("task_type", ["retrieval", "clustering", "classification"])
def test_rows_of_a_query_are_on_one_side(write_rows, run, decode, monkeypatch, task_type):
    monkeypatch.setattr(plan, "_SHARD_ROWS", 50)
    source = write_rows([f"question {row % 100}" for row in range(1000)], task_type=task_type)
    prepared = run(source, instructions=False, validation_share=0.1)
    held_out = {row[0] for row in decode(prepared, "validation")}
    assert (len(prepared.rows["validation"]), len(held_out)) == (100, 10)
    assert held_out.isdisjoint(row[0] for row in decode(prepared))


def test_a_query_is_drawn_by_its_text_alone(write_rows, run, decode):
    queries = [f"question {row % 150}" for row in range(300)]
    sources = [write_rows(queries), write_rows(queries[::-1], "reversed", "clustering")]
    sources.append(write_rows([instruct("Another.", query) for query in queries], "instructed"))
    held_out = []
    for source, instructions in [(sources[0], False), (sources[1], False), (sources[0], True), (sources[2], True)]:
        rows = decode(run(source, instructions=instructions, validation_share=0.2), "validation")
        held_out.append({row[0].rsplit("Query: ", 1)[-1] for row in rows})
    assert len(held_out[0]) == 30
    assert all(each == held_out[0] for each in held_out)


MOST_ALIKE = ["the same"] * 900 + [f"question {row}" for row in range(100)]


@pytest.mark.parametrize(
    ("queries", "share", "validation"),
    [
        (MOST_ALIKE, 0.05, 50),  # a query of most rows does not leave too few to train on
        (["a"] * 9, 0.9, 0),  # a source is never held out whole
        (["a", "b"], 0.9, 1),
        (["a", "b", "c"], 0.0, 0),
        (["a", "b", "c"], 1.0, 3),
    ],
)
def test_number_of_rows_held_out(write_rows, run, queries, share, validation):
    rows = run(write_rows(queries), validation_share=share).rows
    assert (len(rows["train"]), len(rows["validation"])) == (len(queries) - validation, validation)


@pytest.mark.parametrize("rows_of_a_query", [1, 3, 1000])
def test_a_large_source_has_the_same_share(tmp_path, options, monkeypatch, rows_of_a_query):
    # More rows than are looked at first.
    monkeypatch.setattr(writing, "_LEAST_ROWS", 1000)
    shards = (plan.Shard(0, (0, 1), 0, 0, 150_000), plan.Shard(0, (1, 2), 150_000, 0, 50_000))
    source = Source("large", [], "retrieval", "Find.")
    work = plan.PreparationPlan(source, replace(options, validation_share=0.01), tmp_path, 0, 0, shards)
    draws = keyed_bits(7, np.arange(200_000) // rows_of_a_query)
    for shard, part in enumerate(np.split(draws, [150_000])):
        part.tofile(work.file("draws", shard))
    writing.choose_validation(work)
    held_out = np.fromfile(work.file("held_out"), dtype="<u8")
    assert np.isin(draws, held_out).sum() == pytest.approx(2000, abs=2)
    # The lowest draws there are, wherever they stand.
    assert held_out.tolist() == np.unique(draws)[: len(held_out)].tolist()


def texts_of_rows(prepared):
    return [tuple(prepared.texts(row[row >= 0])) for row in prepared.rows["train"]]


def test_kept_texts_are_those_that_the_model_reads(write_source, run, decode, refuses):
    source = write_source(rows=100, negatives=(2, 5), symmetric=True)
    prepared = run(source, keep_texts=True)
    assert prepared.has_texts and texts_of_rows(prepared) == decode(prepared)
    assert texts_of_rows(run(source, keep_texts=True, instructions=False)) == published_rows(source)
    # Whole where tokens are cut.
    cut = run(source, "cut", keep_texts=True, max_length=3)
    assert cut.lengths(np.arange(cut.description["texts"])).max() == 3
    assert texts_of_rows(cut) == texts_of_rows(prepared)
    # Nothing else changes.
    without, kept = run(source, "without"), run(source, "kept", keep_texts=True)
    described = dict(kept.description)
    assert described.pop("text_bytes") > 0 and described == without.description
    plain, more = contents(without.folder), contents(kept.folder)
    assert more.keys() - plain.keys() == {TEXTS, TEXT_OFFSETS, f"{TEXTS}.xxh3", f"{TEXT_OFFSETS}.xxh3"}
    assert all(more[name] == content for name, content in plain.items() if name != DESCRIPTION)
    with refuses(without.folder, "not kept", "--keep-texts"):
        without.texts(np.arange(2))


# Rows 0 and 1 have one passage, in two spellings; rows 2 and 3 one query; the query of row 4 is the passage of row 5.
SPELLED = {
    "query": ["where is it", "which island", "Name the river.", "name the river", "Bonaire", "largest of the three"],
    "passage": ["Curaçao", "Curac\u0327ao ", "Rhine", "Danube", "Kralendijk", "BONAIRE!"],
}
PAIRS = {(0, 1), (1, 0), (2, 3), (3, 2), (4, 5)}


@pytest.mark.parametrize("keys", [{"instructions": False}, {}, {"document_instruction_share": 1.0}])
def test_spellings_of_one_text_are_masked_in_a_batch(write_columns, run, keys):
    source = run(write_columns(SPELLED, symmetric=True), text_forms=True, **keys)
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
    # Twelve texts; three pairs of them are spellings of one.
    assert len(np.unique(source.forms(np.arange(12)))) == 9


def test_rows_whose_query_is_their_passage_are_reported_and_kept(write_columns, run, caplog):
    caplog.set_level(logging.WARNING)
    run(write_columns(SPELLED))
    assert not caplog.messages
    queries = ["Curaçao", instruct("Find.", "Bonaire."), "Aruba"]
    source = write_columns({"query": queries, "passage": ["curac\u0327ao!", "bonaire", "Oranjestad"]}, "names")
    prepared = run(source)
    assert prepared.description["query_is_passage"] == 2 and len(prepared.rows["train"]) == 3
    assert "source 'names': in 2 of 3 rows the query is the passage" in caplog.text
