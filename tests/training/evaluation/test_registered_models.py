"""Models of mteb's registry, and others that are not F2LLM's: given what mteb gives them, or refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

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
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from modeling_f2llm import F2LLMConfig
from tests.training.models.starts import QWEN3_PROMPTS, save_like_qwen3_embedding
from training.common.errors import UserError
from training.evaluation.encoding import EncoderView
from training.evaluation.models import EvaluatedModel, load_model, registered_options
from training.models.reference import ModelRef

Refuses = Callable[..., AbstractContextManager[None]]
TEXTS = ["Where do giant pandas live?", "大熊猫生活在四川的山林里。"]
CASES = [
    ("Banking77Classification", None),
    ("NFCorpus", PromptType.query),
    ("NFCorpus", PromptType.document),
    ("STS22.v2", None),
]
# Loaders of which the options are heeded, and how many models of sentence-transformers have them in mteb 2.26.24.
HEEDED = {
    "SentenceTransformerEncoderWrapper": 327,
    "InstructSentenceTransformerModel": 70,
    "q3e_instruct_loader": 3,
    "sentence_transformers_loader": 3,
    "instruct_loader": 1,
}


@pytest.fixture
def folder(tmp_path: Path, tiny_config: F2LLMConfig, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    """As Qwen3-Embedding is saved, with a prompt before documents besides."""
    return save_like_qwen3_embedding(tmp_path, tiny_config, tiny_tokenizer)


@pytest.fixture
def registered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EvaluatedModel]:
    """``registered(loader, **options)``: the folder, as a model of mteb's registry with these."""

    def load(loader: Any, **options: Any) -> EvaluatedModel:
        known = MODEL_REGISTRY["codefuse-ai/F2LLM-v2-80M"]
        entry = known.model_copy(update={"name": "org/model", "loader": loader, "loader_kwargs": options})
        monkeypatch.setitem(MODEL_REGISTRY, "org/model", entry)
        found = ModelRef("org/model", str(folder), None, "commit")
        monkeypatch.setattr("training.evaluation.models.resolve", lambda *_: found)
        return load_model("org/model", None, 512)

    return load


def by_mteb(wrapper: Any, task: str, prompt_type: PromptType | None) -> np.ndarray:
    metadata = mteb.get_task(task).metadata
    batches = DataLoader(Dataset.from_dict({"text": TEXTS}), batch_size=8)
    options = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default", "prompt_type": prompt_type}
    return np.asarray(wrapper.encode(batches, **options, show_progress_bar=False))


def by_us(model: EvaluatedModel, task: str, prompt_type: PromptType | None) -> np.ndarray:
    view = EncoderView(model.store, model.meta, model.store.width, prompts=model.prompts)
    return view.embed(TEXTS, mteb.get_task(task).metadata, prompt_type)


def test_every_kind_of_loader_is_known() -> None:
    found: Counter[str] = Counter()
    for known in MODEL_REGISTRY.values():
        if "Sentence Transformers" not in known.framework:
            continue
        name = getattr(known.loader, "__qualname__", str(known.loader))
        try:
            registered_options(known)
        except UserError as error:
            assert name not in HEEDED, f"an option of {known.name} is not heeded: {error}"
            found["refused"] += 1
        else:
            found[name] += 1
    assert found == {**HEEDED, "refused": 140}


def test_a_model_with_another_loader_is_refused(refuses: Refuses) -> None:
    name = "nomic-ai/nomic-embed-text-v1.5"
    with refuses(name, "NomicWrapper", f"mteb run -m {name}"):
        load_model(name, None, 512)


def test_an_option_that_is_not_known_is_refused(registered: Callable[..., EvaluatedModel], refuses: Refuses) -> None:
    with refuses("org/model", "'new_option'", "mteb run -m org/model"):
        registered(SentenceTransformerEncoderWrapper, new_option=1)
    registered(SentenceTransformerEncoderWrapper, num_frames=8)


