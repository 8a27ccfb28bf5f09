"""sentence-transformers trains F2LLMModel as it trains Qwen3Model: the same losses, step by step."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from sentence_transformers import (
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    EmbedDistillLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)

from modeling_f2llm import build_sentence_transformer, matryoshka_weights

# The model package itself does without; sentence-transformers' trainer does not.
Dataset = pytest.importorskip("datasets").Dataset

STEPS = 6


def ranking(model):
    dims = [32, 16, 8]
    loss = MultipleNegativesRankingLoss(model, scale=20.0)
    return MatryoshkaLoss(model, loss, matryoshka_dims=dims, matryoshka_weights=matryoshka_weights(dims))


def distilling(model):
    return EmbedDistillLoss(model, distance_metric="mse")


@pytest.fixture
def labels(tiny_model, tiny_tokenizer, sentences):
    """A teacher's embeddings."""
    model = deepcopy(tiny_model)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return build_sentence_transformer(model, deepcopy(tiny_tokenizer)).encode_document(sentences)


@pytest.mark.parametrize("loss_of", [ranking, distilling])
def test_training_equals_training_stock_step_by_step(
    tiny_model, stock_model, tiny_tokenizer, sentences, labels, loss_of, tmp_path
):
    rows = {"sentence": sentences, "label": labels}
    if loss_of is ranking:
        rows = {"query": [f"{text[:12]} …?" for text in sentences], "passage": sentences}
    nothing_else = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    options = {"max_steps": STEPS, "per_device_train_batch_size": len(sentences), "learning_rate": 1e-3}
    arguments = SentenceTransformerTrainingArguments(str(tmp_path), logging_steps=1, **options, **nothing_else)
    before = deepcopy(tiny_model.state_dict())
    losses = {}
    for name, model in {"packed": tiny_model, "stock": stock_model}.items():
        encoder = build_sentence_transformer(model, deepcopy(tiny_tokenizer))
        trainer = SentenceTransformerTrainer(encoder, arguments, Dataset.from_dict(rows), loss=loss_of(encoder))
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert len(losses["packed"]) == STEPS
    assert losses["packed"][-1] < 0.9 * losses["packed"][0]
    assert losses["packed"][0] == pytest.approx(losses["stock"][0], rel=1e-5)
    assert losses["packed"] == pytest.approx(losses["stock"], rel=1e-2)
    after = tiny_model.state_dict()
    assert all(not torch.equal(after[name], weight) for name, weight in before.items())
