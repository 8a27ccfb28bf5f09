"""Mining gives the negatives of mine_hard_negatives: the same from shards, caches, processes and after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from modeling_f2llm.prompts import instruct
from tests.training.data.mining.mining_helpers import (
    encode_calls,
    negatives_of,
    random_vectors,
    read_output,
    save_vectors,
    write_pairs,
)
from training.common.executor import Executor
from training.data.manifest import load_manifest
from training.data.mining import corpus, mining
from training.data.mining.mining import Resources, mine
from training.data.mining.search import MiningOptions
from training.data.published import PublishedFile
from training.models.encoders import find_miner

QUERIES, PASSAGES = [f"q{number}" for number in range(150)], [f"p{number}" for number in range(120)]
PAIRS = [(QUERIES[row * 7 % 150], PASSAGES[row * 11 % 120]) for row in range(260)]
OPTIONS = MiningOptions(top=40, skip=5, max_score=0.6, relative=0.95, negatives=6)
# Only the positive is refused.
PURE = MiningOptions(top=40, skip=0, max_score=1.01, relative=2.0, negatives=30)


def contents(output):
    """What a run wrote, without what came from the cache."""
    report = json.loads((output / "mining.json").read_text())
    for entry in report["sources"].values():
        del entry["texts"]
    files = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    return files | {"mining.json": json.dumps(report).encode()}


def texts_of(calls):
    return [text for texts, _ in calls for text in texts]


@pytest.fixture
def source(tmp_path):
    """Queries of one or two positives, passages of several queries, and a pair that is there twice."""
    return write_pairs(tmp_path / "source", [*PAIRS, PAIRS[3]], more={"lang": ["eng"] * 261})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Vectors of queries lie near those of their positives."""
    vectors = random_vectors([*QUERIES, *PASSAGES])
    for query, passage in PAIRS:
        vectors[query] = vectors[query] + vectors[passage]
    return save_vectors(tmp_path_factory.mktemp("model") / "model", vectors)


@pytest.fixture(scope="module")
def miner(folder):
    return find_miner(str(folder))


@pytest.fixture
def run(miner, tmp_path):
    """Mines one source into a folder and returns its entry of the report."""

    def run(source, output="out", options=OPTIONS, miner=miner, **more):
        return mine([source], miner, tmp_path / output, options, **more)["sources"][source.name]

    return run


@pytest.fixture
def small_units(monkeypatch):
    """Several chunks of texts and blocks of queries; other processes do not see it."""
    monkeypatch.setattr(corpus, "CHUNK_TEXTS", 32)
    monkeypatch.setattr(mining, "BLOCK_QUERIES", 64)


@pytest.mark.parametrize(("use_faiss", "instruction"), [(False, True), (True, False)])
def test_equals_mine_hard_negatives(source, folder, run, tmp_path, use_faiss, instruction):
    if use_faiss:
        pytest.importorskip("faiss")
    table = pq.read_table(source.files[0])
    theirs = mine_hard_negatives(
        Dataset.from_dict({name: table[name].to_pylist() for name in ("query", "passage")}),
        SentenceTransformer(str(folder), device="cpu"),
        **{"range_min": 5, "range_max": 40, "max_score": 0.6, "relative_margin": 1 - 0.95, "num_negatives": 6},
        query_prompt=instruct(source.instruction) if instruction else None,
        output_format="n-tuple",
        use_faiss=use_faiss,
        verbose=False,
    )
    resources, out = Resources(search="faiss" if use_faiss else "torch"), tmp_path / "out"
    counts = run(source, options=replace(OPTIONS, instruction=instruction), resources=resources)
    found = [{(row["query"], row["passage"]): negatives_of(row) for row in rows} for rows in (read_output(out), theirs)]
    assert found[0] == found[1]
    # Some of each, or the test would show little.
    assert 100 < counts["kept"] < 261 and min(counts["refused"][rule] for rule in ("score", "relative")) > 100


