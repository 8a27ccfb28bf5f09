"""Which model is loaded, and with which options and prompts; models of others are given what mteb gives them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("mteb")

import mteb
from datasets import Dataset
from mteb.models.instruct_wrapper import InstructSentenceTransformerModel
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.model_implementations.qwen3_models import instruction_template
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from modeling_f2llm.sentence_transformer import build_sentence_transformer
from tests.training.models.starts import QWEN3_PROMPTS, save_like_qwen3_embedding
from training.common.errors import UserError
from training.evaluation.models import EncoderView, load_model, registered_options, revisions_of
from training.models.model_ref import ModelRef, find_model

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


def test_a_model_trained_without_instructions_gets_none_by_default(save):
    folder = save({"query": "", "document": ""})
    found = load(folder)
    assert found.prompts.template is None and not any(found.prompts.own.values()) and found.prompts.described == "none"
    assert load(folder, prompts="published").prompts.template is not None
    assert load(save({"query": "q: ", "first": "f: "}, default="first")).prompts.default == "f: "


@pytest.mark.parametrize(
    ("prompts", "ours"),
    [
        ({"query": "Instruct: Find it.\nQuery: "}, True),
        ({"query": "Instruct: Find it.\nQuery:", "document": ""}, False),
        ({"query": "Instruct: Find it.\nQuery: ", "document": "passage: "}, False),
        ({"query": "Instruct: "}, False),
        ({"query": "Instruct: Find it.\nText: "}, False),
        ({}, False),
    ],
)
def test_a_model_is_f2llms_if_its_whole_template_is(save, prompts, ours):
    assert (load(save(prompts)).prompts.template is not None) == ours


def test_a_published_model_is_loaded_as_the_registry_says(save, monkeypatch):
    from training.models import encoders, model_ref

    name, asked, folder = PUBLISHED.name, {}, save()
    local = encoders.SentenceTransformer

    def from_folder(place, **options):
        asked.update(options, place=place)
        return local(str(folder), trust_remote_code=True)

    monkeypatch.setattr(encoders, "SentenceTransformer", from_folder)
    monkeypatch.setattr(model_ref, "model_revision", lambda place, key, revision: revision)
    monkeypatch.setattr(model_ref, "model_file", lambda place, file, revision=None: folder / file)
    monkeypatch.setattr(encoders, "model_file", lambda place, file, revision=None: folder / file)
    found = load(name)
    assert asked["place"] == name and asked["revision"] == PUBLISHED.revision
    assert asked["model_kwargs"] == {"dtype": "bfloat16"} and asked["trust_remote_code"] is False
    assert found.meta.name == name and found.meta.revision == PUBLISHED.revision
    assert found.prompts.by_task == PUBLISHED.loader_kwargs["prompts_dict"] and not found.prompts.own
    assert found.store.model.tokenizer("a").input_ids[-1] == found.store.model.tokenizer.eos_token_id


def test_texts_are_truncated_at_the_length_asked_for_or_the_models(save):
    folder = save()
    longest = SentenceTransformer(str(folder), trust_remote_code=True).max_seq_length
    lengths = [load_model(str(folder), None, asked).store.model.max_seq_length for asked in (4, 4096, 8192)]
    assert lengths == [4, longest, longest]


def test_bad_names_are_one_line(tmp_path, refuses):
    with refuses("holds no model"):
        load(tmp_path)
    with refuses("neither a folder nor to be had from the Hub"):
        load("nobody/nothing")
    with refuses("its revisions cannot be listed"):
        revisions_of("nobody/nothing")


def test_a_run_stands_for_its_model_and_else_for_its_newest_checkpoint(tmp_path, save, refuses):
    folder, stage = save(), tmp_path / "run/stage"
    stage.mkdir(parents=True)
    for name, found in (("checkpoint-10", "checkpoint-10"), ("checkpoint-9", "checkpoint-10"), ("model", "model")):
        (stage / name).symlink_to(folder)
        assert find_model(str(stage), None) == (str(stage / found), None)
    assert find_model("owner/name", "step-3") == ("owner/name", "step-3")
    with refuses("name one of its stages: stage"):
        find_model(str(tmp_path / "run"), None)


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
        monkeypatch.setattr("training.evaluation.models.resolve", lambda *_: found)
        return load_model("org/model", None, 512)

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
    found: Counter[str] = Counter()
    for known in MODEL_REGISTRY.values():
        if "Sentence Transformers" not in known.framework:
            continue
        name = getattr(known.loader, "__qualname__", str(known.loader))
        try:
            registered_options(known)
        except UserError as error:
            assert name not in SUPPORTED, f"an option of {known.name} is not supported: {error}"
            found["refused"] += 1
        else:
            found[name] += 1
    assert found == {**SUPPORTED, "refused": 140}


def test_other_loaders_and_options_are_refused(registered, refuses):
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
    parts = (str(folder), "as it was saved", "prompts: its own", "float32", "pooled by lasttoken", "most 512 tokens")
    assert all(part in line for part in parts)


@pytest.mark.parametrize("template", [instruction_template, "{instruction}\n", None], ids=["function", "text", "none"])
def test_a_model_of_the_registry_gets_mtebs_instructions(registered, folder, template):
    options = {"instruction_template": template, "apply_instruction_to_passages": False} if template else {}
    ours = registered(InstructSentenceTransformerModel, **options)
    check_same(ours, InstructSentenceTransformerModel(str(folder), "main", device="cpu", **options))


def test_prompts_of_the_registry_replace_the_models(registered, folder):
    prompts = {"query": "q: ", "document": "d: ", "Banking77Classification": "sort: "}
    ours = registered(SentenceTransformerEncoderWrapper, model_prompts=prompts)
    check_same(ours, SentenceTransformerEncoderWrapper(str(folder), device="cpu", model_prompts=prompts))


def test_options_of_the_registry_are_used(registered):
    options = {"add_eos_token": True, "padding_side": "left", "embed_dim": 8, "include_prompt": False}
    ours = registered(InstructSentenceTransformerModel, **options, model_kwargs={"torch_dtype": "bfloat16"})
    model = ours.store.model
    assert model.tokenizer.padding_side == "left" and ours.store.width == 8
    assert model[1].include_prompt is False and str(model.dtype) == "torch.bfloat16"
