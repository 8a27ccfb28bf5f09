"""SentenceTransformer.encode at several distributions of lengths, against stock Qwen3 on torch and on OpenVINO.

Both models run in sentence-transformers with the same weights, the same texts and the same batches. All precisions of a
distribution are timed in one round, so that bf16 may be compared with fp32.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from modeling_f2llm import build_sentence_transformer
from tests.benchmarks.common import DISTRIBUTIONS, PRECISIONS, build_models, lowest_cosine, word_tokenizer, write_texts
from tests.benchmarks.openvino_backend import OpenVINO
from tests.benchmarks.timing import Contestant


def run(settings, suite):
    """Time encoding by every model in every precision."""
    count = settings.pick(quick=8, cpu=96, cuda=4096)
    batch = settings.pick(quick=4, cpu=32, cuda=128)
    # No prompts: a prompt's words would be no words of this tokenizer.
    encoders = {
        f"{name}_{precision}": build_sentence_transformer(model.eval(), word_tokenizer(), prompts={})
        for precision in settings.precisions
        for name, model in build_models(settings, PRECISIONS[precision], compile=settings.compile).items()
    }
    ours = [("ours", precision) for precision in settings.precisions]
    ours += [("ours_compiled", precision) for precision in settings.precisions]
    pairs = [(f"{base}_{each}", f"{name}_{each}") for name, each in ours for base in ("stock", "openvino")]
    pairs += [("stock_fp32", f"{name}_bf16") for name, each in ours if each == "bf16"]
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
            known = {"batch_size": batch, "show_progress_bar": False, "convert_to_numpy": True}
            contestants = {
                who: Contestant.compiled(partial(model.encode, texts, **known), "compiled" in who)
                for who, model in encoders.items()
            }
            check = _check
            if openvino:
                contestants |= openvino.contestants(texts, batch, settings.precisions)
                check = openvino.check(_check)
            facts = {
                "documents": count,
                "batch": batch,
                "real_tokens": int(lengths.sum()),
                "longest": int(lengths.max()),
            }
            suite.compare(f"encode, {name}", contestants, settings.repeats, pairs, check=check, facts=facts)


def _check(embeddings):
    reference_name, reference = next(iter(embeddings.items()))
    for name, found in embeddings.items():
        lowest = lowest_cosine(found, reference)
        least = 0.9999 if name.endswith("fp32") and reference_name.endswith("fp32") else 0.99
        assert lowest >= least, f"embeddings of {name} and {reference_name} differ: smallest cosine {lowest}"
