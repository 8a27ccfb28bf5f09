"""A packed folder as far as cards read it: a record of three stages, scores of three models, losses of two stages."""

from __future__ import annotations

import json

import numpy as np

from training.evaluation.records import PRECISIONS, Evaluation, ModelRecord, Score
from training.publishing.evaluation import LOSSES
from training.publishing.record import RECORD, ModelRelease, Reference, SourceRecord, StageRecord

NAME = "tiny-embedder"
# What each language finds at full width, of ten texts.
FOUND = {"deu-Latn": 8, "fin-Latn": 6, "rus-Cyrl": 5, "jpn-Jpan": 2}
WIDTHS = (32, 16, 8)


def make_release(rename=str, **changes):
    """The record of a model that was pruned from a first stage; ``rename`` changes each text that comes from data."""
    first = SourceRecord(rename("names"), "retrieval", ("deu", "fin", "rus"), 900, 9, rename("Find it."), rename("MIT"))
    second = SourceRecord(rename("kinds"), "clustering", ("jpn", "mul"), 100, 1, None, None, "org/kinds")
    trained = {
        **{"learning_rate": 1e-5, "lr_scheduler_type": rename("cosine"), "global_batch_size": 512},
        **{"num_hard_negatives_retrieval": 7, "num_hard_negatives_clustering": 9, "temperature": 0.05},
        **{"matryoshka": True, "max_length": 64, "seed": 0},
    }
    pruning = {"prune_to": {"hidden_size": 32}, "prune_hidden": "published", "calibration_texts": 50}
    start, stage1 = Reference("hub", "org/base", "0123456789abcdef"), Reference("stage", rename("stage1"))
    stages = (
        StageRecord(
            *(rename("stage1"), "training", start, None, 90_000, ("learning_rate", "model_config")),
            *({**trained, "model_config": rename("wide"), "instructions": False}, (first,)),
            *(20, 1.0, {"train_loss": 2.5, "eval_loss": 1.25}),
        ),
        StageRecord(rename("pruned"), "pruning", stage1, parameters=21_000, arguments=pruning, sources=(first,)),
        StageRecord(
            *(rename("student"), "training", Reference("stage", rename("pruned"))),
            *(Reference("local", rename("teacher")), 21_000, ("learning_rate",)),
            *({**trained, "instructions": True, "distillation_weight": 1.0}, (first, second)),
            *(10, 0.5, {"train_loss": 3.5, "eval_loss": 0.75}),
        ),
    )
    fields = {
        **{"name": NAME, "licence": "apache-2.0", "parameters": 21_000, "dtype": "bfloat16", "dimension": 32},
        **{"dimensions": WIDTHS, "max_length": 512, "trained_dtype": "float32"},
        "shape": {
            **{"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64},
            **{"num_attention_heads": 4, "num_key_value_heads": 2},
        },
        "prompts": {"query": f"Instruct: {rename('Find it.')}\nQuery: ", "document": ""},
        "languages": ("deu", "fin", "jpn", "mul", "rus", "swa"),
        "stages": stages,
        "versions": {"transformers": rename("5.23.0")},
        "language_rows": {"deu": 500, "fin": 495, "rus": 4, "jpn": 1},
    }
    return ModelRelease(**{**fields, **changes})


def evaluate(name=NAME, rename=str):
    """Scores of the model at three widths and precisions, and of a larger model and a baseline beside it."""
    evaluation, large = Evaluation(), rename("large")
    evaluation.add_model(ModelRecord(name, parameters=21_000, dimension=32, texts_per_second=900.0))
    evaluation.add_model(ModelRecord(large, parameters=90_000, dimension=64, texts_per_second=300.0))
    evaluation.add_model(ModelRecord("TF-IDF"))
    # Model, width, precision, and of how many texts more than FOUND says the passage is not found.
    views = [(large, 64, "float32", -1), ("TF-IDF", 0, "float32", 1)]
    for number, precision in enumerate(PRECISIONS):
        views += [(name, width, precision, (32 - width) // 8 + number) for width in WIDTHS]
    for model, width, precision, lost in views:
        examples = {}
        for language, found in FOUND.items():
            hits = np.arange(10) < max(found - lost, 0)
            task = (rename("Names"), "Retrieval", language, (language,))
            score = Score(model, *task, width, precision, rename("accuracy_at_1"), float(hits.mean()), 10)
            examples[score] = hits.astype(np.float32)
        evaluation.put([*examples], {score.key: values for score, values in examples.items()})
    return evaluation


def write_release(folder, release=None, evaluation=None, losses=True):
    """Write what a card reads of a packed folder."""
    folder.mkdir(parents=True, exist_ok=True)
    release = release or make_release()
    (folder / RECORD).write_text(release.to_json())
    if evaluation is not None:
        evaluation.save(folder / "evaluation")
    if losses:
        curves = {"training": [[1, 4.0], [10, 2.0]], "validation": [[10, 1.0]]}
        trained = (stage for stage in release.stages if stage.steps)
        of_stages = {stage.name: {source.name: curves for source in stage.sources} for stage in trained}
        (folder / LOSSES).parent.mkdir(exist_ok=True)
        (folder / LOSSES).write_text(json.dumps(of_stages))
    return folder
