"""Pairs of queries and passages: reading them, and how often a model finds a passage of a query."""

from __future__ import annotations

import csv
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from sklearn.feature_extraction.text import TfidfVectorizer

from training.common.errors import UserError, in_one_line
from training.common.languages import usual_script
from training.common.yaml_file import RULE
from training.data.cleaning.normalise import normalise
from training.data.published import columns_of

# Ranks that nDCG looks at.
CUTOFF = 10
# The best of ten settings tried on the CLDR names (char and char_wb, ranges from (1, 2) to (2, 4)).
_NGRAMS = {"analyzer": "char_wb", "ngram_range": (1, 3), "lowercase": True}
# Queries compared with all candidates at once.
_BLOCK = 4096


@dataclass(frozen=True)
class Pairs:
    """Queries and the passages to be found.

    Attributes:
        queries: ``n`` texts, each once per language and script.
        candidates: Distinct texts, the passages among them.
        relevant: ``n`` ascending tuples of positions among the candidates, all of which are right.
        languages: ``n`` language codes; None if not known.
        scripts: ``n`` ISO 15924 codes; None if not known.
    """

    queries: list[str]
    candidates: list[str]
    relevant: list[tuple[int, ...]]
    languages: list[str] | None = None
    scripts: list[str] | None = None

    def hits(self, found: np.ndarray) -> np.ndarray:
        """Return ``(n,)`` whether ``(n,)`` positions among the candidates are those of a passage of each query."""
        pairs = zip(found.tolist(), self.relevant, strict=True)
        return np.fromiter((position in own for position, own in pairs), bool, len(self.relevant))


