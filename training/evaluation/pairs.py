"""Accuracy@1 on pairs: how often the nearest of all candidates to a query is its passage."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer

from training.arguments import StageArguments
from training.checkpoints import write_whole
from training.errors import UserError
from training.evaluation.tfidf import nearest_by_tfidf

__all__ = ["Pairs", "evaluate_and_report", "evaluate_pairs", "load_pairs", "nearest", "passage_ranks", "read_texts"]

logger = logging.getLogger(__name__)


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


def evaluate_pairs(model: SentenceTransformer, pairs: Pairs, dims: Sequence[int]) -> dict[str, Any]:
    """Encodes every text once and scores each width, beside a character n-gram TF-IDF baseline on the same pairs.

    Args:
        model: The model; queries get its query prompt.
        pairs: What to find.
        dims: Widths, widest first.

    Returns:
        ``accuracy`` by width, ``tfidf``, ``languages`` and ``scripts`` (with their numbers of pairs and TF-IDF's
        score) at the full width, and ``pairs``, their number. Accuracies lie between 0 and 1.
    """
    options = {"convert_to_tensor": True, "show_progress_bar": False, "batch_size": 256}
    queries = model.encode_query(pairs.queries, **options).float().cpu()
    candidates = model.encode_document(pairs.candidates, **options).float().cpu()
    found = {dim: nearest(queries, candidates, dim) == pairs.labels for dim in dims}
    full = found[max(dims)]
    baseline = nearest_by_tfidf(pairs.queries, pairs.candidates) == pairs.labels
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


def report(result: dict[str, Any], most_scripts: int = 12) -> str:
    """The result as a table for a terminal: widths, then the scripts with the most pairs."""
    widths = [f"{'dimensions':<14}{'accuracy@1':>10}"]
    widths += [f"{dim:<14}{accuracy:>10.3f}" for dim, accuracy in result["accuracy"].items()]
    widths.append(f"{'TF-IDF':<14}{result['tfidf']:>10.3f}")
    scripts = [f"{'script':<14}{'pairs':>10}{'accuracy@1':>12}{'TF-IDF':>10}"]
    largest = sorted(result["scripts"].items(), key=lambda item: -item[1]["pairs"])
    for name, group in largest[:most_scripts]:
        scripts.append(f"{name:<14}{group['pairs']:>10}{group['accuracy']:>12.3f}{group['tfidf']:>10.3f}")
    if len(largest) > most_scripts:
        scripts.append(f"and {len(largest) - most_scripts} more scripts")
    return "\n".join([*widths, "", *scripts])


def evaluate_and_report(folder: Path, args: StageArguments, path: Path) -> dict[str, Any]:
    """Evaluates a finished model on a stage's pairs, saves the result to ``path`` and prints the table."""
    pairs = load_pairs(args.evaluation_pairs, args.evaluation_candidates)
    model = SentenceTransformer(str(folder), trust_remote_code=True)
    width = model.get_embedding_dimension()
    dims = args.train_dims(width) or [width]
    result = {**evaluate_pairs(model, pairs, dims), "model": str(folder)}
    write_whole(path, json.dumps(result, indent=2) + "\n")
    found = f"Finding the passages of {len(pairs.queries)} queries among {len(pairs.candidates)} candidates"
    sys.stdout.write(f"\n{found} ({args.evaluation_pairs})\n\n{report(result)}\n\n{path}\n")
    quarter = next((dim for dim in dims if dim <= width // 4), width)
    sys.stdout.write(
        "\nUse the model:\n\n"
        "    from sentence_transformers import SentenceTransformer\n"
        f'    model = SentenceTransformer("{folder}", truncate_dim={quarter})\n'
        f"    print(model.encode_query({pairs.queries[0]!r}) @ model.encode_document({pairs.candidates[:3]!r}).T)\n"
    )
    return result
