"""Pairs of queries and passages: how often a model finds a passage, sampled in training."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from sentence_transformers import SentenceTransformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import ndcg_score
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import normalize as unit
from transformers import PreTrainedTokenizerBase, TrainerCallback

from training.common.errors import UserError
from training.common.languages import usual_script
from training.common.yaml_file import RULE
from training.config.arguments import StageArguments
from training.data.cleaning.normalise import normalise
from training.data.published import columns_of
from training.evaluation.encoding import quantized, unit_length
from training.models.encoding import embed_batch, lay_out
from training.models.model_folder import user_error

TASK, TFIDF = "HeldOutPairs", "TF-IDF"
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
    scripts: list[str] | None = None  # ISO 15924, if the languages are known

    def hits(self, found: np.ndarray) -> np.ndarray:
        """Return ``(n,)`` whether ``(n,)`` positions among the candidates are those of a passage of each query."""
        return np.array([position in own for position, own in zip(found.tolist(), self.relevant, strict=True)], bool)


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
            raise UserError(f"{pairs}: row {row}, column 'passage' is not among the candidates; add it to {candidates}")
        right[query].update(found)
    if "lang" in columns:
        columns.setdefault("script", list(map(usual_script, columns["lang"])))
    names = ["query", "lang", "script"] if "lang" in columns else ["query"]
    distinct = pd.DataFrame(columns, dtype=object)[names].drop_duplicates()
    relevant = [tuple(sorted(right[query])) for query in distinct["query"]]
    queries, *languages = (distinct[name].tolist() for name in names)
    return Pairs(queries, texts, relevant, *languages)


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
            frame = pd.read_json(path, lines=True, dtype=False)
            # Columns that nobody reads may hold anything.
            frame[frame.columns.difference([*columns, *optional])] = None
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
    candidates = unit(candidates[:, :dim], dim=-1)
    return torch.cat([(block[:, :dim] @ candidates.T).argmax(dim=1) for block in queries.split(_BLOCK)]).numpy()


def nearest_by_tfidf(queries: Sequence[str], candidates: Sequence[str]) -> np.ndarray:
    """Return the same by cosine of TF-IDF vectors of character n-grams, a baseline that knows no language."""
    vectorizer = TfidfVectorizer(**_NGRAMS)
    vectors = vectorizer.fit_transform(candidates).T.tocsr()
    blocks = (queries[start : start + _BLOCK] for start in range(0, len(queries), _BLOCK))
    found = [np.asarray((vectorizer.transform(each) @ vectors).argmax(axis=1)).ravel() for each in blocks]
    return np.concatenate(found)


def ranking_scores(queries: torch.Tensor, candidates: torch.Tensor, pairs: Pairs, dim: int) -> tuple[float, float]:
    """Return accuracy@1 and nDCG@10 of ``(n, d)`` and ``(m, d)`` embeddings, truncated to ``dim`` dimensions.

    Each passage of a query has gain 1, and the ideal ranking has nDCG 1 (Järvelin and Kekäläinen, Cumulated gain-based
    evaluation of IR techniques, 2002).
    """
    # scikit-learn refuses these two; the ranks that wait for the result would never get it.
    if not (queries.isfinite().all() and candidates.isfinite().all()):
        return math.nan, math.nan
    if len(candidates) == 1:
        return 1.0, 1.0
    accuracy, gains = pairs.hits(nearest(queries, candidates, dim)).mean(), 0.0
    candidates = unit(candidates[:, :dim], dim=-1)
    for start in range(0, len(queries), _BLOCK):
        scores = queries[start : start + _BLOCK, :dim] @ candidates.T
        relevant = np.zeros(scores.shape, bool)
        for row, positions in enumerate(pairs.relevant[start : start + _BLOCK]):
            relevant[row, list(positions)] = True
        gains += len(scores) * ndcg_score(relevant, scores.numpy(), k=CUTOFF, ignore_ties=True)
    return float(accuracy), gains / len(queries)


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

    def by_exit(self, count: int) -> list[EncodedPairs]:
        """Take the ``(n, count * d)`` embeddings of a model with exits apart."""
        sides = zip(self.queries.chunk(count, dim=1), self.candidates.chunk(count, dim=1), strict=True)
        return [replace(self, queries=queries, candidates=candidates) for queries, candidates in sides]


def encode_pairs(model: SentenceTransformer, pairs: Pairs) -> EncodedPairs:
    """Encode every text once; queries get the model's query prompt; with exits, ``(n, exits * d)`` embeddings."""
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
    # Without names there are no groups.
    languages, scripts = (
        {name: {"pairs": len(own), **own.mean().round(4)} for name, own in hits.groupby(np.array(names))}
        for names in (pairs.languages or [None] * len(hits), pairs.scripts or [None] * len(hits))
    )
    return {
        "accuracy": {str(dim): round(float(correct.mean()), 4) for dim, correct in found.items()},
        "tfidf": round(float(baseline.mean()), 4),
        "languages": {name: group["accuracy"] for name, group in languages.items()},
        "scripts": scripts,
        "pairs": len(pairs.queries),
    }


