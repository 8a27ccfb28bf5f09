"""Which model is loaded, and with which prompts; views find and score what mteb's own wrappers do."""

from __future__ import annotations

import pytest

pytest.importorskip("mteb")


from collections import Counter

import mteb
import numpy as np
from datasets import Dataset
from mteb.models import ModelMeta
from mteb.models.instruct_wrapper import InstructSentenceTransformerModel
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.model_implementations.qwen3_models import instruction_template
from mteb.models.search_wrappers import SearchEncoderWrapper
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from modeling_f2llm.sentence_transformer import build_sentence_transformer
from tests.training.evaluation.synthetic import write
from tests.training.models.starts import QWEN3_PROMPTS, save_like_qwen3_embedding
from training.common.errors import UserError
from training.evaluation import models
from training.evaluation.encoding import calibrate, quantized, unit_length
from training.evaluation.local_tasks import pair_tasks
from training.evaluation.models import (
    EncoderView,
    EvaluatedModel,
    Prompts,
    load_model,
    registered_options,
    revisions_of,
)
from training.evaluation.records import ModelRecord
from training.models.model_ref import ModelRef

PUBLISHED = MODEL_REGISTRY["codefuse-ai/F2LLM-v2-80M"]
TEXTS = ["Where do giant pandas live?", "大熊猫生活在四川的山林里。"]
CASES = [
    ("Banking77Classification", None),
    ("NFCorpus", PromptType.query),
    ("NFCorpus", PromptType.document),
    ("STS22.v2", None),
]
# Loaders whose options are supported, and how many models of sentence-transformers have them in mteb 2.26.24.
SUPPORTED = {
    "SentenceTransformerEncoderWrapper": 327,
    "InstructSentenceTransformerModel": 70,
    "q3e_instruct_loader": 3,
    "sentence_transformers_loader": 3,
    "instruct_loader": 1,
}


@pytest.fixture
def save(tmp_path, tiny_model, tiny_tokenizer):
    """Save the tiny model with prompts, by default its own."""

    def save(*prompts, default=None):
        model = build_sentence_transformer(tiny_model, tiny_tokenizer, *prompts)
        model.default_prompt_name = default
        model.save_pretrained(str(tmp_path / "model"))
        return tmp_path / "model"

    return save


def load(name, **options):
    return load_model(str(name), None, 8192, **options)


def test_a_model_trained_with_instructions_gets_the_published_ones_beside_its_own(save):
    folder = save()
    prompts = load(folder).prompts
    assert prompts.by_task == PUBLISHED.loader_kwargs["prompts_dict"] and len(prompts.by_task) == 395
    assert prompts.template == "Instruct: {instruction}\nQuery: "
    assert prompts.default == prompts.own["query"] and prompts.default.startswith("Instruct: ")
    own = load(folder, prompts="model")
    assert own.prompts.template is None and own.prompts.default.startswith("Instruct: ")
    assert own.meta.experiment_kwargs == {"prompts": "model"} and own.meta.revision == load(folder).meta.revision
    assert own.record.label == f"{folder} (prompts model)" and load(folder).record.label == str(folder)


@pytest.mark.parametrize(
    ("prompts", "ours"),
    [
        ({"query": "Instruct: Find it.\nQuery: "}, True),
        ({"query": "Instruct: Find it.\nQuery:", "document": ""}, False),
        ({"query": "Instruct: Find it.\nQuery: ", "document": "passage: "}, False),
        ({"query": "Instruct: Find it.\nText: "}, False),
        ({}, False),
    ],
)
def test_a_model_is_f2llms_if_its_whole_template_is(save, prompts, ours):
    folder = save(prompts)
    assert (load(folder).prompts.template is not None) == ours
    assert load(folder, prompts="published").prompts.template is not None


def test_texts_get_the_models_default_prompt_and_are_truncated_at_the_length_asked_for_or_the_models(save):
    folder = save({"query": "q: ", "first": "f: "}, default="first")
    assert load(folder).prompts.default == "f: "
    longest = SentenceTransformer(str(folder), trust_remote_code=True).max_seq_length
    lengths = [load_model(str(folder), None, asked).store.model.max_seq_length for asked in (4, 4096, 8192)]
    assert lengths == [4, longest, longest]


@pytest.fixture
def folder(tmp_path, tiny_config, tiny_tokenizer):
    """As Qwen3-Embedding is saved, with a prompt before documents, too."""
    return save_like_qwen3_embedding(tmp_path, tiny_config, tiny_tokenizer)


@pytest.fixture
def registered(folder, monkeypatch):
    """``registered(loader, **options)``: the folder, as a model of mteb's registry with these."""

    def load(loader, **options):
        update = {"name": "org/model", "loader": loader, "loader_kwargs": options}
        monkeypatch.setitem(MODEL_REGISTRY, "org/model", PUBLISHED.model_copy(update=update))
        found = ModelRef("org/model", str(folder), None, "commit")
        asked = []
        monkeypatch.setattr("training.evaluation.models.resolve", lambda *args: asked.append(args) or found)
        ours = load_model("org/model", None, 512)
        assert asked == [("org/model", "MODEL", PUBLISHED.revision)] and ours.meta.name == "org/model"
        return ours

    return load


