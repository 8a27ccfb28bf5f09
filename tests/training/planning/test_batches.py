"""Rows and batches of a stage whose data is not all there: published, counted, capped and selected."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.training.recipes import error_of, only_stage, recipe_writer, write_single_stage
from training.config.recipe import load_recipe
from training.planning.batches import Batches, SourceSizes, estimate_batches, estimated_sizes, why_not_local
from training.planning.plan import make_plan
from training.run_stage import main


def _entry(name, **keys):
    return {"name": name, "files": f"{name}.parquet", "task_type": "retrieval", "instruction": "Find it.", **keys}


@pytest.fixture
def stage(tmp_path):
    """Makes a stage over three entries of a manifest: a single file, a collection, and one of clustering."""

    def make(root="hf://datasets/no/where", rows=None, **keys):
        entries = [
            _entry("single", published_rows=1000, stages=["first"]),
            _entry("web", files=["web_*.parquet"], each_file=True, published_rows=3000, published_files=3),
            _entry("labels", task_type="clustering", published_rows=200),
        ]
        content = {"sources": entries, "stage_caps": {"first": 500}}
        content |= {"root": root} if root else {}
        content |= {"stage_rows": {"first": rows}} if rows else {}
        (tmp_path / "manifest.yaml").write_text(yaml.safe_dump(content))
        return only_stage(load_recipe(recipe_writer(tmp_path)({"manifest": str(tmp_path / "manifest.yaml"), **keys})))

    return make


def _rows(args):
    return {each.name: each.rows for each in estimated_sizes(args)}


@pytest.mark.parametrize(
    ("keys", "single", "web", "labels"),
    [
        ({}, [1000], [1000] * 3, [200]),
        ({"manifest_stage": "first"}, [500], [500] * 3, [200]),
        ({"cap": 300}, [300], [300] * 3, [200]),
        ({"source_caps": {"web": 10}}, [1000], [10] * 3, [200]),
        # 500 and 200 are certain; files of different sizes lose more to the cap than even ones would.
        ({"rows": 1300, "manifest_stage": "first"}, [500], [200] * 3, [200]),
        ({"rows": 9999, "manifest_stage": "first"}, [500], [500] * 3, [200]),
        ({"rows": 1300, "manifest_stage": "first", "cap": 100}, [100], [100] * 3, [100]),
        ({"task_types": ["clustering"]}, None, None, [200]),
        ({"sources": ["web*"]}, None, [1000] * 3, None),
        ({"sources": ["web_kor", "web_fra", "labels"]}, None, [1000] * 2, [200]),
    ],
)
def test_rows_are_capped_and_selected(stage, keys, single, web, labels):
    expected, args = {"single": single, "web": web, "labels": labels}, stage(**keys)
    assert why_not_local(args) == "hf://datasets/no/where is remote"
    assert _rows(args) == {name: rows for name, rows in expected.items() if rows}


def test_files_that_are_there_count(stage, tmp_path):
    for name, rows in (("single", 40), ("web_a", 20), ("web_b", 7), ("web_c", 3)):
        pq.write_table(pa.table({"query": ["q"] * rows, "passage": ["p"] * rows}), tmp_path / f"{name}.parquet")
    args = stage(root=None, cap=10)
    assert why_not_local(args) == f"{tmp_path} lacks files of 1 of 3 entries"
    assert _rows(args) == {"single": [10], "web": [10, 7, 3], "labels": [10]}
    pq.write_table(pa.table({"query": ["q"], "passage": ["p"]}), tmp_path / "labels.parquet")
    assert why_not_local(args) is None


def test_what_cannot_be_estimated_is_refused(stage, refuses, tmp_path):
    with refuses("no source fits ['none']"):
        estimated_sizes(stage(sources=["none"]))
    args = stage()
    text = (tmp_path / "manifest.yaml").read_text()
    (tmp_path / "manifest.yaml").write_text(text.replace("published_rows: 200", "languages: [eng]"))
    with refuses("source 'labels'", "published_rows", "download or build"):
        estimated_sizes(args)


@pytest.mark.parametrize("budget", [None, 150])
def test_distinct_texts_of_one_length_are_estimated_exactly(tmp_path, budget):
    keys = {"num_hard_negatives_retrieval": 2, "tokenizer_vocab_size": 259, "max_tokens_per_forward": budget}
    recipe = write_single_stage(tmp_path, planned_text_tokens=7, validation_share=0.0, **keys)
    # Every text another one, and all of one length: letters are tokens of their own to a tokenizer of bytes.
    letters = str.maketrans("0123456789", "abcdefghij")
    names = ("query", "passage", "negative_1", "negative_2")
    columns = {name: [f"{4 * row + i:06d}".translate(letters) for row in range(80)] for i, name in enumerate(names)}
    pq.write_table(pa.table(columns), tmp_path / "data/retrieval.parquet")
    stage = load_recipe(recipe).stages[0]
    counted = make_plan(stage, {}).training
    estimate = estimate_batches(stage.arguments, [SourceSizes("tiny", "retrieval", [80.0])], "train")
    assert counted.tokens == 16 * 4 * 7
    estimate, counted = vars(estimate), vars(counted)
    about = ("most_chunk_tokens", "repeated_tokens")
    assert estimate == {**counted, **{name: pytest.approx(counted[name], rel=0.1) for name in about}}


def test_batches_are_those_of_each_source_by_its_task(tmp_path):
    args = load_recipe(write_single_stage(tmp_path, planned_text_tokens=100, validation_share=0.0)).stages[0].arguments
    sizes = [SourceSizes("a", "retrieval", [32.0, 8.0]), SourceSizes("b", "classification", [16.0])]
    # Batches of 16, 16 and 8 rows of 5 texts, and of 16 rows of 3; no text is longer than max_length.
    estimate = estimate_batches(args, sizes, "train")
    assert (estimate.count, estimate.texts, estimate.most_texts) == (4, (80 + 80 + 40 + 48) / 4, 80)
    assert estimate.tokens == estimate.texts * args.max_length
    assert estimate_batches(args, sizes, "validation") == Batches()


def test_files_that_are_missing_are_estimated(tmp_path, capsys):
    recipe = write_single_stage(tmp_path, num_train_epochs=3)
    manifest = tmp_path / "data/manifest.yaml"
    manifest.write_text(manifest.read_text().replace("licence:", "published_rows: 1000\n  licence:"))
    (tmp_path / "data/retrieval.parquet").unlink()
    assert main([str(recipe), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"{tmp_path}/data lacks files of 1 of 3 entries: estimated from 1,000 rows" in text
    # 900 rows of training in batches of 16.
    assert "steps        about 171 (57 an epoch)" in text
    assert "cannot be measured" in error_of([recipe, "--dry-run", "--measure"], capsys)


def test_files_without_the_tokenizer_are_counted_by_rows(tmp_path, capsys):
    keys = {"model": "Qwen/Qwen3-none", "model_family": "f2llm-v2-80m", "model_config": None, "tokenizer": None}
    assert main([str(write_single_stage(tmp_path, **keys)), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "the tokenizer of Qwen/Qwen3-none is not on this machine: estimated from 80 rows" in text
    assert "80,084,288 parameters" in text and "(5 an epoch)" in text
    assert not (tmp_path / "run").exists()
