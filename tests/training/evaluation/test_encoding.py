"""Views of one model for mteb: what is put before texts, and one scale for all of a task's texts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("mteb")

import mteb
from mteb.models import ModelMeta
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.types import PromptType

from modeling_f2llm.sentence_transformer import build_sentence_transformer
from training.common.errors import UserError
from training.evaluation.encoding import EncoderView
from training.evaluation.local.pair_tasks import pair_tasks
from training.evaluation.models import Prompts
from training.evaluation.quantization import calibrate, quantized, unit_length
from training.evaluation.store import EmbeddingStore

TEMPLATE = "Instruct: {instruction}\nQuery: "


@pytest.fixture
def store(tiny_model, tiny_tokenizer) -> EmbeddingStore:
    return EmbeddingStore(build_sentence_transformer(tiny_model, tiny_tokenizer))


@pytest.fixture
def view(store):
    def make(prompts=None, dimension=32, precision="float32"):
        return EncoderView(store, ModelMeta.create_empty({"name": "a/b"}), dimension, precision, prompts)

    return make


@pytest.fixture
def banking():
    return mteb.get_task("Banking77Classification").metadata


def test_an_instruction_for_the_task_goes_before_the_models_own_prompt(view, banking):
    prompts = Prompts(
        {"query": "own: ", "document": ""}, {"Banking77Classification": "Sort."}, TEMPLATE, default="own: "
    )
    assert view(prompts).prompt(banking, None) == "Instruct: Sort.\nQuery: "
    assert view(prompts).prompt(banking, PromptType.document) == ""
    other = mteb.get_task("STS22.v2").metadata
    assert view(prompts).prompt(other, None) == "own: "
    assert view(prompts).prompt(other, PromptType.query) == "own: "


def test_without_prompts_of_its_own_every_task_gets_an_instruction(view, banking):
    prompts = Prompts(by_task={}, template=TEMPLATE)
    found = view(prompts).prompt(banking, None)
    assert found.startswith("Instruct: ") and found.endswith("\nQuery: ") and len(found) > len(TEMPLATE) - 10
    everywhere = Prompts(by_task={}, template=TEMPLATE, on_documents=True)
    assert view(everywhere).prompt(banking, PromptType.document) == found


def test_a_model_with_plain_prompts_gets_them_as_mteb_gives_them(view, banking):
    prompts = Prompts({"query": "query: ", "document": "passage: ", "STS": "same: "})
    assert view(prompts).prompt(banking, PromptType.query) == "query: "
    assert view(prompts).prompt(banking, PromptType.document) == "passage: "
    assert view(prompts).prompt(banking, None) == ""
    assert view(prompts).prompt(mteb.get_task("STS22.v2").metadata, None) == "same: "
    assert view().prompt(banking, PromptType.query) == ""
    assert view(Prompts({"p": "first: "}, default="first: ")).prompt(banking, None) == "first: "


def test_training_and_test_texts_share_the_scale_of_int8(view, banking, sentences):
    half, rest = [{"text": sentences[:5]}], [{"text": sentences[5:]}]
    options = {"task_metadata": banking, "hf_subset": "default"}
    whole, stored = view(), view(precision="int8")
    first, second = (unit_length(whole.encode(each, hf_split="test", **options)) for each in (half, rest))
    np.testing.assert_array_equal(
        stored.encode(half, hf_split="train", **options), quantized(first, "int8", calibrate(first))
    )
    np.testing.assert_array_equal(
        stored.encode(rest, hf_split="test", **options), quantized(second, "int8", calibrate(first))
    )


def test_queries_stay_in_float32_beside_int8_and_results_of_codes_are_not_taken_from_the_cache(view, sentences):
    bucc = mteb.get_task("BUCC.v2").metadata
    stored, whole = view(precision="int8"), view()
    for prompt_type in (PromptType.query, PromptType.document):
        embeddings = [unit_length(each.embed(sentences, bucc, prompt_type)) for each in (stored, whole)]
        assert np.allclose(*embeddings, atol=1e-6) == (prompt_type == PromptType.query)
    name = stored.mteb_model_meta.experiment_name
    assert "int8" in name and "QT_8bit" in name


def test_tasks_of_mteb_get_the_instruction_for_their_type_and_local_ones_the_models_own(view, tmp_path, sentences):
    registered = MODEL_REGISTRY["codefuse-ai/F2LLM-v2-80M"].loader_kwargs
    used = Prompts({"query": "own: ", "document": ""}, registered["prompts_dict"], TEMPLATE, default="own: ")
    bucc = mteb.get_task("BUCC.v2").metadata
    assert "BUCC.v2" not in registered["prompts_dict"]
    instruction = registered["prompts_dict"]["BitextMining"]
    assert view(used).prompt(bucc, None) == f"Instruct: {instruction}\nQuery: "
    pq.write_table(pa.table({"query": sentences, "passage": sentences}), tmp_path / "pairs.parquet")
    for task in pair_tasks(tmp_path / "pairs.parquet", "Names"):
        assert view(used).prompt(task.metadata, PromptType.query) == "own: "


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dimension": 33}, "choose from 1 to 32"), ({"dimension": 0}, "dimension 0"), ({"precision": "int4"}, "'int4'")],
)
def test_a_view_that_cannot_be_is_refused(view, options, message):
    with pytest.raises(UserError, match=message):
        view(**options)
