"""Sources that can teach nothing are refused, or said: a loss of 0 never passes without a word."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.training.recipes import only_stage, recipe_writer, write_single_stage
from training.config.arguments import StageArguments
from training.config.recipe import load_recipe
from training.data.manifest import Source
from training.data.options import PreparationOptions
from training.data.preparation.pipeline import prepare
from training.data.prepared import PreparedSource
from training.run_stage import main
from training.trainer.contrasts import check_contrasts, warn_of_single_rows


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., StageArguments]:
    return lambda **keys: only_stage(load_recipe(recipe_writer(tmp_path)(keys)))


@pytest.fixture
def prepared(tmp_path: Path, write_source: Callable[..., Source], small_tokenizer) -> Callable[..., PreparedSource]:
    def build(rows: int, negatives: int, task_type: str = "retrieval") -> PreparedSource:
        source = write_source(f"{task_type}{rows}", rows=rows, negatives=negatives, task_type=task_type)
        options = PreparationOptions(validation_share=0, num_hard_negatives=((task_type, 0),))
        return prepare([source], small_tokenizer, tmp_path / "prepared", options)[0]

    return build


@pytest.mark.parametrize(("task_type", "default"), [("clustering", 9), ("classification", 1)])
def test_without_hard_negatives_only_retrieval_learns(
    arguments, prepared, write_source, refuses, task_type: str, default: int
) -> None:
    source = write_source(task_type=task_type)
    key = f"num_hard_negatives_{task_type}"
    for each in (source, prepared(20, 2, task_type)):
        with refuses(
            source.name[:5] if each is source else each.name, f"'{key}: {default}'", "task_types: [retrieval]"
        ):
            check_contrasts(arguments(**{key: 0}), [each])
    with refuses("no column 'negative_1'"):
        check_contrasts(arguments(), [prepared(21, 0, task_type)])
    check_contrasts(arguments(), [source, prepared(20, 2, task_type)])
    check_contrasts(arguments(num_hard_negatives_retrieval=0), [write_source("pairs")])
    # There is something to learn from a teacher.
    check_contrasts(arguments(**{key: 0, "teacher": "some/teacher"}), [source])


@pytest.mark.parametrize(
    ("rows", "batch", "told"),
    [
        (20, 1, "20 of its 20 batches"),
        (1, 512, "1 of its 1 batches"),
        (3, 2, "1 of its 2 batches"),
        (3, 3, None),
        (20, 2, None),
    ],
)
def test_one_row_a_batch_without_negatives_is_said(
    arguments, prepared, caplog: pytest.LogCaptureFixture, rows: int, batch: int, told: str | None
) -> None:
    source = prepared(rows, 2)
    warn_of_single_rows(arguments(global_batch_size=batch), [source])
    assert not caplog.messages
    warn_of_single_rows(arguments(global_batch_size=batch, num_hard_negatives_retrieval=0), [source])
    assert len(caplog.messages) == (told is not None)
    assert told is None or told in caplog.text
    assert told is None or rows == 1 or "'global_batch_size: 3'" in caplog.text


def _run(folder: Path, **keys: object) -> list[str]:
    short = {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no"}
    return [str(write_single_stage(folder, **{**short, **keys}))]


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_stage_that_could_teach_nothing_does_not_start(tmp_path: Path, capsys, more: list[str]) -> None:
    words = _run(tmp_path, task_types=["clustering"], num_hard_negatives_clustering=0)
    assert main([*words, *more]) == 2
    assert "'num_hard_negatives_clustering: 9'" in capsys.readouterr().err
    assert not (tmp_path / "run/model").exists()


def test_steps_of_loss_0_are_told_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert main(_run(tmp_path, global_batch_size=1, num_hard_negatives_retrieval=0)) == 0
    assert "batches have one row and no hard negative" in caplog.text
    assert "source 'tiny_retrieval': 2 of 2 steps had a loss of 0" in caplog.text


def test_rows_that_all_share_their_passage_teach_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = _run(tmp_path, num_hard_negatives_retrieval=0, mask_duplicates=True)
    path = tmp_path / "data/retrieval.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "passage", [["the same"] * len(table)]).select(["query", "passage"]), path)
    assert main(words) == 0
    assert "source 'tiny_retrieval': 2 of 2 steps had a loss of 0" in caplog.text
