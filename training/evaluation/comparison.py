"""A model before and after fine-tuning: scores on held-out queries and elsewhere, at every width, with paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize as unit

from training.common.errors import UserError
from training.common.keyed import keyed_bits, text_key
from training.data.published import columns_of
from training.evaluation.significance import LEVEL, Interval, PairedTest, paired_test

# Ranks that nDCG and recall look at.
CUTOFF = 10
ACCURACY, NDCG, RECALL, SPEARMAN = "accuracy@1", f"nDCG@{CUTOFF}", f"recall@{CUTOFF}", "Spearman"
# The parts of an answer.
YOURS, ELSEWHERE = "your data", "elsewhere"
_SAMPLE = 61
# Queries compared with all candidates at once; resamples of a correlation.
_BLOCK, _RESAMPLES = 512, 1000

Floats = NDArray[np.float64]
# (n,) values of the examples, by metric and width; of a correlation the cosines.
Scores = dict[tuple[str, int], Floats]


@dataclass(frozen=True)
class HeldOut:
    """Held-out queries of one source, and the texts among which their passages are found.

    Of graded pairs, ``grades`` has the ``(n,)`` scores of queries and the candidates in the same order; of all others,
    ``gains`` has for each query what its passages are worth, by their positions among the candidates.
    """

    name: str
    queries: list[str]
    candidates: list[str]
    gains: list[dict[int, float]]
    grades: Floats | None = None
    symmetric: bool = False  # candidates are encoded as queries are

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the scores, the most telling one first."""
        return (NDCG, ACCURACY, RECALL) if self.grades is None else (SPEARMAN,)

    def __str__(self) -> str:
        if self.grades is not None:
            return f"{self.name}: {len(self.queries):,} graded pairs"
        return f"{self.name}: {len(self.queries):,} queries, {len(self.candidates):,} candidates"


def read_held_out(name: str, queries: Path, candidates: Path, most: int, seed: int) -> HeldOut:
    """Read files of a build: ``query`` with ``passage`` (and ``score``) or ``label``; ``passage`` (and ``label``).

    A keyed sample of at most ``most`` queries is taken. Without candidates, the pairs are graded.
    """
    own = pd.DataFrame(columns_of(pq.read_table(queries)))
    distinct = pd.unique(own["query"])
    if len(distinct) > most:
        draws = keyed_bits(seed, _SAMPLE, np.array([text_key(text) for text in distinct], dtype=np.uint64))
        own = own[own["query"].isin({*distinct[np.argsort(draws, kind="stable")[:most]]})]
    if not candidates.exists():
        grades = own["score"].to_numpy(np.float64)
        return HeldOut(name, own["query"].tolist(), own["passage"].tolist(), [], grades, symmetric=True)
    among = pd.DataFrame(columns_of(pq.read_table(candidates)))
    texts = among["passage"].tolist()
    if "label" in own:
        of_label = {label: dict.fromkeys(map(int, rows), 1.0) for label, rows in among.groupby("label").indices.items()}
        own = own[own["label"].isin(of_label.keys())]
        gains = [of_label[label] for label in own["label"]]
        return HeldOut(name, own["query"].tolist(), texts, gains, symmetric=True)
    position = {text: number for number, text in enumerate(texts)}
    own = own if "score" in own else own.assign(score=np.nan)
    gains = own.assign(position=own["passage"].map(position)).groupby("query", sort=False)
    found = {query: dict(zip(rows["position"], rows["score"].fillna(1.0), strict=True)) for query, rows in gains}
    # Where grades are no gains, as scores of a teacher may be negative, every passage counts the same.
    right = [row if min(row.values()) > 0 else dict.fromkeys(row, 1.0) for row in found.values()]
    return HeldOut(name, [*found], texts, right)


def score(model: SentenceTransformer, held_out: HeldOut, dims: Sequence[int]) -> Scores:
    """Score every example at some widths."""
    encode = model.encode_query if held_out.symmetric else model.encode_document
    options = {"convert_to_tensor": True, "show_progress_bar": False}
    queries = model.encode_query(held_out.queries, **options).float().cpu()
    candidates = encode(held_out.candidates, **options).float().cpu()
    if not (queries.isfinite().all() and candidates.isfinite().all()):
        raise UserError(f"{held_out.name}: embeddings are not finite; if training diverged, lower 'learning_rate'")
    position = {text: number for number, text in enumerate(held_out.candidates)}
    themselves = [position.get(query) for query in held_out.queries]
    scores: Scores = {}
    for dim in dims:
        ours, theirs = unit(queries[:, :dim], dim=-1), unit(candidates[:, :dim], dim=-1)
        if held_out.grades is not None:
            scores[SPEARMAN, dim] = (ours * theirs).sum(-1).double().numpy()
            continue
        blocks = []
        for start in range(0, len(ours), _BLOCK):
            rows = slice(start, start + _BLOCK)
            similarities, gains = ours[rows] @ theirs.T, held_out.gains[rows]
            # Nothing is nearer to a query than its own text, which is no answer unless it is said to be one.
            for row, own in enumerate(themselves[rows]):
                if own is not None and own not in gains[row]:
                    similarities[row, own] = -torch.inf
            blocks.append(_ranked(similarities, gains))
        values = np.concatenate(blocks)
        scores |= {(metric, dim): values[:, number] for number, metric in enumerate(held_out.metrics)}
    return scores