def check_same(model, wrapper):
    """Compare our embeddings of texts in different tasks with those of mteb's wrapper."""
    view = EncoderView(model)
    for task, prompt_type in CASES:
        metadata = mteb.get_task(task).metadata
        batches = DataLoader(Dataset.from_dict({"text": TEXTS}), batch_size=8)
        options = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default", "prompt_type": prompt_type}
        expected = np.asarray(wrapper.encode(batches, **options, show_progress_bar=False))
        np.testing.assert_allclose(view.embed(TEXTS, metadata, prompt_type), expected, atol=1e-6)


def test_every_kind_of_loader_is_known():
    found = Counter()
    for known in (each for each in MODEL_REGISTRY.values() if "Sentence Transformers" in each.framework):
        name = getattr(known.loader, "__qualname__", str(known.loader))
        try:
            registered_options(known)
        except UserError as error:
            assert name not in SUPPORTED, f"an option of {known.name} is not supported: {error}"
            found["refused"] += 1
        else:
            found[name] += 1
    assert found == {**SUPPORTED, "refused": 140}


def test_bad_names_and_other_loaders_and_options_are_refused(registered, tmp_path, refuses):
    (tmp_path / "empty").mkdir()
    with refuses("holds no model"):
        load(tmp_path / "empty")
    with refuses("neither a folder nor to be had from the Hub"):
        load("nobody/nothing")
    with refuses("its revisions cannot be listed"):
        revisions_of("nobody/nothing")
    name = "nomic-ai/nomic-embed-text-v1.5"
    with refuses(name, "NomicWrapper", f"mteb run -m {name}"):
        load(name)
    with refuses("org/model", "'new_option'", "mteb run -m org/model"):
        registered(SentenceTransformerEncoderWrapper, new_option=1)
    registered(SentenceTransformerEncoderWrapper, num_frames=8)


def test_a_model_of_others_keeps_its_own_prompts(folder, caplog):
    """Its template begins as F2LLM's does and ends in another way; that of documents is not part of F2LLM's."""
    with caplog.at_level("INFO", logger="training"):
        ours = load_model(str(folder), None, 512)
    assert ours.prompts.own == QWEN3_PROMPTS and ours.prompts.template is None
    check_same(ours, SentenceTransformerEncoderWrapper(str(folder), device="cpu"))
    (line,) = [each for each in caplog.messages if "pooled by" in each]
    parts = (str(folder), "float32", "pooled by lasttoken", "most 512 tokens", "Find what answers")
    assert all(part in line for part in parts)


OWN_PROMPTS = {"query": "q: ", "document": "d: ", "Banking77Classification": "sort: "}


@pytest.mark.parametrize(
    ("loader", "options"),
    [
        (InstructSentenceTransformerModel, {"instruction_template": instruction_template}),
        (InstructSentenceTransformerModel, {"instruction_template": "{instruction}\n"}),
        (InstructSentenceTransformerModel, {}),
        (SentenceTransformerEncoderWrapper, {"model_prompts": OWN_PROMPTS}),
    ],
)
def test_a_model_of_the_registry_gets_mtebs_instructions_or_prompts(registered, folder, loader, options):
    options |= {"apply_instruction_to_passages": False} if "instruction_template" in options else {}
    check_same(registered(loader, **options), loader(str(folder), "main", device="cpu", **options))


def test_options_of_the_registry_are_used(registered):
    options = {"add_eos_token": True, "padding_side": "left", "embed_dim": 8, "include_prompt": False}
    ours = registered(InstructSentenceTransformerModel, **options, model_kwargs={"torch_dtype": "bfloat16"})
    model = ours.store.model
    assert model.tokenizer.padding_side == "left" and ours.store.width == 8
    assert model[1].include_prompt is False and str(model.dtype) == "torch.bfloat16"


TEMPLATE = "Instruct: {instruction}\nQuery: "
QUERY, DOCUMENT = PromptType.query, PromptType.document


@pytest.fixture
def view(store):
    def make(prompts=None, dimension=32, precision="float32"):
        meta = ModelMeta.create_empty({"name": "a/b"})
        return EncoderView(EvaluatedModel(ModelRecord("a/b"), store, meta, prompts or Prompts()), dimension, precision)

    return make


@pytest.fixture
def local(tmp_path, sentences):
    return pair_tasks(write(tmp_path / "pairs.parquet", query=sentences, passage=sentences), "Names")


BANKING, STS, BUCC = "Banking77Classification", "STS22.v2", "BUCC.v2"
OWN = {"query": "own: ", "document": ""}
PLAIN = Prompts({"query": "query: ", "document": "passage: ", "STS": "same: "})
SORT = Prompts(OWN, {BANKING: "Sort."}, TEMPLATE, default="own: ")


