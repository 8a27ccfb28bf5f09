"""Whole training steps under two trainers: sentence-transformers' on stock Qwen3 and F2LLMTrainer on F2LLMModel.

Both run transformers' Trainer loop over the same texts: collating, the step, clipping, AdamW. sentence-transformers has
``CachedMultipleNegativesRankingLoss`` in ``MatryoshkaLoss`` with our widths, weights and temperature. Its maths is not
ours: one softmax holds the positives and the hard negatives of all rows.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import PrinterCallback, TrainerCallback

from modeling_f2llm import build_sentence_transformer, matryoshka_dims
from tests.benchmarks.common import LONGEST, NEGATIVES, build_models, device, word_tokenizer, write_texts
from tests.benchmarks.step import training_lengths
from tests.benchmarks.timing import Contestant
from tests.benchmarks.unpadded import cached_loss
from training.config.arguments import StageArguments
from training.data.manifest import Source
from training.data.preparation.pipeline import prepare
from training.data.preparation.plan import PreparationOptions
from training.trainer.trainer import F2LLMTrainer

_COLUMNS = ("query", "passage", *(f"negative_{k}" for k in range(1, NEGATIVES + 1)))
_STEPS, _MINI_BATCH = 2, 32


class _Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, *_, **__):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def run(settings, suite):
    """Time steps of both trainers in every precision."""
    lengths = training_lengths(settings, suite)
    texts = np.array_split(write_texts(lengths.T.reshape(-1)), len(_COLUMNS))
    columns = {name: column.tolist() for name, column in zip(_COLUMNS, texts, strict=True)}
    pairs = [("sentence_transformers", name) for name in ("ours", "ours_compiled")]
    facts = {"rows": len(lengths), "real_tokens": int(lengths.sum())}
    for precision in settings.precisions:
        models = build_models(settings, compile=settings.compile, **settings.step_shape)
        _check_embeddings(models, columns["passage"][:2])
        with TemporaryDirectory() as folder:
            contestants = {}
            for name, model in models.items():
                build = _sentence_transformer_trainer if name == "stock" else _our_trainer
                train = _timed(build(model, columns, *_arguments(precision, Path(folder) / name)))
                label = "sentence_transformers" if name == "stock" else name
                contestants[label] = Contestant(train, reports_seconds=True, optional="compiled" in name)
            known = {"precision": precision, "facts": facts}
            suite.compare("one step of a trainer", contestants, settings.repeats, pairs, **known)


def _timed(trainer):
    """Train and return the seconds from the end of the first step to the end of the last, per step."""
    clock = _Clock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)

    def train():
        clock.ends.clear()
        trainer.train()
        return (clock.ends[-1] - clock.ends[0]) / (len(clock.ends) - 1)

    return train


def _check_embeddings(models, texts):
    """The losses cannot agree, so the models must."""
    build = partial(build_sentence_transformer, tokenizer=word_tokenizer(), prompts={})
    ours, stock = (build(models[name]).encode(texts, show_progress_bar=False) for name in ("ours", "stock"))
    assert np.allclose(ours, stock, atol=1e-4), "the models' embeddings differ"


def _arguments(precision, folder):
    nothing_else = {"save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True}
    how = {"max_steps": _STEPS, "learning_rate": 1e-5, "bf16": precision == "bf16", "use_cpu": device().type == "cpu"}
    return folder, {"output_dir": str(folder), **how, **nothing_else}


def _sentence_transformer_trainer(model, columns, _, shared):
    encoder = build_sentence_transformer(model, word_tokenizer(), prompts={})
    loss = cached_loss(encoder, matryoshka_dims(model.config.hidden_size), mini_batch_size=_MINI_BATCH)
    arguments = SentenceTransformerTrainingArguments(per_device_train_batch_size=len(columns["query"]), **shared)
    return SentenceTransformerTrainer(encoder, arguments, Dataset.from_dict(columns), loss=loss)


def _our_trainer(model, columns, folder, shared):
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    source = Source("benchmark", [folder / "rows.parquet"], "retrieval", "Retrieve.")
    options = PreparationOptions(max_length=LONGEST, instructions=False, validation_share=0.0)
    tokenizer = word_tokenizer()
    sources = prepare([source], tokenizer, folder / "prepared", options)
    arguments = StageArguments(model="benchmark", global_batch_size=len(columns["query"]), **shared)
    return F2LLMTrainer(model, arguments, sources, tokenizer)
