"""What a stage starts from stays what it is: the token that ends texts, its pooling; or it is refused."""

from __future__ import annotations

import pytest
from sentence_transformers import SentenceTransformer

from tests.training.models.starts import edit_json, save_like_qwen3_embedding
from tests.training.recipes import only_stage, write_single_stage
from training.config.recipe import load_recipe
from training.data.prepared import PreparedSource
from training.models.merging import merge_adapter
from training.models.model_ref import find_adapter
from training.run_stage import main
from training.stages.setup import make_model

TEXTS = ["Where do giant pandas live?", "大熊猫生活在四川的山林里。", "a", "", "the red river\n\n"]
# Nearly nothing is learnt.
ONE_STEP = {"max_steps": 1, "learning_rate": 1e-9, "warmup_steps": 0, "save_strategy": "no", "eval_strategy": "no"}
NO_NEW_MODEL = {"model_config": None, "tokenizer": None, "tokenizer_vocab_size": None}


@pytest.fixture
def start(tmp_path, tiny_config, tiny_tokenizer):
    return save_like_qwen3_embedding(tmp_path / "start", tiny_config, tiny_tokenizer)


def embed(folder):
    return SentenceTransformer(str(folder), device="cpu").encode(TEXTS, prompt="")


def ids(folder, texts=TEXTS):
    tokenizer = SentenceTransformer(str(folder), device="cpu").tokenizer
    return [tokenizer.convert_ids_to_tokens(each) for each in tokenizer(texts).input_ids]


@pytest.mark.parametrize("keys", [{}, {"lora": True, "lora_rank": 4}], ids=["whole", "lora"])
def test_a_start_keeps_the_token_that_its_tokenizer_appends(start, tmp_path, refuses, keys):
    assert ids(start)[2] == ["a", "<|endoftext|>"]
    assert main([str(write_single_stage(tmp_path, model=str(start), **NO_NEW_MODEL, **ONE_STEP, **keys))]) == 0
    saved = tmp_path / "run/model"
    assert ids(saved) == ids(start)
    assert (embed(saved) * embed(start)).sum(axis=1).min() >= 1 - 1e-6
    # The prepared data, too, end as texts do.
    source = PreparedSource(next((tmp_path / "run/prepared").glob("tiny_*")))
    ends = {source.tokens(text)[-1] for text in range(source.description["texts"])}
    assert ends == {SentenceTransformer(str(start), device="cpu").tokenizer.pad_token_id}
    if keys:
        merge_adapter(find_adapter(str(saved)), tmp_path / "merged")
        assert ids(tmp_path / "merged") == ids(start)
        assert (embed(tmp_path / "merged") * embed(start)).sum(axis=1).min() >= 1 - 1e-6
        edit_json(saved / "1_Pooling/config.json", pooling_mode="mean")
        with refuses("is pooled by mean", "last-token"):
            merge_adapter(find_adapter(str(saved)), tmp_path / "other")


def test_a_start_that_is_read_in_another_way_is_refused(tmp_path, tiny_config, tiny_tokenizer, refuses):
    start = save_like_qwen3_embedding(tmp_path / "start", tiny_config, tiny_tokenizer, pooling="mean")
    stage = only_stage(load_recipe(write_single_stage(tmp_path, model=str(start), **NO_NEW_MODEL)))
    with refuses("key 'model'", start, "is pooled by mean", "'teacher'"):
        make_model(stage, tiny_tokenizer)
