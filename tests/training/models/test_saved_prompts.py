"""A model is saved with the query prompt that it was trained with, and says so where no source was."""

from __future__ import annotations

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sentence_transformers import SentenceTransformer

from modeling_f2llm.prompts import DEFAULT_INSTRUCTION, instruct
from tests.training.models.starts import edit_json, save_like_qwen3_embedding
from tests.training.recipes import only_stage, recipe_writer, write_single_stage
from training.config.recipe import load_recipe
from training.data.manifest import Source
from training.data.preparation.pipeline import prepare
from training.data.preparation.plan import PreparationOptions
from training.data.prepared import PreparedSource
from training.models.merging import merge_adapter
from training.models.model_ref import find_adapter
from training.models.saved_prompts import choose_prompts
from training.run_stage import main
from training.stages.setup import make_model

# A model that was not trained here: another template, and prompts of other names.
THEIRS = {"query": "Instruct: Search the web\nQuery:", "document": "", "clustering": "Cluster: "}
TEXTS = ["Where do giant pandas live?", "大熊猫生活在四川的山林里。", "a", "", "the red river\n\n"]


def prompts_in(folder):
    return json.loads((folder / "config_sentence_transformers.json").read_text())["prompts"]


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_config, tiny_tokenizer):
    """A model that was not trained here: its texts end with the padding token, and its prompts are not ours."""
    folder = save_like_qwen3_embedding(tmp_path_factory.mktemp("start"), tiny_config, tiny_tokenizer)
    edit_json(folder / "config_sentence_transformers.json", prompts=THEIRS)
    return folder


@pytest.fixture
def arguments(tmp_path, start):
    write = recipe_writer(tmp_path)
    base = {"output_dir": str(tmp_path / "run"), "model": str(start), "use_cpu": True}
    return lambda **keys: only_stage(load_recipe(write({**base, **keys}, base={})))


@pytest.fixture
def prepared(tmp_path, write_source, small_tokenizer):
    def build(*instructions, instructed=True):
        sources = [write_source(f"source{n}", rows=20, instruction=each) for n, each in enumerate(instructions)]
        options = PreparationOptions(instructions=instructed, num_hard_negatives=(("retrieval", 1),))
        return prepare(sources, small_tokenizer, tmp_path / "prepared", options)

    return build


def test_the_instruction_that_all_sources_share_is_saved(arguments, prepared, small_tokenizer):
    choice = choose_prompts(arguments(), prepared("Find the page.", "Find the page."), small_tokenizer)
    assert choice.prompts == {**THEIRS, "query": instruct("Find the page.")}
    assert choice.is_trained and "as all sources are trained with" in choice.line()


def test_where_the_sources_share_none_the_start_models_or_the_published_one_is_saved(
    arguments, prepared, small_tokenizer, start
):
    sources = prepared("Find the page.", DEFAULT_INSTRUCTION)
    choice = choose_prompts(arguments(), sources, small_tokenizer)
    assert choice.prompts == THEIRS and not choice.is_trained and str(start) in choice.line()
    assert "query_instruction: …" in choice.warning() and repr(instruct("Find the page.")) in choice.warning()
    new = arguments(model=None, model_config={"family": "f2llm-v2-80m"}, tokenizer="train")
    choice = choose_prompts(new, sources, small_tokenizer)
    # One source is trained with it.
    assert choice.prompts == {"query": instruct(DEFAULT_INSTRUCTION), "document": ""} and choice.is_trained


@pytest.mark.parametrize("instructions", [True, False])
def test_a_given_prompt_wins_and_raw_text_has_none(arguments, prepared, small_tokenizer, instructions):
    sources = prepared("Find the page.", instructed=instructions)
    trained = instruct("Find the page.") if instructions else ""
    for given, saved in ((None, trained), ("Find it.", instruct("Find it.")), ("", "")):
        keys = {} if given is None else {"query_instruction": given}
        choice = choose_prompts(arguments(instructions=instructions, **keys), sources, small_tokenizer)
        assert choice.prompts == {**THEIRS, "query": saved}
        assert choice.is_trained is (saved == trained)


