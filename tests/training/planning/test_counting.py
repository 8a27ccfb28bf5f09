"""Estimated batches against counted ones, where the assumptions of the estimate hold."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.training.recipes import write_single_stage
from training.config.recipe import load_recipe
from training.planning.counting import Batches, estimate_batches
from training.planning.data_sizes import SourceSizes
from training.planning.plan import make_plan
from training.run_stage import main


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
    counted = make_plan(stage, {}).training
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
    assert "the tokenizer of Qwen/Qwen3-none is not at hand: estimated from 80 counted rows" in text
    assert "80,084,288 parameters" in text and "(5 an epoch)" in text
    assert not (tmp_path / "run").exists()


def test_a_stage_that_prunes_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from tests.training.stages.test_prune_stage import write_pruning

    assert main([str(write_pruning(tmp_path)), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (cut,) = (line for line in lines if line.startswith("stage pruned: cuts "))
    (before,) = (line for line in lines if line.startswith("stage stage1: "))
    (student,) = (line for line in lines if line.startswith("stage student: "))
    parameters = [line.split()[-2] for line in (before, cut, student)]
    assert cut.split()[3] == parameters[0] != parameters[1] == parameters[2]
    assert any(line.startswith("all stages: about ") for line in lines)
