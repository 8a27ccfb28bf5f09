"""What follows the last step of a stage: its model finds the passages of the evaluation's pairs; table and report."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import torch

from training.common.languages import iso639_3
from training.common.outputs import locked
from training.common.run_folder import run_of, write_whole
from training.config.arguments import StageArguments
from training.evaluation.figures.curves import find_log
from training.evaluation.pairs import EncodedPairs, Pairs, encode_pairs, evaluate_pairs, load_pairs, nearest
from training.evaluation.quantization import quantized, unit_length
from training.evaluation.records import PRECISIONS, ModelRecord, Score, load_evaluation
from training.evaluation.report import write_report
from training.evaluation.resources import known_rows
from training.evaluation.tfidf import nearest_by_tfidf
from training.models.encoders import load_encoder
from training.models.reference import resolve

TASK, TFIDF = "HeldOutPairs", "TF-IDF"
# Of the full width's accuracy, by a width that is recommended; and characters of a text that is shown.
_KEPT, _SHOWN = 0.95, 60


def evaluate_and_report(folder: Path, args: StageArguments, path: Path) -> dict[str, Any]:
    """Evaluates a finished model on a stage's pairs, saves the result and the report, and prints the table.

    Args:
        folder: The model.
        args: The stage.
        path: Where the result goes; the report of all stages of the recipe goes to ``report/`` beside it.
    """
    pairs = load_pairs(args.evaluation_pairs, args.evaluation_candidates)
    reference = resolve(str(folder), "output_dir")
    model = load_encoder(reference, "output_dir")
    width = model.get_embedding_dimension()
    dims = args.train_dims(width) or [width]
    encoded = encode_pairs(model, pairs)
    baseline = pairs.hits(nearest_by_tfidf(pairs.queries, pairs.candidates))
    result = {**evaluate_pairs(encoded, baseline, dims), "model": str(folder), "identity": reference.identity}
    # The same recipe may be resumed twice.
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
    with locked(path.parent / "report"):
        page = _report(path.parent / "report", record, encoded, baseline, dims, args)
    sys.stdout.write(f"{page}\n")
    sys.stdout.write(f"\nUse the model:\n\n{indent(usage(folder, pairs, result['accuracy']), '    ')}")
    return result


def usage(folder: Path, pairs: Pairs, accuracy: Mapping[str, float]) -> str:
    """A program that finds a query's passage, at the narrowest width that keeps nearly all of the full one's accuracy.

    Args:
        folder: The model.
        pairs: What it was evaluated on.
        accuracy: By width, as :func:`~training.evaluation.pairs.evaluate_pairs` gives it.
    """
    width = narrowest_width(accuracy)
    truncated = "" if width == max(map(int, accuracy)) else f", truncate_dim={width}"
    places = list(dict.fromkeys([pairs.relevant[0][0], *range(min(3, len(pairs.candidates)))]))[:3]
    return (
        "from sentence_transformers import SentenceTransformer\n\n"
        f"model = SentenceTransformer({str(folder)!r}{truncated})\n"
        f"query = model.encode_query({_shortened(pairs.queries[0])!r})\n"
        f"passages = model.encode_document({[_shortened(pairs.candidates[place]) for place in places]!r})\n"
        # Cosine: embeddings that are cut are not of unit length.
        "print(model.similarity(query, passages))\n"
    )


def narrowest_width(accuracy: Mapping[str, float]) -> int:
    """The narrowest width that keeps 95 % of the full one's accuracy; the full one if that finds nothing.

    Args:
        accuracy: Accuracy by width.
    """
    scores = {int(width): score for width, score in accuracy.items()}
    full = max(scores)
    return min(width for width, score in scores.items() if score >= _KEPT * scores[full]) if scores[full] else full


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _report(
    output: Path,
    record: ModelRecord,
    encoded: EncodedPairs,
    baseline: np.ndarray,
    dims: Sequence[int],
    args: StageArguments,
) -> Path:
    """Adds the model to the report of its recipe; it stands beside the stages before it and the baseline."""
    evaluation = load_evaluation(output, missing_ok=True)
    evaluation.add_model(record)
    evaluation.add_model(ModelRecord(TFIDF))
    evaluation.put(*_of_view(TFIDF, encoded.pairs, baseline, 0, "float32"))
    for precision in PRECISIONS:
        for dim in dims:
            evaluation.put(*pairs_scores(record.label, encoded, dim, precision))
    evaluation.save(output)
    trained = [run for model in evaluation.models if (run := run_of(model.name)) is not None and find_log(run)]
    return write_report(
        evaluation,
        output,
        compare=(record.label, TFIDF),
        rows=known_rows(Path(args.manifest) if args.manifest else None),
        runs=trained,
        title=f"Evaluation of {output.parent}",
    )


def pairs_scores(
    label: str, encoded: EncodedPairs, dimension: int, precision: str
) -> tuple[list[Score], dict[str, np.ndarray]]:
    """Accuracy@1 of one width and precision by language, and whether a passage of each query was found.

    Args:
        label: Label of the model.
        encoded: Pairs and their embeddings.
        dimension: Leading dimensions used.
        precision: One of ``PRECISIONS``.
    """
    queries, candidates = (each[:, :dimension].numpy() for each in (encoded.queries, encoded.candidates))
    stored = quantized(unit_length(candidates), precision)
    # Beside int8, queries stay in float32.
    asked = quantized(queries, precision) if precision == "binary" else queries
    hits = encoded.pairs.hits(nearest(torch.from_numpy(asked), torch.from_numpy(stored), dimension))
    return _of_view(label, encoded.pairs, hits, dimension, precision)


def _of_view(
    label: str, pairs: Pairs, hits: np.ndarray, dimension: int, precision: str
) -> tuple[list[Score], dict[str, np.ndarray]]:
    rows: dict[str, list[int]] = {}
    for row, code in enumerate(_codes(pairs)):
        rows.setdefault(code, []).append(row)
    scores, examples = [], {}
    for code, of_code in rows.items():
        found = hits[of_code].astype(np.float32)
        score = Score(
            label,
            TASK,
            "Retrieval",
            code,
            (code,) if pairs.languages else (),
            dimension,
            precision,
            "accuracy_at_1",
            round(float(found.mean()), 6),
            len(found),
        )
        scores.append(score)
        examples[score.key] = found
    return scores, examples


def _codes(pairs: Pairs) -> list[str]:
    """The subset of each query: its language and script, or mteb's name of a task without subsets."""
    if pairs.languages is None or pairs.scripts is None:
        return ["default"] * len(pairs.queries)
    return [_code(language, script) for language, script in zip(pairs.languages, pairs.scripts, strict=True)]


