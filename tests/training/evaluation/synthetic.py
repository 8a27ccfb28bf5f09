"""Evaluations with made-up scores, for the tests of what is drawn and written from them, and files of texts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.evaluation.records import Evaluation, ModelRecord, Score

LANGUAGES = ("deu-Latn", "eng-Latn", "fra-Latn", "rus-Cyrl", "srp-Cyrl", "jpn-Jpan")


def write(path, **columns):
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
    return path


def score(languages=("deu-Latn",), examples=40, **fields):
    return Score(
        **{
            **{"model": "small", "task": "Names", "task_type": "Retrieval", "subset": "-".join(languages)},
            **{"languages": languages, "dimension": 64, "precision": "float32", "metric": "ndcg_at_10"},
            **{"value": 0.5, "examples": examples, **fields},
        }
    )


def evaluation(
    languages=LANGUAGES,
    qualities=None,
    dimensions=(64, 16),
    precisions=("float32", "binary"),
    examples=40,
):
    """Retrieval in every language, bitexts with English and without, and a clustering whose examples have no scores.

    Args:
        qualities: By model, the share of examples that its full width gets right.
    """
    qualities = qualities or {"small": 0.5, "large": 0.8}
    found = Evaluation(failures={"<Broken & task>": "offline"})
    for number, (model, quality) in enumerate(qualities.items()):
        found.models.append(ModelRecord(model, None, 10**6 * 4**number, max(dimensions), 900 / 3**number))
        for dimension in dimensions:
            for precision in precisions:
                loss = 0.02 * (max(dimensions) / dimension - 1) + (0.1 if precision == "binary" else 0)
                options = {"model": model, "dimension": dimension, "precision": precision}
                _add(found, languages, quality - loss, examples, options)
    return found


def _add(found, languages, quality, examples, options):
    # All models, dimensions and precisions find the same examples easy.
    rng = np.random.default_rng(0)
    for language in languages:
        _add_hits(found, score((language,), examples, **options), rng, quality)
    for pair in zip(("eng-Latn", *languages), languages, strict=False):
        if pair[0] != pair[1]:
            bitext = {"task": "Pairs", "task_type": "BitextMining", "metric": "f1", **options}
            _add_hits(found, score(pair, examples, **bitext), rng, quality)
    clustering = {"task": "Groups", "task_type": "Clustering", "metric": "v_measure", "subset": "default", **options}
    found.scores.append(score((), 100, value=0.8 * quality, **clustering))


def _add_hits(found, made, rng, quality):
    hits = (rng.random(made.examples) < quality).astype(np.float32)
    made = Score(**{**made.__dict__, "value": float(hits.mean())})
    found.scores.append(made)
    found.examples[made.key] = hits


def many_languages(count=240):
    """Made-up codes in thirty scripts of different sizes."""
    scripts = "Latn Cyrl Arab Deva Beng Ethi Hebr Thai Hang Jpan Hans Hant Grek Geor Armn Taml Telu Knda Mlym".split()
    scripts += "Gujr Guru Orya Sinh Khmr Laoo Mymr Tibt Tfng Cher Thaa".split()
    weights = np.array([110, 34, 20, 14, *[2] * 26], float)
    places = np.random.default_rng(0).choice(len(scripts), count, p=weights / weights.sum())
    letters = "abcdefghijklmnopqrstuvwxyz"
    return tuple(
        f"{letters[n // 26 % 26]}{letters[n % 26]}q-{scripts[place]}" for n, place in enumerate(places.tolist())
    )
