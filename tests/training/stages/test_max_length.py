"""No text is longer than what the finished model reads: ``max_length`` is checked wherever it is given."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from modeling_f2llm import F2LLMModel, build_sentence_transformer
from tests.training.foreign_teacher import save_foreign_teacher
from tests.training.recipes import only_stage, write_recipe, write_single_stage
from training import run_stage
from training.config.recipe import load_recipe
from training.distillation.distillation import choose_teacher
from training.models.miner import find_miner
from training.prepare import main as prepare


@pytest.fixture
def start(tmp_path: Path, tiny_model: F2LLMModel, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A model of 512 positions."""
    build_sentence_transformer(tiny_model, deepcopy(tiny_tokenizer)).save_pretrained(str(tmp_path / "start"))
    return tmp_path / "start"


def refused(capsys: pytest.CaptureFixture, status: int) -> str:
    error = capsys.readouterr().err
    assert status == 2 and len(error.splitlines()) == 1
    return error


def test_more_than_the_start_reads_is_refused_before_anything_is_prepared(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    keys = {"model": str(start), "tokenizer": None, "model_config": None, "tokenizer_vocab_size": None}
    recipe = write_single_stage(tmp_path, **keys, max_length=4096)
    for dry_run in (["--dry-run"], []):
        error = refused(capsys, run_stage.main([str(recipe), *dry_run]))
        assert "key 'max_length': 4096 is more than the 512 positions" in error and "write 'max_length: 512'" in error
    assert not (tmp_path / "run/prepared").exists()


def test_more_than_the_tokenizer_reads_is_refused(
    start: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture
):
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.model_max_length = 100
    tokenizer.save_pretrained(start)
    keys = {"model": str(start), "tokenizer": None, "model_config": None, "tokenizer_vocab_size": None}
    error = refused(capsys, run_stage.main([str(write_single_stage(tmp_path, **keys, max_length=101))]))
    assert "101 is more than the 100 tokens of a text that the tokenizer reads" in error
    assert "write 'max_length: 100'" in error


def test_a_new_model_and_one_that_a_stage_will_make_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"intermediate_size": 48, "head_dim": 8, "max_position_embeddings": 64}
    recipe = write_single_stage(tmp_path, model_config=small, max_length=65)
    assert "write 'max_length: 64'" in refused(capsys, run_stage.main([str(recipe)]))
    recipe = write_recipe(tmp_path)
    text = recipe.read_text().replace("head_dim: 8", "head_dim: 8\n      max_position_embeddings: 64")
    recipe.write_text(text.replace("    model: stage1", "    model: stage1\n    max_length: 65"))
    assert "write 'max_length: 64'" in refused(capsys, run_stage.main([str(recipe), "--dry-run"]))


def test_more_than_a_teacher_of_tokens_reads_is_refused(
    start: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, refuses
):
    arguments = only_stage(load_recipe(write_single_stage(tmp_path, teacher=str(start), max_length=600)))
    with refuses("key 'max_length': 600", "512 positions of the teacher", "write 'max_length: 512'"):
        choose_teacher(arguments, tiny_tokenizer, 32)


def test_a_teacher_of_texts_that_cuts_them_says_so(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    save_foreign_teacher(tmp_path / "teacher", width=40)
    for length, warns in ((128, False), (129, True)):
        recipe = write_single_stage(tmp_path, teacher=str(tmp_path / "teacher"), max_length=length)
        choose_teacher(only_stage(load_recipe(recipe)), tiny_tokenizer, 32)
        assert ("reads 128 tokens of a text at most, the student 129" in caplog.text) == warns


def test_preparing_and_mining_refuse_more_than_the_model_reads(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture, refuses
):
    manifest = Path(write_recipe(tmp_path)).parent / "data/manifest.yaml"
    words = ["--manifest", str(manifest), "--tokenizer", str(start), "--output", str(tmp_path / "out")]
    error = refused(capsys, prepare([*words, "--max-length", "513"]))
    assert "--max-length 513 is more than the 512 tokens" in error and "give --max-length 512" in error
    with refuses("--max-length 513", "512 tokens", "leave it out"):
        find_miner(str(start), max_length=513).embed_passages(["a"])
    assert find_miner(str(start), max_length=512).embed_passages(["a"]).shape == (1, 32)