@pytest.mark.parametrize(
    ("prompts", "task", "prompt_type", "expected"),
    [
        # An instruction for the task goes before the model's own prompt.
        (SORT, BANKING, None, "Instruct: Sort.\nQuery: "),
        (SORT, BANKING, DOCUMENT, ""),
        (SORT, STS, QUERY, "own: "),
        # Plain prompts are given as mteb gives them.
        (PLAIN, BANKING, QUERY, "query: "),
        (PLAIN, BANKING, DOCUMENT, "passage: "),
        (PLAIN, BANKING, None, ""),
        (PLAIN, STS, None, "same: "),
        (None, BANKING, QUERY, ""),
        (Prompts({"p": "first: "}, default="first: "), BANKING, None, "first: "),
    ],
)
def test_prompts(view, prompts, task, prompt_type, expected):
    assert view(prompts).prompt(mteb.get_task(task).metadata, prompt_type) == expected


def test_tasks_of_mteb_get_the_instruction_for_their_type_and_local_ones_the_models_own(view, local):
    instructions = MODEL_REGISTRY["codefuse-ai/F2LLM-v2-80M"].loader_kwargs["prompts_dict"]
    used = view(Prompts(OWN, instructions, TEMPLATE, default="own: "))
    assert BUCC not in instructions
    assert used.prompt(mteb.get_task(BUCC).metadata, None) == f"Instruct: {instructions['BitextMining']}\nQuery: "
    assert {used.prompt(task.metadata, QUERY) for task in local} == {"own: "}


def test_training_and_test_texts_share_the_scale_of_int8(view, sentences):
    halves = [{"text": sentences[:5]}], [{"text": sentences[5:]}]
    options = {"task_metadata": mteb.get_task(BANKING).metadata, "hf_subset": "default"}
    whole, stored = view(), view(precision="int8")
    exact = [unit_length(whole.encode(each, hf_split="test", **options)) for each in halves]
    for half, split, embeddings in zip(halves, ("train", "test"), exact, strict=True):
        expected = quantized(embeddings, "int8", calibrate(exact[0]))
        np.testing.assert_array_equal(stored.encode(half, hf_split=split, **options), expected)


@pytest.fixture
def data(sentences):
    corpus = [{"id": f"d{n}", "title": text[:5], "text": text} for n, text in enumerate(sentences)]
    queries = [{"id": f"q{n}", "text": text[::-1]} for n, text in enumerate(sentences[:4])]
    return Dataset.from_list(corpus), Dataset.from_list(queries)


@pytest.fixture
def search(local):
    def found(searcher, data, **options):
        shared = {"task_metadata": local[0].metadata, "hf_split": "test", "hf_subset": "default", "encode_kwargs": {}}
        searcher.index(data[0], num_proc=None, **shared)
        return searcher.search(data[1], num_proc=None, **{"top_k": 3, **options}, **shared)

    return found


@pytest.mark.parametrize("precision", ["float32", "binary"])
@pytest.mark.parametrize("ranked", [None, {"q0": ["d3", "d1"], "q1": [], "q2": ["d9"], "q3": ["d0", "d5", "d2"]}])
def test_it_finds_in_blocks_what_mteb_finds(precision, ranked, view, data, search, monkeypatch):
    monkeypatch.setattr(models, "_SIMILARITIES", 3 * len(data[0]))
    options = Prompts({"query": "q: ", "document": "d: "}), 16, precision
    expected = search(SearchEncoderWrapper(view(*options)), data, top_ranked=ranked)
    actual = search(view(*options), data, top_ranked=ranked)
    assert set(actual) == set(expected)
    for query in expected:
        # The worst of three may tie with the fourth.
        assert sorted(actual[query].values()) == pytest.approx(sorted(expected[query].values()), abs=1e-5)
        if precision == "float32":
            assert set(actual[query]) == set(expected[query])
    # Few documents are all found.
    assert all(len(documents) == len(data[0]) for documents in search(view(*options), data, top_k=50).values())


def test_int8_documents_are_calibrated_on_their_corpus_and_found_by_queries_in_float32(store, view, data, search):
    searcher, (corpus, queries) = view(dimension=16, precision="int8"), data
    assert "QT_8bit" in searcher.mteb_model_meta.experiment_name
    # The corpus of another subset does not change the scale.
    search(searcher, (corpus.select(range(2)), queries))
    similarities = search(searcher, data)
    documents = unit_length(store.encode([f"{row['title']} {row['text']}" for row in corpus], "")[:, :16])
    asked = store.encode(queries["text"], "")[:, :16]
    stored = quantized(documents, "int8", calibrate(documents))
    cosines = asked @ stored.T / np.linalg.norm(asked, axis=1)[:, None] / np.linalg.norm(stored, axis=1)
    expected = np.sort(cosines, axis=1)[:, -3:]
    np.testing.assert_allclose([sorted(each.values()) for each in similarities.values()], expected, atol=1e-5)
