"""Pairs that a stage evaluates: a sample at each evaluation in training, all of them at its end."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from training.common.languages import iso639_3
from training.common.outputs import locked, write_whole
from training.common.run_folder import run_of
from training.config.arguments import StageArguments
from training.evaluation.encoding import quantized, unit_length
from training.evaluation.figures.plots import find_log
from training.evaluation.pairs import (
    CUTOFF,
    EncodedPairs,
    Pairs,
    encode_pairs,
    evaluate_pairs,
    load_pairs,
    nearest,
    nearest_by_tfidf,
    ranking_scores,
)
from training.evaluation.records import PRECISIONS, ModelRecord, Score, load_evaluation
from training.evaluation.report import write_report
from training.evaluation.summary import known_rows
from training.models.encoders import load_encoder
from training.models.encoding import embed_batch, lay_out
from training.models.model_ref import resolve

TASK, TFIDF = "HeldOutPairs", "TF-IDF"
# Share of the full width's accuracy that the recommended width keeps.
_KEPT = 0.95


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
    metrics. No random number is drawn.

    Metrics are ``eval_pairs_accuracy`` (accuracy@1, as :func:`~training.evaluation.pairs.evaluate_pairs` computes it)
    and ``eval_pairs_ndcg_at_10`` at the first (widest) of ``dims``; with ``_dim64`` appended, for example, at others.
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
            embeddings = torch.nn.functional.normalize(embeddings.cpu()[self._positions], dim=-1)
            queries, candidates = embeddings.split([len(self._pairs.queries), len(self._pairs.candidates)])
            values = [each for dim in self._dims for each in ranking_scores(queries, candidates, self._pairs, dim)]
        metrics.update(broadcast_object_list([dict(zip(self.metric_names, values, strict=True))])[0])


def evaluate_and_report(folder: Path, args: StageArguments, path: Path) -> dict[str, Any]:
    """Evaluate a finished model on a stage's pairs, write the result to ``path``, and print it.

    The report of all stages of the recipe goes to ``report/`` beside it.
    """
    pairs = load_pairs(args.evaluation_pairs, args.evaluation_candidates)
    reference = resolve(str(folder), "output_dir")
    model = load_encoder(reference, "output_dir")
    width = model.get_embedding_dimension()
    dims = args.train_dims(width) or [width]
    encoded = encode_pairs(model, pairs)
    baseline = pairs.hits(nearest_by_tfidf(pairs.queries, pairs.candidates))
    result = {**evaluate_pairs(encoded, baseline, dims), "model": str(folder), "identity": reference.identity}
    # The same recipe may be resumed twice at once.
    with locked(path):
        write_whole(path, json.dumps(result, indent=2) + "\n")
    found = f"Finding the passages of {len(pairs.queries)} queries among {len(pairs.candidates)} candidates"
    sys.stdout.write(f"\n{found} ({args.evaluation_pairs})\n\n{table(result)}\n\n{path}\n")
    record = ModelRecord(
        str(folder.parent),
        parameters=sum(weights.numel() for weights in model.parameters()),
        dimension=width,
        texts_per_second=encoded.texts_per_second,
        identity=reference.identity,
    )
    output = path.parent / "report"
    with locked(output):
        # Beside earlier stages of the recipe and the baseline.
        evaluation = load_evaluation(output, missing_ok=True)
        evaluation.add_model(record)
        evaluation.add_model(ModelRecord(TFIDF))
        evaluation.put(*_scores_by_language(TFIDF, pairs, baseline, 0, "float32"))
        for precision in PRECISIONS:
            for dim in dims:
                evaluation.put(*pairs_scores(record.label, encoded, dim, precision))
        evaluation.save(output)
        page = write_report(
            evaluation,
            output,
            compare=(record.label, TFIDF),
            rows=known_rows(Path(args.manifest) if args.manifest else None),
            runs=[run for each in evaluation.models if (run := run_of(each.name)) is not None and find_log(run)],
            title=f"Evaluation of {output.parent}",
        )
    sys.stdout.write(f"{page}\n\nUse the model:\n\n{indent(usage(folder, pairs, result['accuracy']), '    ')}")
    return result


def pairs_scores(
    label: str, encoded: EncodedPairs, dimension: int, precision: str
) -> tuple[list[Score], dict[str, np.ndarray]]:
    """Return accuracy@1 of a model's width and precision by language, and the hits of each language's queries."""
    queries, candidates = (each[:, :dimension].numpy() for each in (encoded.queries, encoded.candidates))
    stored = quantized(unit_length(candidates), precision)
    # Beside int8, queries stay in float32.
    queries = quantized(queries, precision) if precision == "binary" else queries
    hits = encoded.pairs.hits(nearest(torch.from_numpy(queries), torch.from_numpy(stored), dimension))
    return _scores_by_language(label, encoded.pairs, hits, dimension, precision)


def _scores_by_language(
    label: str, pairs: Pairs, hits: np.ndarray, dimension: int, precision: str
) -> tuple[list[Score], dict[str, np.ndarray]]:
    known = pairs.languages is not None and pairs.scripts is not None
    # mteb's name of a task without subsets.
    codes = list(map(_code, pairs.languages, pairs.scripts)) if known else ["default"] * len(pairs.queries)
    scores, examples, subsets = [], {}, np.asarray(codes)
    for code in dict.fromkeys(codes):
        found = hits[subsets == code].astype(np.float32)
        value, languages = round(float(found.mean()), 6), (code,) if known else ()
        task = (TASK, "Retrieval", code, languages)
        score = Score(label, *task, dimension, precision, "accuracy_at_1", value, len(found))
        scores.append(score)
        examples[score.key] = found
    return scores, examples


def _code(language: str, script: str) -> str:
    try:
        return f"{iso639_3(language)}-{script}"
    except ValueError:
        # The user's name of a language.
        return f"{language}-{script}"


def table(result: Mapping[str, Any], most_scripts: int = 12) -> str:
    """Format the result for a terminal: widths, then the scripts with the most queries."""
    lines = [f"{'dimensions':<14}{'accuracy@1':>10}"]
    widths = {**result["accuracy"], "TF-IDF": result["tfidf"]}
    lines += [f"{name:<14}{accuracy:>10.3f}" for name, accuracy in widths.items()]
    if result["scripts"]:
        lines += ["", f"{'script':<14}{'pairs':>10}{'accuracy@1':>12}{'TF-IDF':>10}"]
    largest = sorted(result["scripts"].items(), key=lambda item: -item[1]["pairs"])[:most_scripts]
    for name, group in largest:
        lines.append(f"{name:<14}{group['pairs']:>10}{group['accuracy']:>12.3f}{group['tfidf']:>10.3f}")
    return "\n".join(lines)


def usage(folder: Path, pairs: Pairs, accuracy: Mapping[str, float]) -> str:
    """Return a program that finds a query's passage with the model, at the narrowest width that keeps 95 %."""
    widths = {int(width): score for width, score in accuracy.items()}
    full = max(widths)
    width = min(width for width, score in widths.items() if score >= _KEPT * widths[full]) if widths[full] else full
    truncated = "" if width == full else f", truncate_dim={width}"
    positions = list(dict.fromkeys([pairs.relevant[0][0], *range(min(3, len(pairs.candidates)))]))[:3]
    texts = [pairs.queries[0], *(pairs.candidates[position] for position in positions)]
    query, *passages = (text if len(text) <= 60 else f"{text[:59]}…" for text in texts)
    return (
        "from sentence_transformers import SentenceTransformer\n\n"
        f"model = SentenceTransformer({str(folder)!r}{truncated})\n"
        f"query = model.encode_query({query!r})\n"
        f"passages = model.encode_document({passages!r})\n"
        # Cosine: truncated embeddings are not normalized.
        "print(model.similarity(query, passages))\n"
    )
