"""Pairs to be found: how often the nearest of all candidates to a query is one of its passages."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from training.common.errors import UserError
from training.common.languages import usual_script
from training.data.cleaning.normalise import normalise
from training.evaluation.text_file import read_texts

# Places of a ranking that its nDCG looks at.
CUTOFF = 10


@dataclass(frozen=True)
class Pairs:
    """Queries and the passages to be found.

    Attributes:
        queries: ``n`` texts, each once in a language and script.
        candidates: Distinct texts among which the passages are.
        relevant: ``n`` tuples of positions among the candidates, ascending: the passages of each query, all of which
            are right.
        languages: ``n`` language codes; None where they are not known.
        scripts: ``n`` ISO 15924 codes; None where they are not known.
    """

    queries: list[str]
    candidates: list[str]
    relevant: list[tuple[int, ...]]
    languages: list[str] | None = None
    scripts: list[str] | None = None

    def hits(self, places: np.ndarray) -> np.ndarray:
        """``(n,)`` whether each query's place is that of one of its passages.

        Args:
            places: ``(n,)`` positions among the candidates.
        """
        return np.fromiter(
            (place in own for place, own in zip(places.tolist(), self.relevant, strict=True)), bool, len(self.relevant)
        )


def load_pairs(pairs: Path | str, candidates: Path | str | None = None) -> Pairs:
    """Reads pairs (columns ``query`` and ``passage``, also ``lang`` and ``script``) and candidates (``passage``).

    A query is given to the model as a text alone, so that all passages that rows with this text have are right,
    whatever the languages of these rows, and so are candidates that differ from them in form only
    (:func:`~training.data.cleaning.normalise.normalise`). Without a file of candidates, the distinct passages of the
    pairs are the candidates. Without scripts, each language has its usual one.

    Raises:
        UserError: If a file cannot be read, lacks a column, or a passage is not among the candidates.
    """
    columns = read_texts(pairs, ["query", "passage"], ["lang", "script"])
    texts = list(
        dict.fromkeys(columns["passage"] if candidates is None else read_texts(candidates, ["passage"])["passage"])
    )
    places, right = defaultdict(list), defaultdict(set)
    for place, text in enumerate(texts):
        places[normalise(text)].append(place)
    for row, (query, passage) in enumerate(zip(columns["query"], columns["passage"], strict=True)):
        found = places.get(normalise(passage))
        if found is None:
            raise UserError(
                f"{pairs}: row {row}, column 'passage' is not among the candidates; add it to {candidates} "
                "or drop the row"
            )
        right[query].update(found)
    languages, scripts = columns.get("lang"), columns.get("script")
    if scripts is None and languages is not None:
        scripts = [usual_script(language) for language in languages]
    told = [each for each in (columns["query"], languages, scripts) if each is not None]
    first = {key: row for row, key in reversed(list(enumerate(zip(*told, strict=True))))}
    rows = sorted(first.values())
    return Pairs(
        queries=[columns["query"][row] for row in rows],
        candidates=texts,
        relevant=[tuple(sorted(right[columns["query"][row]])) for row in rows],
        languages=languages and [languages[row] for row in rows],
        scripts=scripts and [scripts[row] for row in rows],
    )


def nearest(queries: torch.Tensor, candidates: torch.Tensor, dim: int, rows_per_block: int = 4096) -> np.ndarray:
    """``(n,)`` position of each query's nearest candidate by cosine of the leading ``dim`` dimensions.

    Args:
        queries: ``(n, d)`` embeddings.
        candidates: ``(m, d)`` embeddings.
        dim: Leading dimensions used.
        rows_per_block: Queries compared at a time.
    """
    candidates = torch.nn.functional.normalize(candidates[:, :dim], dim=-1)
    return torch.cat([(block[:, :dim] @ candidates.T).argmax(dim=1) for block in queries.split(rows_per_block)]).numpy()


def passage_ranks(
    queries: torch.Tensor, candidates: torch.Tensor, places: np.ndarray, dim: int, rows_per_block: int = 4096
) -> np.ndarray:
    """``(n,)`` rank of one candidate for each query by cosine of the leading ``dim`` dimensions, 1 for the nearest.

    Of candidates that are equally near the first comes first, so rank 1 is what :func:`nearest` finds.

    Args:
        queries: ``(n, d)`` embeddings.
        candidates: ``(m, d)`` embeddings.
        places: ``(n,)`` positions of the passages among the candidates.
        dim: Leading dimensions used.
        rows_per_block: Queries compared at a time.
    """
    candidates = torch.nn.functional.normalize(candidates[:, :dim], dim=-1)
    positions, ranks = torch.arange(len(candidates)), []
    passages = torch.from_numpy(places).split(rows_per_block)
    for block, own in zip(queries.split(rows_per_block), passages, strict=True):
        scores = block[:, :dim] @ candidates.T
        score = scores.gather(1, own[:, None])
        ahead = (scores > score) | ((scores == score) & (positions < own[:, None]))
        ranks.append(ahead.sum(dim=1) + 1)
    return torch.cat(ranks).numpy()


def ranking_scores(queries: torch.Tensor, candidates: torch.Tensor, pairs: Pairs, dim: int) -> tuple[float, float]:
    """Accuracy@1 and nDCG@10 by cosine of the leading ``dim`` dimensions.

    All passages of a query have the gain 1; what they could add up to at most is an nDCG of 1 (Järvelin and Kekäläinen,
    Cumulated gain-based evaluation of IR techniques, 2002).

    Args:
        queries: ``(n, d)`` embeddings.
        candidates: ``(m, d)`` embeddings.
        pairs: The pairs.
        dim: Leading dimensions used.
    """
    counts = np.array([len(own) for own in pairs.relevant])
    owner, places = np.repeat(np.arange(len(counts)), counts), np.concatenate(pairs.relevant)
    # A query stands once for each of its passages; their ranks differ, even where they are equally near.
    ranks = passage_ranks(queries[owner], candidates, places, dim)
    gains = np.bincount(owner, np.where(ranks <= CUTOFF, 1 / np.log2(ranks + 1), 0.0))
    most = np.cumsum(1 / np.log2(np.arange(CUTOFF) + 2))[np.minimum(counts, CUTOFF) - 1]
    return float(np.bincount(owner, ranks == 1).mean()), float((gains / most).mean())


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs as a model sees them.

    Attributes:
        pairs: The texts.
        queries: ``(n, d)`` embeddings.
        candidates: ``(m, d)`` embeddings.
        texts_per_second: How fast they were encoded.
    """

    pairs: Pairs
    queries: torch.Tensor
    candidates: torch.Tensor
    texts_per_second: float


