"""SentenceTransformer.encode at several distributions of lengths, against stock Qwen3 on torch and on OpenVINO.

Both models run in sentence-transformers with the same weights, the same texts and the same batches. All precisions of a
distribution are timed in one round, so that bf16 may be compared with fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from modeling_f2llm import build_sentence_transformer
from tests.benchmarks.machine import PRECISIONS, Settings
from tests.benchmarks.models import build_models, configuration
from tests.benchmarks.openvino_backend import OpenVINO
from tests.benchmarks.texts import DISTRIBUTIONS, word_tokenizer, write_texts
from tests.benchmarks.timing import Contestant, Suite, add_ratio, measure


def run(settings: Settings, suite: Suite) -> None:
    """Time encoding by every model in every precision."""
    count = settings.pick(quick=8, cpu=96, cuda=4096)
    batch = settings.pick(quick=4, cpu=32, cuda=128)
    suite.notes.append(f"{count} documents in batches of {batch}; weights in the precision named.")
    encoders = _sentence_transformers(settings)
    with ExitStack() as stack:
        openvino = None
        if settings.openvino_python:
            stock = encoders[f"stock_{settings.precisions[0]}"]
            openvino = stack.enter_context(OpenVINO(settings.openvino_python, stock))
            suite.notes.append(
                f"OpenVINO: {openvino.versions()}; its precision is asked for by INFERENCE_PRECISION_HINT."
            )
        else:
            suite.skip("OpenVINO backend of sentence-transformers", "no --openvino-python was given")
        for name in settings.distributions or list(DISTRIBUTIONS)[: settings.pick(quick=2, cpu=None, cuda=None)]:
            lengths = DISTRIBUTIONS[name](count)
            texts = write_texts(lengths)
            contestants = {
                who: Contestant(_encode(model, texts, batch), 2 if "compiled" in who else 1, optional="compiled" in who)
                for who, model in encoders.items()
            }
            check = _check
            if openvino:
                contestants |= openvino.contestants(texts, batch, settings.precisions)
                check = openvino.check(_check)
            facts = {"documents": count, "real_tokens": int(lengths.sum()), "longest": int(lengths.max())}
            measurement = measure(f"encode, {name}", contestants, settings.repeats, check=check, facts=facts)
            _add_ratios(measurement, settings.precisions)
            suite.add(measurement)


def _sentence_transformers(settings: Settings) -> dict[str, Any]:
    """Return SentenceTransformers by model and precision: ``stock_fp32`` and so on."""
    # No prompts: a prompt's words would be no words of this tokenizer.
    return {
        f"{name}_{precision}": build_sentence_transformer(model.eval(), word_tokenizer(), prompts={})
        for precision in settings.precisions
        for name, model in build_models(configuration(settings), PRECISIONS[precision], settings.compile).items()
    }


def _encode(model: Any, texts: list[str], batch: int) -> Callable[[], np.ndarray]:
    return lambda: model.encode(texts, batch_size=batch, show_progress_bar=False, convert_to_numpy=True)


def _check(embeddings: dict[str, np.ndarray]) -> None:
    """All embeddings have unit length: their dot product with the first contestant's is their cosine."""
    reference_name, reference = next(iter(embeddings.items()))
    for name, found in embeddings.items():
        lowest = float((reference.astype(np.float32) * found.astype(np.float32)).sum(1).min())
        least = 0.9999 if name.endswith("fp32") and reference_name.endswith("fp32") else 0.99
        assert lowest >= least, f"embeddings of {name} and {reference_name} differ: smallest cosine {lowest}"


def _add_ratios(measurement: dict[str, Any], precisions: tuple[str, ...]) -> None:
    for precision in precisions:
        for name in ("ours", "ours_compiled"):
            add_ratio(measurement, f"stock_{precision}", f"{name}_{precision}")
            add_ratio(measurement, f"openvino_{precision}", f"{name}_{precision}")
    for name in ("ours_bf16", "ours_compiled_bf16"):
        add_ratio(measurement, "stock_fp32", name)