def test_rows_keep_their_order_and_other_columns(run, tmp_path):
    pairs = list(zip(QUERIES[:100], PASSAGES[:100], strict=True))
    more = {"lang": ["deu", "eng"] * 50, "stars": pa.array(range(100), pa.int8()), "tags": [["a", "b"]] * 100}
    source = write_pairs(tmp_path / "source", pairs, more=more)
    report = run(source)
    table = pq.read_table(tmp_path / "out" / "pairs.parquet")
    assert table.column_names == ["query", "passage", *(f"negative_{n}" for n in range(1, 7)), "lang", "stars", "tags"]
    kept = table["stars"].to_pylist()
    assert kept == sorted(kept) and table.schema.field("stars").type == pa.int8()
    for row, number in zip(table.to_pylist(), kept, strict=True):
        assert (row["query"], row["passage"]) == pairs[number]
        assert row["lang"] == more["lang"][number] and row["tags"] == ["a", "b"]
        assert len(set(negatives_of(row))) == 6
    assert report["rows"] == 100 and report["kept"] == len(kept) == 100 - report["dropped"] < 100
    short = run(source, "short", replace(OPTIONS, keep_short=True))
    rows = read_output(tmp_path / "short")
    assert short["kept"] == len(rows) == 100 and short["dropped"] == 0
    assert sum(len(negatives_of(row)) < 6 for row in rows) == report["dropped"]


def test_existing_negatives_stay_first(run, tmp_path):
    pairs = list(zip(QUERIES[:80], PASSAGES[:80], strict=True))
    run(write_pairs(tmp_path / "bare", pairs), options=replace(OPTIONS, keep_short=True))
    mined = {row["query"]: negatives_of(row) for row in read_output(tmp_path / "out")}
    # A contradiction that is not a passage, one that mining finds too, and none.
    own = [("no", mined[query][2] if len(mined[query]) > 2 else "never", None) for query, _ in pairs]
    source = write_pairs(tmp_path / "own", [(*pair, *more) for pair, more in zip(pairs, own, strict=True)])
    report, rows = run(source, "filled"), read_output(tmp_path / "filled")
    assert report["kept"] == len(rows) > 20
    for row in rows:
        first = [text for text in own[QUERIES.index(row["query"])] if text]
        rest = [text for text in mined[row["query"]] if text not in first]
        assert negatives_of(row) == [*first, *rest][:6]
    run(source, "replaced", replace(OPTIONS, replace=True))
    for row in read_output(tmp_path / "replaced"):
        assert negatives_of(row) == mined[row["query"]]


def test_several_files_and_sources_and_their_manifest(source, miner, tmp_path):
    half = pq.read_table(source.files[0])
    parts = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    pq.write_table(half[:100], parts[0])
    pq.write_table(half[100:].drop_columns("lang"), parts[1])
    divided = replace(source, name="divided", files=parts, symmetric=True, languages=["eng"], licence="CC0-1.0", cap=99)
    divided = replace(divided, weight=0.5)
    mine([source, divided], miner, tmp_path / "out", OPTIONS)
    one, other = read_output(tmp_path / "out"), read_output(tmp_path / "out", "divided")
    assert [{**row, "lang": None} for row in one] == [{**row, "lang": None} for row in other]
    assert {row["lang"] for row in other} == {"eng", None}
    first, second = load_manifest(tmp_path / "out" / "manifest.yaml")
    assert first == replace(source, files=[tmp_path / "out" / "pairs.parquet"])
    assert second == replace(divided, files=[tmp_path / "out" / "divided.parquet"])
    assert sum(map(len, PublishedFile(second.files[0], required_negatives=6).batches())) == len(other)


def test_a_source_without_a_full_row_is_reported_and_left_out(source, miner, tmp_path, refuses, caplog):
    # Of 40 passages, 39 are candidates: one too few after 10 are skipped.
    poor = write_pairs(tmp_path / "poor", list(zip(QUERIES[:40], PASSAGES[:40], strict=True)), name="poor")
    for skip, names in ((9, ["pairs", "poor"]), (10, ["pairs"])):
        report = mine([source, poor], miner, tmp_path / str(skip), replace(PURE, skip=skip))
        assert [entry.name for entry in load_manifest(tmp_path / str(skip) / "manifest.yaml")] == names
    assert report["sources"]["poor"]["kept"] == 0 and not (tmp_path / "10" / "poor.parquet").exists()
    assert "poor: no row has 30 negatives" in caplog.text
    # Thresholds that keep nothing cost no earlier result.
    before = [(tmp_path / "9" / name).read_bytes() for name in ("poor.parquet", "manifest.yaml")]
    with refuses("no row of any source", "mining.json", "--keep-short"):
        mine([poor], miner, tmp_path / "9", replace(PURE, skip=10))
    assert json.loads((tmp_path / "9" / "mining.json").read_text())["sources"]["poor"]["dropped"] == 40
    assert [(tmp_path / "9" / name).read_bytes() for name in ("poor.parquet", "manifest.yaml")] == before


