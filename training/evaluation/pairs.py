"""Pairs of queries and passages: reading them, and how often a model finds a passage of a query."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from sklearn.feature_extraction.text import TfidfVectorizer

from training.common.errors import UserError
from training.common.languages import usual_script
from training.common.yaml_file import RULE
from training.data.cleaning.normalise import normalise
from training.data.published import columns_of
from training.models.model_folder import user_error

# Ranks that nDCG looks at.
CUTOFF = 10
# The best of ten settings tried on the CLDR names (char and char_wb, ranges from (1, 2) to (2, 4)).
_NGRAMS = {"analyzer": "char_wb", "ngram_range": (1, 3), "lowercase": True}
# Queries compared with all candidates at once.
_BLOCK = 4096
# Bytes of a line of JSON, at most.
_LONGEST_LINE = 1 << 27


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
        table = _read_table(path, kind, pa.schema(dict.fromkeys([*columns, *optional], pa.string())))
        table.validate(full=True)
    names = [*columns, *(name for name in optional if name in table.column_names)]
    for name in names:
        if (count := table.column_names.count(name)) != 1:
            what = "there twice" if count else "missing"
            raise UserError(f"{path}: column {name!r} is {what}; it has {', '.join(table.column_names)}")
    if not table.num_rows:
        raise UserError(f"{path}: the file has no rows; build it again")
    texts = columns_of(table.select(names))
    for name, values in texts.items():
        for row, value in enumerate(values):
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{path}: row {row}, column {name!r} is not text; correct or drop the row")
    return texts


def _read_table(path: Path, kind: str, schema: pa.Schema) -> pa.Table:
    if kind == "parquet":
        return pq.read_table(path)
    if kind == "csv":
        # Without types, "01" would be a number.
        types = pa.csv.ConvertOptions(column_types=schema)
        return pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(newlines_in_values=True), convert_options=types)
    options = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    table = pa.json.read_json(path, pa.json.ReadOptions(block_size=_LONGEST_LINE), options)
    # A column of the schema that is not in the file is null. Without any, the message names the file's columns.
    present = [name for name in table.column_names if table[name].null_count < len(table)]
    return table.select(present) if present else pa.json.read_json(path)


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


def passage_ranks(queries: torch.Tensor, candidates: torch.Tensor, passages: np.ndarray, dim: int) -> np.ndarray:
    """Return the ``(n,)`` ranks, from 1, of one candidate for each query, given by its position.

    Of equally near candidates the first has the best rank, so rank 1 is what :func:`nearest` finds.
    """
    candidates = torch.nn.functional.normalize(candidates[:, :dim], dim=-1)
    positions, ranks = torch.arange(len(candidates)), []
    for block, own in zip(queries.split(_BLOCK), torch.from_numpy(passages).split(_BLOCK), strict=True):
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
        accuracy, tfidf = (round(float(hits[of_group].mean()), 4) for hits in (correct, baseline))
        groups[name] = {"pairs": int(of_group.sum()), "accuracy": accuracy, "tfidf": tfidf}
    return groups
