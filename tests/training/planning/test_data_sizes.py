"""Rows of a stage whose data cannot be read: published ones, counted ones, caps and selections."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from training.config.arguments import StageArguments
from training.config.recipe import load_recipe
from training.planning.data_sizes import estimated_sizes, why_not_at_hand

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
    assert why_not_at_hand(args) == "hf://datasets/no/where is remote"
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
    assert why_not_at_hand(args) == f"{tmp_path} lacks files of 1 of 3 entries"
    assert _rows(args) == {"single": [10], "web": [10, 7, 3], "labels": [10]}
    assert [each.published for each in estimated_sizes(args)] == [False, False, True]
    pq.write_table(pa.table({"query": ["q"], "passage": ["p"]}), tmp_path / "labels.parquet")
    assert why_not_at_hand(args) is None


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
