"""Evaluating every width and precision beside one: all views share one encoding, so mteb's scoring is what adds up.

Real mteb task classes over a file of pairs in several languages, by the code behind ``training/evaluate.py``.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mteb.models import ModelMeta

from modeling_f2llm import build_sentence_transformer, matryoshka_dims
from tests.benchmarks.common import DISTRIBUTIONS, build_models, word_tokenizer, write_texts
from tests.benchmarks.timing import Contestant
from training.evaluation.encoding import EmbeddingStore
from training.evaluation.local_tasks import pair_tasks
from training.evaluation.models import EvaluatedModel, Prompts
from training.evaluation.records import Evaluation, ModelRecord
from training.evaluation.runner import evaluate_model

_LANGUAGES = ("deu", "fra", "rus", "jpn", "hin", "arb", "tha", "kor")
_PRECISIONS = ("float32", "int8", "binary")


def run(settings, suite):
    """Time all views beside the one of full width in float32."""
    pairs = settings.pick(quick=16, cpu=400, cuda=4000)
    model = build_models(settings)["ours"].eval()
    encoder = build_sentence_transformer(model, word_tokenizer(), prompts={})
    dims = list(matryoshka_dims(model.config.hidden_size))
    lengths = DISTRIBUTIONS["log_normal"](pairs)
    table = {
        "query": write_texts(np.maximum(lengths // 5, 4), seed=1),
        "passage": write_texts(lengths, seed=2),
        "lang": [_LANGUAGES[row % len(_LANGUAGES)] for row in range(pairs)],
        "script": ["Zyyy"] * pairs,
    }
    with TemporaryDirectory() as folder:
        pq.write_table(pa.table(table), Path(folder) / "pairs.parquet")
        tasks = pair_tasks(Path(folder) / "pairs.parquet", "Pairs")

        def evaluate(**views):
            """Evaluate from nothing: texts are encoded, and nothing is found in a cache."""
            evaluation = Evaluation()
            meta = ModelMeta.create_empty({"name": "benchmark/model", "revision": "none"})
            model = EvaluatedModel(ModelRecord("model"), EmbeddingStore(encoder), meta, Prompts())
            with TemporaryDirectory() as output:
                evaluate_model(model, tasks, evaluation, Path(output), **views)
            assert not evaluation.failures, evaluation.failures
            return evaluation

        contestants = {
            "one": Contestant(lambda: evaluate(dims=dims[:1], precisions=_PRECISIONS[:1])),
            "all": Contestant(lambda: evaluate(dims=dims, precisions=_PRECISIONS)),
        }
        facts = {"pairs": pairs, "widths": len(dims), "precisions": len(_PRECISIONS)}
        ratio = [("all", "one", "time of all over the time of one")]
        known = {"precision": "fp32", "check": _check, "facts": facts}
        suite.compare("evaluation of all views", contestants, settings.repeats, ratio, **known)


def _check(evaluations):
    """The view that both have scores the same."""
    found = {score.key: score.value for score in evaluations["all"].scores}
    for score in evaluations["one"].scores:
        assert abs(found[score.key] - score.value) < 1e-6, f"{score.key}: {score.value} against {found[score.key]}"
