"""Rows and batches of a stage whose data is not all there: published, counted, capped and selected."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.training.recipes import write_single_stage
from training.config.arguments import StageArguments
from training.config.recipe import load_recipe
from training.planning.batches import Batches, SourceSizes, estimate_batches, estimated_sizes, why_not_local
from training.planning.plan import make_plan
from training.run_stage import main

Refuses = Callable[..., AbstractContextManager[None]]


def _entry(name: str, **keys: Any) -> dict[str, Any]:
    return {"name": name, "files": f"{name}.parquet", "task_type": "retrieval", "instruction": "Find it.", **keys}


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., StageArguments]:
    """A stage over a manifest of three entries: one single file and two collections, one of them of clustering."""

    def make(root: str | None = "hf://datasets/no/where", rows: int | None = None, **keys: Any) -> StageArguments:
        entries = [
            _entry("single", published_rows=1000, stages=["first"]),
            _entry("web", files=["web_*.parquet"], each_file=True, published_rows=3000, published_files=3),
            _entry("labels", task_type="clustering", published_rows=200),
        ]
        content: dict[str, Any] = {"sources": entries, "stage_caps": {"first": 500}}
        content |= {"root": root} if root else {}
        content |= {"stage_rows": {"first": rows}} if rows else {}
        manifest = tmp_path / "manifest.yaml"
        manifest.write_text(yaml.safe_dump(content))
        recipe = tmp_path / "recipe.yaml"
        told = {"output_dir": "run", "model": "some/model", "manifest": str(manifest), "use_cpu": True}
        recipe.write_text(yaml.safe_dump({**told, **keys}))
        return load_recipe(recipe).stages[0].arguments

    return make


def _rows(args: StageArguments) -> dict[str, list[float]]:
    return {each.name: each.rows for each in estimated_sizes(args)}


def test_rows_are_the_published_ones(stage: Callable[..., StageArguments]) -> None:
    args = stage()
    assert why_not_local(args) == "hf://datasets/no/where is remote"
    assert _rows(args) == {"single": [1000], "web": [1000, 1000, 1000], "labels": [200]}
    assert all(each.published for each in estimated_sizes(args))


def test_caps_take_away(stage: Callable[..., StageArguments]) -> None:
    assert _rows(stage(manifest_stage="first")) == {"single": [500], "web": [500, 500, 500], "labels": [200]}
    assert _rows(stage(cap=300)) == {"single": [300], "web": [300, 300, 300], "labels": [200]}
    assert _rows(stage(source_caps={"web": 10})) == {"single": [1000], "web": [10, 10, 10], "labels": [200]}


def test_collections_make_up_the_rows_that_were_published_of_a_stage(stage: Callable[..., StageArguments]) -> None:
    # 500 and 200 are certain; files of different sizes lose more to the cap than even ones would.
    args = stage(rows=1300, manifest_stage="first")
    assert _rows(args) == {"single": [500], "web": [200, 200, 200], "labels": [200]}
    assert _rows(stage(rows=9999, manifest_stage="first"))["web"] == [500, 500, 500]
    assert _rows(stage(rows=1300, manifest_stage="first", cap=100))["web"] == [100, 100, 100]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"task_types": ["clustering"]}, {"labels": [200]}),
        ({"sources": ["web*"]}, {"web": [1000, 1000, 1000]}),
        ({"sources": ["web_kor", "web_fra", "labels"]}, {"web": [1000, 1000], "labels": [200]}),
    ],
)
def test_selections(stage: Callable[..., StageArguments], keys: dict[str, Any], expected: dict[str, Any]) -> None:
    assert _rows(stage(**keys)) == expected


def test_files_that_are_there_count(stage: Callable[..., StageArguments], tmp_path: Path) -> None:
    for name, rows in (("single", 40), ("web_a", 20), ("web_b", 7), ("web_c", 3)):
        pq.write_table(pa.table({"query": ["q"] * rows, "passage": ["p"] * rows}), tmp_path / f"{name}.parquet")
    args = stage(root=None, cap=10)
    assert why_not_local(args) == f"{tmp_path} lacks files of 1 of 3 entries"
    assert _rows(args) == {"single": [10], "web": [10, 7, 3], "labels": [10]}
    assert [each.published for each in estimated_sizes(args)] == [False, False, True]
    pq.write_table(pa.table({"query": ["q"], "passage": ["p"]}), tmp_path / "labels.parquet")
    assert why_not_local(args) is None


def test_what_cannot_be_estimated_is_refused(
    stage: Callable[..., StageArguments], refuses: Refuses, tmp_path: Path
) -> None:
    with refuses("no source fits ['none']"):
        estimated_sizes(stage(sources=["none"]))
    with refuses("unknown task type 'ranking'"):
        estimated_sizes(stage(task_types=["ranking"]))
    args = stage()
    text = (tmp_path / "manifest.yaml").read_text()
    (tmp_path / "manifest.yaml").write_text(text.replace("published_rows: 200", "languages: [eng]"))
    with refuses("source 'labels'", "published_rows", "download or build"):
        estimated_sizes(args)
    (tmp_path / "manifest.yaml").write_text(text + "stage_rows: {fist: 3}\n")
    with refuses("'stage_rows'", "'fist'", "'first'"):
        estimated_sizes(args)


# Batches


def _distinct_rows(folder: Path, rows: int) -> None:
    """Every text another one, and all of one length: letters are tokens of their own to a tokenizer of bytes."""
    numbers = iter(range(10**6))

    def text() -> str:
        return "".join(chr(97 + int(digit)) for digit in f"{next(numbers):06d}")

    columns = {name: [text() for _ in range(rows)] for name in ("query", "passage", "negative_1", "negative_2")}
    pq.write_table(pa.table(columns), folder / "data/retrieval.parquet")


@pytest.mark.parametrize("budget", [None, 150])
def test_distinct_texts_of_one_length_are_estimated_exactly(tmp_path: Path, budget: int | None) -> None:
    keys = {"num_hard_negatives_retrieval": 2, "tokenizer_vocab_size": 259, "max_tokens_per_forward": budget}
    recipe = write_single_stage(tmp_path, planned_text_tokens=7, validation_share=0.0, **keys)
    _distinct_rows(tmp_path, 80)
    stage = load_recipe(recipe).stages[0]
    counted = make_plan(stage, {}).data.training
    estimate = estimate_batches(stage.arguments, [SourceSizes("tiny", "retrieval", [80.0], True)], 1.0)
    assert counted.tokens == 16 * 4 * 7
    names = ["count", "tokens", "texts", "most_texts", "squared_tokens"]
    assert [getattr(estimate, name) for name in names] == [getattr(counted, name) for name in names]
    assert estimate.chunks == counted.chunks
    assert estimate.most_chunk_tokens == pytest.approx(counted.most_chunk_tokens, rel=0.1)
    assert estimate.repeated_tokens == pytest.approx(counted.repeated_tokens, rel=0.1)


def test_batches_are_those_of_each_source_by_its_task(tmp_path: Path) -> None:
    args = load_recipe(write_single_stage(tmp_path, planned_text_tokens=100)).stages[0].arguments
    sizes = [SourceSizes("a", "retrieval", [32.0, 8.0], True), SourceSizes("b", "classification", [16.0], True)]
    # Batches of 16, 16 and 8 rows of 5 texts, and of 16 rows of 3; no text is longer than max_length.
    estimate = estimate_batches(args, sizes, 1.0)
    assert (estimate.count, estimate.texts, estimate.most_texts) == (4, (80 + 80 + 40 + 48) / 4, 80)
    assert estimate.tokens == estimate.texts * args.max_length
    assert estimate_batches(args, sizes, 0.0) == Batches()


def test_files_that_are_missing_are_estimated(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = write_single_stage(tmp_path, num_train_epochs=3)
    manifest = tmp_path / "data/manifest.yaml"
    content = yaml.safe_load(manifest.read_text())
    for entry in content["sources"]:
        entry["published_rows"] = 1000
    manifest.write_text(yaml.safe_dump(content))
    (tmp_path / "data/retrieval.parquet").unlink()
    assert main([str(recipe), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"{tmp_path}/data lacks files of 1 of 3 entries: estimated from 1,000 published rows" in text
    # 900 rows of training in batches of 16.
    assert "steps        about 171 (57 an epoch)" in text
    assert main([str(recipe), "--dry-run", "--measure"]) == 2
    assert "cannot be measured" in capsys.readouterr().err


def test_files_without_the_tokenizer_are_counted_by_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    keys = {"model": "Qwen/Qwen3-none", "model_family": "f2llm-v2-80m", "model_config": None, "tokenizer": None}
    assert main([str(write_single_stage(tmp_path, **keys)), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "the tokenizer of Qwen/Qwen3-none is not on this machine: estimated from 80 counted rows" in text
    assert "80,084,288 parameters" in text and "(5 an epoch)" in text
    assert not (tmp_path / "run").exists()
