"""Accuracy@1 on pairs: how often the nearest of all candidates to a query is its passage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer

from training.errors import UserError

__all__ = [
    "EncodedPairs",
    "Pairs",
    "encode_pairs",
    "evaluate_pairs",
    "load_pairs",
    "nearest",
    "passage_ranks",
    "read_texts",
]


@dataclass(frozen=True)
class Pairs:
    """Queries and the passages to be found.

    Attributes:
        queries: ``n`` texts.
        candidates: Distinct texts among which the passages are.
        labels: ``(n,)`` position of each query's passage among the candidates.
        languages: ``n`` language codes.
        scripts: ``n`` ISO 15924 codes.
    """

    queries: list[str]
    candidates: list[str]
    labels: np.ndarray
    languages: list[str]
    scripts: list[str]


def load_pairs(pairs: Path | str, candidates: Path | str | None = None) -> Pairs:
    """Reads pairs (columns ``query``, ``passage``, ``lang``, ``script``) and candidates (column ``passage``).

    Without a file of candidates, the distinct passages of the pairs are the candidates.

    Raises:
        UserError: If a file cannot be read, lacks a column, or a passage is not among the candidates.
    """
    columns = read_texts(pairs, ["query", "passage", "lang", "script"])
    distinct = dict.fromkeys(
        columns["passage"] if candidates is None else read_texts(candidates, ["passage"])["passage"]
    )
    position = {text: i for i, text in enumerate(distinct)}
    for row, passage in enumerate(columns["passage"]):
        if passage not in position:
            raise UserError(f"{pairs}: row {row}, column 'passage' is not among the candidates of {candidates}")
    labels = np.array([position[passage] for passage in columns["passage"]])
    return Pairs(columns["query"], list(distinct), labels, columns["lang"], columns["script"])


def read_texts(path: Path | str, columns: Sequence[str], optional: Sequence[str] = ()) -> dict[str, list[str]]:
    """Reads columns of texts from a parquet file.

    Args:
        path: The file.
        columns: What it must have.
        optional: What is read too if it is there.

    Raises:
        UserError: If the file cannot be read, lacks a column, has no rows, or a cell holds no text.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file ({' '.join(str(error).split())[:200]})") from None
    for name in columns:
        if name not in table.column_names:
            raise UserError(f"{path}: column {name!r} is missing; it has {', '.join(table.column_names)}")
    if not table.num_rows:
        raise UserError(f"{path}: the file has no rows; rebuild it")
    there = [name for name in optional if name in table.column_names and name not in columns]
    result = table.select([*columns, *there]).to_pydict()
    for name, values in result.items():
        for row, value in enumerate(values):
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{path}: row {row}, column {name!r} is no text; correct or drop the row")
    return result


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
    queries: torch.Tensor, candidates: torch.Tensor, labels: np.ndarray, dim: int, rows_per_block: int = 4096
) -> np.ndarray:
    """``(n,)`` rank of each query's passage by cosine of the leading ``dim`` dimensions, 1 for the nearest.

    Of candidates that are equally near the first comes first, so rank 1 is what :func:`nearest` finds.

    Args:
        queries: ``(n, d)`` embeddings.
        candidates: ``(m, d)`` embeddings.
        labels: ``(n,)`` positions of the passages among the candidates.
        dim: Leading dimensions used.
        rows_per_block: Queries compared at a time.
    """
    candidates = torch.nn.functional.normalize(candidates[:, :dim], dim=-1)
    positions, ranks = torch.arange(len(candidates)), []
    passages = torch.from_numpy(labels).split(rows_per_block)
    for block, own in zip(queries.split(rows_per_block), passages, strict=True):
        scores = block[:, :dim] @ candidates.T
        score = scores.gather(1, own[:, None])
        ahead = (scores > score) | ((scores == score) & (positions < own[:, None]))
        ranks.append(ahead.sum(dim=1) + 1)
    return torch.cat(ranks).numpy()


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
        baseline: ``(n,)`` whether the baseline (character n-gram TF-IDF) found each query's passage.
        dims: Widths, widest first.

    Returns:
        ``accuracy`` by width, ``tfidf``, ``languages`` and ``scripts`` (with their numbers of pairs and TF-IDF's
        score) at the full width, and ``pairs``, their number. Accuracies lie between 0 and 1.
    """
    pairs = encoded.pairs
    found = {dim: nearest(encoded.queries, encoded.candidates, dim) == pairs.labels for dim in dims}
    full = found[max(dims)]
    return {
        "accuracy": {str(dim): round(float(correct.mean()), 4) for dim, correct in found.items()},
        "tfidf": round(float(baseline.mean()), 4),
        "languages": {name: group["accuracy"] for name, group in _groups(pairs.languages, full, baseline).items()},
        "scripts": _groups(pairs.scripts, full, baseline),
        "pairs": len(pairs.queries),
    }


def _groups(names: Sequence[str], correct: np.ndarray, baseline: np.ndarray) -> dict[str, dict[str, float]]:
    names = np.asarray(names)
    groups = {}
    for name in sorted(set(names.tolist())):
        of_group = names == name
        groups[name] = {
            "pairs": int(of_group.sum()),
            "accuracy": round(float(correct[of_group].mean()), 4),
            "tfidf": round(float(baseline[of_group].mean()), 4),
        }
    return groups