def test_other_spellings_are_not_negatives(tmp_path, run):
    spellings = ["Curaçao", "Curaçao ", "curaçao", "Curaçao.", "Curac\u0327ao"]
    others = [f"island{number}" for number in range(12)]
    pairs = [(f"query{number}", passage) for number, passage in enumerate([*spellings, *others])]
    pairs.append(("CURAÇAO", "Willemstad"))
    words = {word for pair in pairs for text in pair for word in text.split()}
    miner = find_miner(str(save_vectors(tmp_path / "model", random_vectors(sorted(words)))))
    pure = replace(PURE, top=18, negatives=18, keep_short=True)

    def negatives(name, rows, **more):
        report = run(write_pairs(tmp_path / "data", rows, name=name), name, pure, miner, **more)
        return {row["query"]: {*negatives_of(row)} for row in read_output(tmp_path / name, name)}, report

    rows, report = negatives("once", pairs)
    # Neither those of the positive nor those of the query; of other rows' passages, one spelling stands for all.
    found = {query: len(texts & {*spellings}) for query, texts in rows.items()}
    assert [found[f"query{number}"] for number in range(5)] == [0] * 5 and found["CURAÇAO"] == 0
    assert max(found.values()) == 1 and report["refused"]["repeated"] > 0
    # Nor the positive of the query in another spelling.
    rows, _ = negatives("twice", [*pairs, ("Query5 ", "island8")])
    assert not rows["query5"] & {"island0", "island8"} and "island1" in rows["query5"]
    # A translation is one in every spelling, directly or by a chain of pairs.
    query = next(query for query, count in found.items() if count == 1)
    chain = [[(query, "Korsou")], [("Korsou", "CURAÇAO!")]]
    bitext = [write_pairs(tmp_path / "bitext", each, name=each[0][0]) for each in chain]
    for known, expected in ((bitext[:1], 1), (bitext, 0)):
        rows, report = negatives(f"guarded{expected}", pairs, bitext=known)
        assert len(rows[query] & {*spellings}) == expected
    assert report["refused"]["translation"] > 0


def test_shards_search_and_tasks_change_nothing(source, run, tmp_path, small_units):
    pytest.importorskip("faiss")
    bitext = [write_pairs(tmp_path / "b", list(zip(PASSAGES[:60:2], PASSAGES[1:60:2], strict=True)), name="b")]
    every = {
        "whole": Resources(search="torch"),
        "three": Resources(search="torch", max_corpus_in_memory=40),
        "faiss": Resources(search="faiss", max_corpus_in_memory=50),
        "many": Resources(search="torch", max_corpus_in_memory=11),
        "again": Resources(search="torch", cache=tmp_path / "whole" / "embeddings"),
    }
    for name, resources in every.items():
        run(source, name, bitext=bitext, resources=resources)
        assert contents(tmp_path / name) == contents(tmp_path / "whole"), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "ray"])
def test_processes_change_nothing(tmp_path, run, name):
    if name == "ray":
        pytest.importorskip("ray")
    # More than one chunk of texts and one block of queries.
    pairs = [(f"q{number}", f"p{number % 9000}") for number in range(20_000)]
    source = write_pairs(tmp_path / "source", pairs)
    vectors = random_vectors([*dict.fromkeys(word for pair in pairs for word in pair)])
    for query, passage in pairs:
        vectors[query] = vectors[query] + 3 * vectors[passage]
    miner = find_miner(str(save_vectors(tmp_path / "model", vectors)))
    options = replace(OPTIONS, max_score=1.01)
    run(source, "one", options, miner)
    report = run(source, "two", options, miner, resources=Resources(executor=Executor(name, workers=2)))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert report["texts"] == {"embedded": 29_000, "cached": 0}