def _code(language: str, script: str) -> str:
    try:
        return f"{iso639_3(language)}-{script}"
    except ValueError:
        # A name of the user's own, which the table takes as it is, too.
        return f"{language}-{script}"


def table(result: dict[str, Any], most_scripts: int = 12) -> str:
    """The result as a table for a terminal: widths, then the scripts with the most queries, where they are known."""
    widths = [f"{'dimensions':<14}{'accuracy@1':>10}"]
    widths += [f"{dim:<14}{accuracy:>10.3f}" for dim, accuracy in result["accuracy"].items()]
    widths.append(f"{'TF-IDF':<14}{result['tfidf']:>10.3f}")
    if not result["scripts"]:
        return "\n".join(widths)
    scripts = [f"{'script':<14}{'pairs':>10}{'accuracy@1':>12}{'TF-IDF':>10}"]
    largest = sorted(result["scripts"].items(), key=lambda item: -item[1]["pairs"])
    for name, group in largest[:most_scripts]:
        scripts.append(f"{name:<14}{group['pairs']:>10}{group['accuracy']:>12.3f}{group['tfidf']:>10.3f}")
    if len(largest) > most_scripts:
        scripts.append(f"and {len(largest) - most_scripts} more scripts")
    return "\n".join([*widths, "", *scripts])