def _ranked(similarities: torch.Tensor, gains: Sequence[Mapping[int, float]]) -> Floats:
    """``(n, m)`` similarities → ``(n, 3)``: nDCG and accuracy of the first candidate, and recall.

    The gain of a passage is its grade (Järvelin and Kekäläinen, 2002). Recall is the share of the passages, or of
    ``CUTOFF`` if there are more, among the first ``CUTOFF``.
    """
    nearest = similarities.topk(min(CUTOFF, similarities.shape[1]), dim=1).indices.tolist()
    discounts = 1 / np.log2(np.arange(2, CUTOFF + 2))
    values = []
    for found, right in zip(nearest, gains, strict=True):
        hits = np.array([right.get(position, 0.0) for position in found])
        ideal = np.sort(np.fromiter(right.values(), np.float64))[::-1][:CUTOFF]
        gained = hits @ discounts[: len(hits)] / (ideal @ discounts[: len(ideal)])
        values.append((gained, hits[0] > 0, np.count_nonzero(hits) / min(CUTOFF, len(right))))
    return np.array(values, dtype=np.float64)


def compare(held_out: Sequence[HeldOut], before: Sequence[Scores], after: Sequence[Scores], key: Any) -> PairedTest:
    """Test the difference of a metric and width over some sets: the mean of their means."""
    if held_out[0].grades is None:
        return paired_test([scores[key] for scores in after], [scores[key] for scores in before])
    grades = [each.grades for each in held_out]
    return _correlations(grades, [scores[key] for scores in after], [scores[key] for scores in before])


def _correlations(grades: Sequence[Floats], after: Sequence[Floats], before: Sequence[Floats]) -> PairedTest:
    """Compare Spearman's correlations by the percentile bootstrap over pairs (Efron and Tibshirani, 1993)."""
    rng = np.random.default_rng(0)

    def mean(scores: Sequence[Floats], rows: Sequence[Any]) -> float:
        sets = zip(scores, grades, rows, strict=True)
        return float(np.mean([_spearman(values[own], grade[own]) for values, grade, own in sets]))

    sampled = ([rng.integers(len(grade), size=len(grade)) for grade in grades] for _ in range(_RESAMPLES))
    draws = np.array([mean(after, rows) - mean(before, rows) for rows in sampled])
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    p_value = min(1.0, 2 * min(np.mean(draws <= 0), np.mean(draws >= 0)))
    first, second = (mean(scores, [slice(None)] * len(grades)) for scores in (after, before))
    interval = Interval(first - second, float(low), float(high), sum(map(len, grades)))
    return PairedTest(first, second, interval, float(p_value))


def _spearman(one: Floats, other: Floats) -> float:
    ranks = rankdata(one), rankdata(other)
    # Of equal values there is no correlation.
    return float(np.corrcoef(*ranks)[0, 1]) if all(np.ptp(each) for each in ranks) else 0.0


@dataclass(frozen=True)
class Part:
    """Sets that are reported together, with the scores of both models on each."""

    name: str
    sets: list[HeldOut]
    before: list[Scores]
    after: list[Scores]

    def test(self, metric: str, dim: int) -> PairedTest:
        """Compare both models by a metric at a width."""
        return compare(self.sets, self.before, self.after, (metric, dim))


def summary(parts: Sequence[Part], dims: Sequence[int]) -> dict[str, Any]:
    """Return what both models reach, in points: by part, metric and width."""
    return {
        part.name: {
            metric: {str(dim): _points(part.test(metric, dim)) for dim in dims} for metric in part.sets[0].metrics
        }
        for part in parts
    }


def _points(test: PairedTest) -> dict[str, Any]:
    values = {"before": test.second, "after": test.first, "difference": test.difference.mean}
    values |= {"low": test.difference.low, "high": test.difference.high}
    points = {name: round(100 * value, 2) for name, value in values.items()}
    return points | {"p": round(test.p_value, 4), "examples": test.difference.examples}


def table(result: Mapping[str, Any]) -> str:
    """Format three lines, before, after and the difference with its interval, then the first metric by width."""
    columns, by_width = {}, {}
    for part, metrics in result.items():
        for number, (metric, widths) in enumerate(metrics.items()):
            full = widths[max(widths, key=int)]
            difference = f"{full['difference']:+.1f} ({full['low']:.1f} to {full['high']:.1f})"
            columns[part, metric] = [f"{full['before']:.1f}", f"{full['after']:.1f}", difference]
            for name in ("before", "after") if not number else ():
                by_width[f"{part}, {metric}", name] = {dim: f"{each[name]:.1f}" for dim, each in widths.items()}
    rows = ["before", "after", "difference"]
    return "\n\n".join((pd.DataFrame(columns, index=rows).to_string(), pd.DataFrame(by_width).to_string()))


def sentence(result: Mapping[str, Any]) -> str:
    """Return the answer in words: by the first metric of each part, at full width."""
    words = []
    for part, metrics in result.items():
        widths = next(iter(metrics.values()))
        full = widths[max(widths, key=int)]
        where = part if part.startswith(ELSEWHERE) else f"on {part}"
        change, low, high = (full[name] for name in ("difference", "low", "high"))
        if full["p"] > 1 - LEVEL:
            words.append(f"{where} {change:+.1f} points ({low:.1f} to {high:.1f}), which is not significant")
        else:
            # An interval may reach beyond zero all the same.
            how, low, high = ("better", low, high) if change > 0 else ("worse", -high, -low)
            words.append(f"{how} {where} by {abs(change):.1f} points ({low:.1f} to {high:.1f})")
    return "; ".join(words)