def test_second_run_encodes_only_what_is_new(source, run, tmp_path, small_units):
    outputs = iter(range(10))

    def encoded(source, changes=None, **more):
        """The texts that a run into another folder with the same cache encodes, and its counts of texts."""
        options, cache = replace(OPTIONS, **(changes or {})), Resources(cache=tmp_path / "cache")
        with encode_calls() as calls:
            report = run(source, str(next(outputs)), options, resources=cache, **more)
        return texts_of(calls), report["texts"]

    used = set(pq.read_table(source.files[0])["query"].to_pylist())
    texts, counts = encoded(source)
    assert sorted(texts) == sorted([*used, *PASSAGES]) and counts == {"embedded": len(texts), "cached": 0}
    assert encoded(source, {"negatives": 5}) == ([], {"embedded": 0, "cached": len(used) + 120})
    more = pa.table({"query": ["new"], "passage": ["p3"], "lang": ["x"]})
    pq.write_table(pa.concat_tables([pq.read_table(source.files[0]), more]), source.files[0])
    assert encoded(source)[0] == ["new"]
    assert {*encoded(replace(source, instruction="Find another."))[0]} == {*used, "new"}
    # A model is known by its files.
    for seed, every in ((1, [*used, "new", *PASSAGES]), (1, []), (2, [*used, "new", *PASSAGES])):
        vectors = random_vectors([*QUERIES, *PASSAGES], seed=seed)
        other = find_miner(str(save_vectors(tmp_path / str(next(outputs)), vectors)))
        assert {*encoded(source, miner=other)[0]} == {*every}


def test_sources_of_several_runs_share_a_folder(source, run, tmp_path):
    first = run(source)
    before = (tmp_path / "out" / "pairs.parquet").stat().st_mtime_ns
    other = run(replace(source, name="other"), options=replace(OPTIONS, negatives=4))
    assert [entry.name for entry in load_manifest(tmp_path / "out" / "manifest.yaml")] == ["pairs", "other"]
    assert other["options"]["negatives"] == 4 and other["texts"] == {"embedded": 0, "cached": 270}
    # A finished source is left alone, unless its options changed.
    assert run(source) == first and first["options"]["negatives"] == 6
    assert (tmp_path / "out" / "pairs.parquet").stat().st_mtime_ns == before
    assert run(source, options=replace(OPTIONS, negatives=5)) != first
    assert not (tmp_path / "out" / ".work").exists()


@pytest.mark.parametrize("emptied", [False, True])
def test_killed_run_goes_on(source, run, tmp_path, small_units, monkeypatch, emptied):
    run(source, "whole")
    calls = []

    def stop_at(call, function):
        def counting(*args, **kwargs):
            calls.append(function)
            if len(calls) == call:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return counting

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SentenceTransformer, "encode", stop_at(4, SentenceTransformer.encode))
        run(source)
    # Within the search, when one of three blocks is done.
    calls.clear()
    choose = mining.choose_negatives
    monkeypatch.setattr(mining, "choose_negatives", stop_at(2, choose))
    with pytest.raises(KeyboardInterrupt), encode_calls() as encoded:
        run(source)
    texts = texts_of(encoded)
    assert len(texts) == len(set(texts)) == 270 - 3 * 32
    calls.clear()
    if emptied:
        for path in (tmp_path / "out" / "embeddings").glob("*/*.npz"):
            path.unlink()
    monkeypatch.setattr(mining, "choose_negatives", stop_at(-1, choose))
    with encode_calls() as encoded:
        run(source)
    assert len(calls) == 2 and len(texts_of(encoded)) == (270 if emptied else 0)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_queries_that_carry_an_instruction_get_no_other(run, miner, folder, tmp_path):
    pairs = [(instruct("Its own.", query), passage) for query, passage in zip(QUERIES[:60], PASSAGES[:60], strict=True)]
    pairs[::2] = zip(QUERIES[:60:2], PASSAGES[:60:2], strict=True)
    # In the template of Qwen3-Embedding.
    pairs[1::4] = [(query.replace("Query: ", "Query:"), passage) for query, passage in pairs[1::4]]
    with encode_calls() as calls:
        run(write_pairs(tmp_path / "source", pairs))
    prompts = [(len(texts), prompt) for texts, prompt in calls]
    assert prompts == [(30, instruct("Find it.")), (30, ""), (60, None)]
    assert find_miner(str(folder), truncate_dim=3).embed_passages(PASSAGES[:2]).shape == (2, 3)
    # The model's own prompt replaces an instruction in the text.
    bare = miner.embed_queries(QUERIES[:3], None)
    for carried in ("Instruct: q9\nQuery:{}".format, partial(instruct, "q9")):
        np.testing.assert_array_equal(miner.embed_queries([carried(query) for query in QUERIES[:3]], None), bare)