def test_the_instruction_that_a_file_brings_counts(arguments, tmp_path, small_tokenizer):
    queries = [instruct("Name the river.", f"question {row}") for row in range(20)]
    table = pa.table({"query": queries, "passage": [f"answer {row}" for row in range(20)]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = Source("brings", [tmp_path / "a.parquet"], "retrieval", "Find the page.")
    options = PreparationOptions(num_hard_negatives=(("retrieval", 0),))
    sources = prepare([source], small_tokenizer, tmp_path / "prepared", options)
    choice = choose_prompts(arguments(), sources, small_tokenizer)
    assert choice.prompts["query"] == instruct("Name the river.") and choice.is_trained


def _stage(folder, start, **keys):
    no_new_model = {"model_config": None, "tokenizer": None, "tokenizer_vocab_size": None}
    short = {"max_steps": 1, "eval_strategy": "no", "save_strategy": "no", "instructions": True}
    return [str(write_single_stage(folder, model=str(start), **no_new_model, **{**short, **keys}))]


def _read(folder):
    """Tokens and embeddings of texts."""
    model = SentenceTransformer(str(folder), device="cpu")
    tokens = [model.tokenizer.convert_ids_to_tokens(each) for each in model.tokenizer(TEXTS).input_ids]
    return tokens, model.encode(TEXTS, prompt="")


@pytest.mark.parametrize("keys", [{}, {"lora": True, "lora_rank": 4}], ids=["whole", "lora"])
def test_a_trained_model_ends_texts_as_its_start_and_has_the_prompt_of_its_manifest(
    tmp_path, start, caplog, refuses, keys
):
    caplog.set_level(logging.INFO)
    # Nearly nothing is learnt.
    assert main(_stage(tmp_path, start, learning_rate=1e-9, warmup_steps=0, **keys)) == 0
    saved, trained = tmp_path / "run/model", instruct("Given a phrase, retrieve its inversion.")
    assert prompts_in(saved) == {**THEIRS, "query": trained}
    assert f"query prompt of the saved model: {trained!r}" in caplog.text
    assert "no source is trained with it" not in caplog.text
    # The prepared data end as texts do.
    source = PreparedSource(next((tmp_path / "run/prepared").glob("tiny_*")))
    ends = {int(source.tokens(text)[-1]) for text in range(source.description["texts"])}
    assert ends == {SentenceTransformer(str(start), device="cpu").tokenizer.pad_token_id}
    if keys:
        merge_adapter(find_adapter(str(saved)), tmp_path / "merged")
    tokens, embeddings = _read(start)
    for folder in [saved, *tmp_path.glob("merged")]:
        found, vectors = _read(folder)
        assert found == tokens and tokens[2] == ["a", "<|endoftext|>"]
        assert (vectors * embeddings).sum(axis=1).min() >= 1 - 1e-6
    if keys:
        edit_json(saved / "1_Pooling/config.json", pooling_mode="mean")
        with refuses("is pooled by mean", "last-token"):
            merge_adapter(find_adapter(str(saved)), tmp_path / "other")


def test_a_stage_whose_sources_share_none_warns_and_a_start_that_is_read_in_another_way_is_refused(
    tmp_path, start, caplog, tiny_config, tiny_tokenizer, refuses
):
    other = save_like_qwen3_embedding(tmp_path / "start", tiny_config, tiny_tokenizer, pooling="mean")
    with refuses("key 'model'", other, "is pooled by mean", "'teacher'"):
        make_model(only_stage(load_recipe(_stage(tmp_path, other)[0])), tiny_tokenizer)
    words = _stage(tmp_path, start, task_types=["retrieval", "clustering"])
    manifest = tmp_path / "data/manifest.yaml"
    content = yaml.safe_load(manifest.read_text())
    content["sources"][1]["instruction"] = "Group the phrases."
    manifest.write_text(yaml.safe_dump(content))
    assert main(words) == 0
    assert prompts_in(tmp_path / "run/model") == THEIRS
    (warning,) = [each for each in caplog.records if "no source is trained with it" in each.getMessage()]
    assert warning.levelno == logging.WARNING and "query_instruction: …" in warning.getMessage()


def test_a_cut_model_keeps_the_prompts_of_its_start(tmp_path, start):
    cut = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    assert main(_stage(tmp_path, start, prune_to=cut, calibration_texts=8, max_steps=None)) == 0
    assert prompts_in(tmp_path / "run/model") == THEIRS


def test_a_finished_model_is_given_another_prompt_without_training(tmp_path, start, caplog):
    words = _stage(tmp_path, start)
    assert main(words) == 0
    model = tmp_path / "run/model"
    weights = (model / "model.safetensors").stat().st_mtime_ns
    assert main([*words, "--resume", "--query_instruction", "Turn it around."]) == 0
    assert prompts_in(model) == {**THEIRS, "query": instruct("Turn it around.")}
    assert (model / "model.safetensors").stat().st_mtime_ns == weights
    # Where the card reads them.
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["query_instruction"] == "Turn it around."
    assert json.loads((model / "training_arguments.json").read_text())["query_instruction"] == "Turn it around."
    # The recipe itself says nothing of a prompt: what was set stays.
    assert main([*words, "--resume"]) == 0
    assert prompts_in(model)["query"] == instruct("Turn it around.")