@pytest.mark.parametrize(("task", "prompt_type"), CASES)
def test_a_model_keeps_its_own_prompts(folder: Path, task: str, prompt_type: PromptType | None) -> None:
    """Its template begins as F2LLM's does and ends in another way; that of documents is no part of F2LLM's."""
    ours = load_model(str(folder), None, 512)
    assert ours.prompts.own == QWEN3_PROMPTS and ours.prompts.template is None
    expected = by_mteb(SentenceTransformerEncoderWrapper(str(folder), device="cpu"), task, prompt_type)
    np.testing.assert_allclose(by_us(ours, task, prompt_type), expected, atol=1e-6)


@pytest.mark.parametrize(("task", "prompt_type"), CASES)
@pytest.mark.parametrize("template", [instruction_template, "{instruction}\n", None], ids=["function", "text", "none"])
def test_a_model_of_the_registry_gets_mtebs_instructions(
    registered: Callable[..., EvaluatedModel], folder: Path, template: Any, task: str, prompt_type: PromptType | None
) -> None:
    options = {"instruction_template": template, "apply_instruction_to_passages": False}
    if template is None:
        options = {}
    ours = registered(InstructSentenceTransformerModel, **options)
    wrapper = InstructSentenceTransformerModel(str(folder), "main", device="cpu", **options)
    np.testing.assert_allclose(by_us(ours, task, prompt_type), by_mteb(wrapper, task, prompt_type), atol=1e-6)


def test_prompts_of_the_registry_take_the_place_of_the_models(
    registered: Callable[..., EvaluatedModel], folder: Path
) -> None:
    prompts = {"query": "q: ", "document": "d: ", "Banking77Classification": "sort: "}
    ours = registered(SentenceTransformerEncoderWrapper, model_prompts=prompts)
    wrapper = SentenceTransformerEncoderWrapper(str(folder), device="cpu", model_prompts=prompts)
    for case in CASES:
        np.testing.assert_allclose(by_us(ours, *case), by_mteb(wrapper, *case), atol=1e-6)


def test_options_of_the_registry_are_heeded(registered: Callable[..., EvaluatedModel], folder: Path) -> None:
    options = {"add_eos_token": True, "padding_side": "left", "embed_dim": 8, "include_prompt": False}
    ours = registered(InstructSentenceTransformerModel, **options, model_kwargs={"torch_dtype": "bfloat16"})
    model = ours.store.model
    assert model.tokenizer.padding_side == "left" and ours.store.width == 8
    assert model[1].include_prompt is False and str(model.dtype) == "torch.bfloat16"


def test_what_was_used_is_said_in_a_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="training"):
        load_model(str(folder), None, 100)
    (line,) = [each for each in caplog.messages if "pooled by" in each]
    for part in (
        str(folder),
        "as it was saved",
        "prompts: its own",
        "float32",
        "pooled by lasttoken",
        "at most 100 tokens",
    ):
        assert part in line


@pytest.mark.parametrize(
    ("prompts", "ours"),
    [
        ({"query": "Instruct: Find it.\nQuery: ", "document": ""}, True),
        ({"query": "Instruct: Find it.\nQuery: "}, True),
        ({"query": "Instruct: Find it.\nQuery:", "document": ""}, False),
        ({"query": "Instruct: Find it.\nQuery: ", "document": "passage: "}, False),
        ({"query": "Instruct: "}, False),
        ({"query": "Instruct: Find it.\nText: "}, False),
        ({}, False),
    ],
)
def test_a_model_is_f2llms_if_its_whole_template_is(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: PreTrainedTokenizerBase, prompts: dict[str, str], ours: bool
) -> None:
    from modeling_f2llm.sentence_transformer import build_sentence_transformer

    build_sentence_transformer(tiny_model, tiny_tokenizer, prompts).save_pretrained(str(tmp_path))
    assert (load_model(str(tmp_path), None, 512).prompts.template is not None) == ours