def load_pairs(pairs: Path | str, candidates: Path | str | None = None) -> Pairs:
    """Read pairs (columns ``query`` and ``passage``, optionally ``lang`` and ``script``) and candidates (``passage``).

    A model gets the text of a query alone, so the passages of all rows with this text are right, in any language, and
    so are candidates with the same normal form. Without a file of candidates, the passages are the candidates. Without
    scripts, each language has its usual one.
    """
    columns = read_texts(pairs, ["query", "passage"], ["lang", "script"])
    passages = columns["passage"] if candidates is None else read_texts(candidates, ["passage"])["passage"]
    texts = list(dict.fromkeys(passages))
    positions, right = defaultdict(list), defaultdict(set)
    for position, text in enumerate(texts):
        positions[normalise(text)].append(position)
    for row, (query, passage) in enumerate(zip(columns["query"], columns["passage"], strict=True)):
        found = positions.get(normalise(passage))
        if found is None:
            raise UserError(
                f"{pairs}: row {row}, column 'passage' is not among the candidates; add it to {candidates} "
                "or drop the row"
            )
        right[query].update(found)
    languages, scripts = columns.get("lang"), columns.get("script")
    if scripts is None and languages is not None:
        scripts = [usual_script(language) for language in languages]
    keys = zip(*(each for each in (columns["query"], languages, scripts) if each is not None), strict=True)
    first: dict[tuple[str, ...], int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    rows = list(first.values())
    queries = [columns["query"][row] for row in rows]
    return Pairs(
        queries,
        texts,
        [tuple(sorted(right[query])) for query in queries],
        languages and [languages[row] for row in rows],
        scripts and [scripts[row] for row in rows],
    )


def read_texts(path: Path | str, columns: Sequence[str], optional: Sequence[str] = ()) -> dict[str, list[str]]:
    """Read text columns of a ``.csv``, ``.jsonl`` or (any other suffix) parquet file; optional ones if it has them.

    A csv file names its columns in the first line; cells such as ``NA`` and ``01`` stay texts.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path ({RULE})")
    kind, read = {".csv": ("csv", _read_csv), ".jsonl": ("jsonl", _read_jsonl)}.get(
        path.suffix.lower(), ("parquet", pq.read_table)
    )
    try:
        table = read(path)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        reason = in_one_line(error)
        raise UserError(f"{path}: not a readable {kind} file ({reason}); give .parquet, .csv or .jsonl") from None
    for name in columns:
        if name not in table.column_names:
            raise UserError(f"{path}: column {name!r} is missing; it has {', '.join(table.column_names) or 'none'}")
    names = [*columns, *(name for name in optional if name in table.column_names and name not in columns)]
    for name in names:
        if table.column_names.count(name) > 1:
            raise UserError(f"{path}: column {name!r} is there twice; rename one of them")
    if not table.num_rows:
        raise UserError(f"{path}: the file has no rows; build it again")
    texts = columns_of(table.select(names))
    for name, values in texts.items():
        for row, value in enumerate(values):
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{path}: row {row}, column {name!r} is not text; correct or drop the row")
    return texts


def _read_csv(path: Path) -> pa.Table:
    with path.open(encoding="utf-8-sig", newline="") as handle:
        names = next(csv.reader(handle), [])
    # Without types, "01" would be a number and "NA" would be missing.
    texts = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    return pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(newlines_in_values=True), convert_options=texts)


def _read_jsonl(path: Path) -> pa.Table:
    rows = []
    with path.open(encoding="utf-8-sig") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(rows[-1], dict):
                raise ValueError(f"line {number} is not an object such as {{'query': …, 'passage': …}}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    # A value that is not text is refused like a missing one, by its row and column.
    texts = {name: [text if isinstance(text := row.get(name), str) else None for row in rows] for name in names}
    return pa.table({name: pa.array(values, pa.string()) for name, values in texts.items()})


def nearest(queries: torch.Tensor, candidates: torch.Tensor, dim: int, rows_per_block: int = _BLOCK) -> np.ndarray:
    """Return the ``(n,)`` nearest of ``(m, d)`` candidates to ``(n, d)`` queries by cosine of ``dim`` dimensions."""
    candidates = torch.nn.functional.normalize(candidates[:, :dim], dim=-1)
    return torch.cat([(block[:, :dim] @ candidates.T).argmax(dim=1) for block in queries.split(rows_per_block)]).numpy()


def nearest_by_tfidf(queries: Sequence[str], candidates: Sequence[str]) -> np.ndarray:
    """Return the same by cosine of TF-IDF vectors of character n-grams, a baseline that knows no language."""
    vectorizer = TfidfVectorizer(**_NGRAMS)
    vectors = vectorizer.fit_transform(candidates).T.tocsr()
    blocks = (queries[start : start + _BLOCK] for start in range(0, len(queries), _BLOCK))
    return np.concatenate(
        [np.asarray((vectorizer.transform(each) @ vectors).argmax(axis=1)).ravel() for each in blocks]
    )


def passage_ranks(
    queries: torch.Tensor, candidates: torch.Tensor, passages: np.ndarray, dim: int, rows_per_block: int = _BLOCK
) -> np.ndarray:
    """Return the ``(n,)`` ranks, from 1, of one candidate for each query, given by its position.

    Of equally near candidates the first has the best rank, so rank 1 is what :func:`nearest` finds.
    """
    candidates = torch.nn.functional.normalize(candidates[:, :dim], dim=-1)
    positions, ranks = torch.arange(len(candidates)), []
    for block, own in zip(queries.split(rows_per_block), torch.from_numpy(passages).split(rows_per_block), strict=True):
        scores = block[:, :dim] @ candidates.T
        score = scores.gather(1, own[:, None])
        ahead = (scores > score) | ((scores == score) & (positions < own[:, None]))
        ranks.append(ahead.sum(dim=1) + 1)
    return torch.cat(ranks).numpy()


def ranking_scores(queries: torch.Tensor, candidates: torch.Tensor, pairs: Pairs, dim: int) -> tuple[float, float]:
    """Return accuracy@1 and nDCG@10 of ``(n, d)`` and ``(m, d)`` embeddings, truncated to ``dim`` dimensions.

    Each passage of a query has gain 1, and the ideal ranking has nDCG 1 (Järvelin and Kekäläinen, Cumulated gain-based
    evaluation of IR techniques, 2002).
    """
    counts = np.array([len(own) for own in pairs.relevant])
    owner, passages = np.repeat(np.arange(len(counts)), counts), np.concatenate(pairs.relevant)
    # Each query is repeated for each of its passages; their ranks differ, even if they are equally near.
    ranks = passage_ranks(queries[owner], candidates, passages, dim)
    gains = np.bincount(owner, np.where(ranks <= CUTOFF, 1 / np.log2(ranks + 1), 0.0))
    ideal = np.cumsum(1 / np.log2(np.arange(CUTOFF) + 2))[np.minimum(counts, CUTOFF) - 1]
    return float(np.bincount(owner, ranks == 1).mean()), float((gains / ideal).mean())


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs with the ``(n, d)`` embeddings of their queries and the ``(m, d)`` embeddings of their candidates."""

    pairs: Pairs
    queries: torch.Tensor
    candidates: torch.Tensor
    texts_per_second: float


def encode_pairs(model: SentenceTransformer, pairs: Pairs) -> EncodedPairs:
    """Encode every text once; queries get the model's query prompt."""
    options = {"convert_to_tensor": True, "show_progress_bar": False, "batch_size": 256}
    started = time.perf_counter()
    queries = model.encode_query(pairs.queries, **options).float().cpu()
    candidates = model.encode_document(pairs.candidates, **options).float().cpu()
    rate = (len(queries) + len(candidates)) / (time.perf_counter() - started)
    return EncodedPairs(pairs, queries, candidates, rate)


def evaluate_pairs(encoded: EncodedPairs, baseline: np.ndarray, dims: Sequence[int]) -> dict[str, Any]:
    """Return the accuracy by width, language and script, beside the ``(n,)`` hits of a TF-IDF baseline."""
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