def load_stage_pairs(args: StageArguments) -> Pairs | None:
    """Return the pairs of a stage; None if it evaluates none."""
    return load_pairs(args.evaluation_pairs, args.evaluation_candidates) if args.evaluation_pairs else None


def check_stage_pairs(stages: Sequence[StageArguments]) -> None:
    """Read the pairs of all stages, so that faults show before the first stage runs.

    Missing files may be what the builder of one of the stages makes; they are read after it.
    """
    builds = any(args.builder is not None for args in stages)
    for args in stages:
        files = filter(None, [args.evaluation_pairs, args.evaluation_candidates])
        if not builds or all(Path(name).exists() for name in files):
            load_stage_pairs(args)


def sample_pairs(pairs: Pairs, size: int, candidates: int) -> Pairs:
    """Take ``size`` evenly spaced queries, by language and in the order of the file, with at most so many candidates.

    Languages keep their shares, to a query; one with fewer queries than one in ``n / size`` may have none. Passages of
    the queries taken are never left out.
    """
    by_language = np.argsort(np.asarray(pairs.languages or [""] * len(pairs.queries)), kind="stable")
    rows = np.sort(by_language[_spread(len(by_language), size)])
    gold = np.unique(np.concatenate([pairs.relevant[row] for row in rows]))
    others = np.setdiff1d(np.arange(len(pairs.candidates)), gold)
    # In the order of the file: of equally near candidates, the first is found.
    kept = np.union1d(gold, others[_spread(len(others), max(candidates - len(gold), 0))])
    return Pairs(
        queries=[pairs.queries[row] for row in rows],
        candidates=[pairs.candidates[position] for position in kept],
        relevant=[tuple(np.searchsorted(kept, pairs.relevant[row]).tolist()) for row in rows],
        languages=pairs.languages and [pairs.languages[row] for row in rows],
        scripts=pairs.scripts and [pairs.scripts[row] for row in rows],
    )


def _spread(count: int, size: int) -> np.ndarray:
    """Return ``size`` evenly spaced numbers below ``count``, in ascending order."""
    return np.arange(count) if size >= count else (2 * np.arange(size) + 1) * count // (2 * size)


class PairsCallback(TrainerCallback):
    """Add to each evaluation of a Trainer how well its model finds the passages of pairs.

    Texts are read as the saved model reads them: queries under its query prompt, truncated at ``max_length``, EOS at
    the end. Each process encodes its share in chunks of at most ``max_tokens``, as in training; rank 0 computes the
    metrics. No random number is drawn. Metrics are ``eval_pairs_accuracy`` (accuracy@1) and ``eval_pairs_ndcg_at_10``
    at the first (widest) of ``dims``; with ``_dim64`` appended, for example, at others.
    """

    def __init__(
        self,
        pairs: Pairs,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Mapping[str, str],
        dims: Sequence[int],
        accelerator: Accelerator,
        max_length: int,
        max_tokens: int,
    ) -> None:
        self._pairs, self._dims, self._accelerator = pairs, list(dims), accelerator
        texts = [prompts["query"] + query for query in pairs.queries]
        texts += [prompts["document"] + candidate for candidate in pairs.candidates]
        # A copy: truncation and padding are states of a fast tokenizer, and would be saved with it.
        copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        copy.no_padding()
        copy.enable_truncation(max_length)
        tokens = [encoding.ids for encoding in copy.encode_batch_fast(texts)]
        lengths = np.array([len(each) for each in tokens])
        order = np.argsort(lengths, kind="stable")
        layout = lay_out(lengths[order], accelerator.process_index, accelerator.num_processes, max_tokens)
        ids = chain.from_iterable(tokens[text] for text in order[np.concatenate(layout.chunks)])
        self._batch = {"input_ids": torch.tensor(list(ids))[None], **layout.of_batch(lengths[order])}
        self._positions = torch.from_numpy(np.argsort(order))

    @property
    def metric_names(self) -> list[str]:
        """Names of the metrics that are added to an evaluation."""
        suffixes = ["", *(f"_dim{dim}" for dim in self._dims[1:])]
        return [f"eval_pairs_{kind}{suffix}" for suffix in suffixes for kind in ("accuracy", f"ndcg_at_{CUTOFF}")]

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: nn.Module, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Encode all texts on all processes together and add the metrics."""
        device = self._accelerator.device
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self._batch.items()}
        with self._accelerator.autocast():
            embeddings = embed_batch(model, moved)
        values = [0.0] * len(self.metric_names)
        if self._accelerator.is_main_process:
            # As the saved model's last module does; narrower widths are normalized again.
            embeddings = unit(embeddings.cpu()[self._positions], dim=-1)
            queries, candidates = embeddings.split([len(self._pairs.queries), len(self._pairs.candidates)])
            values = [each for dim in self._dims for each in ranking_scores(queries, candidates, self._pairs, dim)]
        metrics.update(broadcast_object_list([dict(zip(self.metric_names, values, strict=True))])[0])
