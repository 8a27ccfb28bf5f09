"""What is checked before a stage trains: sources that can teach nothing, and texts longer than the model reads."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest

from modeling_f2llm import build_sentence_transformer
from tests.training.foreign_teacher import save_foreign_teacher
from tests.training.recipes import NO_NEW_MODEL, error_of, only_stage, recipe_writer, write_recipe, write_single_stage
from training.config.recipe import load_recipe
from training.distillation.distillation import inspect_teacher
from training.models.encoders import find_miner
from training.prepare import main as prepare_command
from training.stages.setup import check_contrasts, warn_of_single_rows


@pytest.fixture
def arguments(tmp_path):
    return lambda **keys: only_stage(load_recipe(recipe_writer(tmp_path)(keys)))


@pytest.mark.parametrize(("task_type", "default"), [("clustering", 9), ("classification", 1)])
def test_without_hard_negatives_only_retrieval_learns(arguments, write_source, refuses, task_type, default):
    source = write_source(task_type=task_type)
    key = f"num_hard_negatives_{task_type}"
    with refuses(f"source {source.name!r}", f"'{key}: {default}'", "task_types: [retrieval]"):
        check_contrasts(arguments(**{key: 0}), [source])
    check_contrasts(arguments(), [source])
    check_contrasts(arguments(num_hard_negatives_retrieval=0), [write_source("pairs")])
    # There is something to learn from a teacher.
    check_contrasts(arguments(**{key: 0, "teacher": "some/teacher"}), [source])
    with refuses(key):
        check_contrasts(arguments(**{key: 0, "teacher": "some/teacher", "distillation_weight": 0}), [source])


@pytest.mark.parametrize(
    ("rows", "batch", "single"),
    [(20, 1, "20 of its 20"), (1, 512, "1 of its 1"), (3, 2, "1 of its 2"), (3, 3, None), (20, 2, None)],
)
def test_one_row_a_batch_without_negatives_is_said(arguments, caplog, rows, batch, single):
    source = SimpleNamespace(name="qa", task_type="retrieval", num_negatives=2, rows={"train": range(rows)})
    warn_of_single_rows(arguments(global_batch_size=batch), [source])
    assert not caplog.messages
    warn_of_single_rows(arguments(global_batch_size=batch, num_hard_negatives_retrieval=0), [source])
    assert len(caplog.messages) == (single is not None)
    assert single is None or (f"{single} batches" in caplog.text and "'global_batch_size: 3'" in caplog.text)


@pytest.fixture
def start(tmp_path, tiny_model, tiny_tokenizer):
    """A model of 512 positions."""
    build_sentence_transformer(tiny_model, deepcopy(tiny_tokenizer)).save_pretrained(str(tmp_path / "start"))
    return tmp_path / "start"


def test_more_than_the_start_or_its_tokenizer_reads_is_refused(start, tiny_tokenizer, tmp_path, capsys):
    recipe = write_single_stage(tmp_path, model=str(start), **NO_NEW_MODEL, max_length=4096)
    for dry_run in (["--dry-run"], []):
        assert "key 'max_length': 4096 is more than the 512 positions" in error_of([recipe, *dry_run], capsys)
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.model_max_length = 100
    tokenizer.save_pretrained(start)
    error = error_of([recipe, "--max_length", "101"], capsys)
    assert "101 is more than the 100 tokens of a text that the tokenizer reads" in error
    # Before anything is prepared.
    assert not (tmp_path / "run/prepared").exists()


def test_a_new_model_and_one_that_a_stage_will_make_are_checked(tmp_path, capsys):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"intermediate_size": 48, "head_dim": 8, "max_position_embeddings": 64}
    recipe = write_single_stage(tmp_path, model_config=small, max_length=65)
    assert "more than the 64 positions" in error_of([recipe], capsys)
    recipe = write_recipe(tmp_path, {"stage1": {"model_config": small}, "stage2": {"max_length": 65}})
    assert "more than the 64 positions" in error_of([recipe, "--dry-run"], capsys)


def test_a_teacher_that_reads_less_is_refused_or_said(start, tiny_tokenizer, tmp_path, refuses, caplog):
    def inspect(teacher, max_length):
        recipe = write_single_stage(tmp_path, teacher=str(teacher), max_length=max_length)
        inspect_teacher(only_stage(load_recipe(recipe)), tiny_tokenizer, 32)

    with refuses("key 'max_length': 600", "512 positions of the teacher", "write 'max_length: 512'"):
        inspect(start, 600)
    foreign = save_foreign_teacher(tmp_path / "teacher", width=40)
    for length, warns in ((128, False), (129, True)):
        inspect(foreign, length)
        assert ("reads 128 tokens of a text at most, the student 129" in caplog.text) == warns


def test_preparing_and_mining_refuse_more_than_the_model_reads(start, tmp_path, capsys, refuses):
    manifest = Path(write_recipe(tmp_path)).parent / "data/manifest.yaml"
    words = ["--manifest", str(manifest), "--tokenizer", str(start), "--output", str(tmp_path / "out")]
    assert prepare_command([*words, "--max-length", "513"]) == 2
    error = capsys.readouterr().err
    assert "--max-length 513 is more than the 512 tokens" in error and "give --max-length 512" in error
    with refuses("--max-length 513", "512 tokens"):
        find_miner(str(start), max_length=513).embed_passages(["a"])
    assert find_miner(str(start), max_length=512).embed_passages(["a"]).shape == (1, 32)