def encode_pairs(model: SentenceTransformer, pairs: Pairs) -> EncodedPairs:
    """Encodes every text once; queries get the model's query prompt."""
    options = {"convert_to_tensor": True, "show_progress_bar": False, "batch_size": 256}
    started = time.perf_counter()
    queries = model.encode_query(pairs.queries, **options).float().cpu()
    candidates = model.encode_document(pairs.candidates, **options).float().cpu()
    rate = (len(queries) + len(candidates)) / (time.perf_counter() - started)
    return EncodedPairs(pairs, queries, candidates, rate)


def evaluate_pairs(encoded: EncodedPairs, baseline: np.ndarray, dims: Sequence[int]) -> dict[str, Any]:
    """Scores each width, beside a baseline on the same pairs.

    Args:
        encoded: Pairs and their embeddings.
        baseline: ``(n,)`` whether the baseline (character n-gram TF-IDF) found a passage of each query.
        dims: Widths, widest first.

    Returns:
        ``accuracy`` by width, ``tfidf``, ``languages`` and ``scripts`` (with their numbers of queries and TF-IDF's
        score) at the full width, empty where they are not known, and ``pairs``, the number of queries. Accuracies lie
        between 0 and 1.
    """
    pairs = encoded.pairs
    found = {dim: pairs.hits(nearest(encoded.queries, encoded.candidates, dim)) for dim in dims}
    full = found[max(dims)]
    return {
        "accuracy": {str(dim): round(float(correct.mean()), 4) for dim, correct in found.items()},
        "tfidf": round(float(baseline.mean()), 4),
        "languages": {name: group["accuracy"] for name, group in _groups(pairs.languages, full, baseline).items()},
        "scripts": _groups(pairs.scripts, full, baseline),
        "pairs": len(pairs.queries),
    }


def _groups(names: Sequence[str] | None, correct: np.ndarray, baseline: np.ndarray) -> dict[str, dict[str, float]]:
    groups = {}
    for name in sorted(set(names or ())):
        of_group = np.asarray(names) == name
        groups[name] = {
            "pairs": int(of_group.sum()),
            "accuracy": round(float(correct[of_group].mean()), 4),
            "tfidf": round(float(baseline[of_group].mean()), 4),
        }
    return groups
