"""Pairs of queries and passages: reading them, and how often a model finds a passage of a query."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import ndcg_score

from training.common.errors import UserError
from training.common.languages import usual_script
from training.common.yaml_file import RULE
from training.data.cleaning.normalise import normalise
from training.data.published import columns_of
from training.evaluation.encoding import quantized, unit_length
from training.models.model_folder import user_error

# Ranks that nDCG looks at.
CUTOFF = 10
# The best of ten settings tried on the CLDR names (char and char_wb, ranges from (1, 2) to (2, 4)).
_NGRAMS = {"analyzer": "char_wb", "ngram_range": (1, 3), "lowercase": True}
# Queries compared with all candidates at once.
_BLOCK = 4096


@dataclass(frozen=True)
class Pairs:
    """Queries and the passages to be found."""

    queries: list[str]  # each once per language and script
    candidates: list[str]  # distinct texts, the passages among them
    relevant: list[tuple[int, ...]]  # of each query, ascending positions among the candidates, all of which are right
    languages: list[str] | None = None
    scripts: list[str] | None = None  # ISO 15924

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
    if "lang" in columns:
        columns.setdefault("script", [usual_script(language) for language in columns["lang"]])
    names = [name for name in ("query", "lang", "script") if name in columns]
    # Each query once per language and script.
    rows = list(dict.fromkeys(zip(*(columns[name] for name in names), strict=True)))
    distinct = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    relevant = [tuple(sorted(right[query])) for query in distinct["query"]]
    return Pairs(distinct["query"], texts, relevant, distinct.get("lang"), distinct.get("script"))


def read_texts(path: Path | str, columns: Sequence[str], optional: Sequence[str] = ()) -> dict[str, list[str]]:
    """Read text columns of a ``.csv``, ``.jsonl`` or (any other suffix) parquet file; optional ones if it has them.

    A csv file names its columns in the first line; cells such as ``NA`` and ``01`` stay texts.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path ({RULE})")
    kind = {".csv": "csv", ".jsonl": "jsonl"}.get(path.suffix.lower(), "parquet")
    with user_error(f"{path}: not a readable {kind} file", "give .parquet, .csv or .jsonl"):
        if kind == "csv":
            types = pa.csv.ConvertOptions(column_types=dict.fromkeys([*columns, *optional], pa.string()))
            newlines = pa.csv.ParseOptions(newlines_in_values=True)
            table = pa.csv.read_csv(path, parse_options=newlines, convert_options=types)
        elif kind == "jsonl":
            frame = pd.read_json(path, lines=True, dtype=False, convert_dates=False)
            table = pa.Table.from_pandas(frame, preserve_index=False)
        else:
            table = pq.read_table(path)
        table.validate(full=True)
    if not table.num_rows:
        raise UserError(f"{path}: the file has no rows; build it again")
    names = [*columns, *(name for name in optional if name in table.column_names)]
    for name in names:
        if (count := table.column_names.count(name)) != 1:
            what = "there twice" if count else "missing"
            raise UserError(f"{path}: column {name!r} is {what}; it has {', '.join(table.column_names)}")
    texts = columns_of(table.select(names))
    for name, values in texts.items():
        for row, value in enumerate(values):
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{path}: row {row}, column {name!r} is not text; correct or drop the row")
    return texts


def nearest(queries: torch.Tensor, candidates: torch.Tensor, dim: int) -> np.ndarray:
    """Return the ``(n,)`` nearest of ``(m, d)`` candidates to ``(n, d)`` queries by cosine of ``dim`` dimensions."""
    candidates = torch.nn.functional.normalize(candidates[:, :dim], dim=-1)
    return torch.cat([(block[:, :dim] @ candidates.T).argmax(dim=1) for block in queries.split(_BLOCK)]).numpy()


def nearest_by_tfidf(queries: Sequence[str], candidates: Sequence[str]) -> np.ndarray:
    """Return the same by cosine of TF-IDF vectors of character n-grams, a baseline that knows no language."""
    vectorizer = TfidfVectorizer(**_NGRAMS)
    vectors = vectorizer.fit_transform(candidates).T.tocsr()
    blocks = (queries[start : start + _BLOCK] for start in range(0, len(queries), _BLOCK))
    return np.concatenate(
        [np.asarray((vectorizer.transform(each) @ vectors).argmax(axis=1)).ravel() for each in blocks]
    )


def ranking_scores(queries: torch.Tensor, candidates: torch.Tensor, pairs: Pairs, dim: int) -> tuple[float, float]:
    """Return accuracy@1 and nDCG@10 of ``(n, d)`` and ``(m, d)`` embeddings, truncated to ``dim`` dimensions.

    Each passage of a query has gain 1, and the ideal ranking has nDCG 1 (Järvelin and Kekäläinen, Cumulated gain-based
    evaluation of IR techniques, 2002).
    """
    candidates = torch.nn.functional.normalize(candidates[:, :dim], dim=-1)
    found, gains = [], 0.0
    for start in range(0, len(queries), _BLOCK):
        scores = queries[start : start + _BLOCK, :dim] @ candidates.T
        relevant = np.zeros(scores.shape, bool)
        for row, positions in enumerate(pairs.relevant[start : start + _BLOCK]):
            relevant[row, list(positions)] = True
        found.append(scores.argmax(dim=1))
        gains += len(scores) * ndcg_score(relevant, scores.numpy(), k=CUTOFF, ignore_ties=True)
    return float(pairs.hits(torch.cat(found).numpy()).mean()), gains / len(queries)


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs with the ``(n, d)`` embeddings of their queries and the ``(m, d)`` embeddings of their candidates."""

    pairs: Pairs
    queries: torch.Tensor
    candidates: torch.Tensor
    texts_per_second: float

    def hits(self, dim: int, precision: str = "float32") -> np.ndarray:
        """Return ``(n,)`` whether the candidate nearest to each query is one of its passages."""
        queries, candidates = self.queries[:, :dim], self.candidates[:, :dim]
        if precision != "float32":
            candidates = torch.from_numpy(quantized(unit_length(candidates.numpy()), precision))
            # Beside int8, queries stay in float32.
            queries = torch.from_numpy(quantized(queries.numpy(), "binary")) if precision == "binary" else queries
        return self.pairs.hits(nearest(queries, candidates, dim))


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
    found = {dim: encoded.hits(dim) for dim in dims}
    hits = pd.DataFrame({"accuracy": found[max(dims)], "tfidf": baseline})
    languages, scripts = (
        {name: {"pairs": len(own), **own.mean().round(4)} for name, own in hits.groupby(np.array(names))}
        if names
        else {}
        for names in (pairs.languages, pairs.scripts)
    )
    return {
        "accuracy": {str(dim): round(float(correct.mean()), 4) for dim, correct in found.items()},
        "tfidf": round(float(baseline.mean()), 4),
        "languages": {name: group["accuracy"] for name, group in languages.items()},
        "scripts": scripts,
        "pairs": len(pairs.queries),
    }
