"""Ablations of the paper's claims in miniature: train every arm with several seeds and report the differences.

python training/examples/claims.py [--seeds 3] [--output runs/claims]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# Run as a script from a checkout: the recipe is not an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from modeling_f2llm.modeling_f2llm import F2LLMModel
from training.common.command import command_parser, run_command
from training.common.errors import UserError
from training.common.executor import run_in_workers
from training.common.outputs import check_output, write_whole
from training.common.run_folder import DATA
from training.config.recipe import Stage, load_recipe
from training.data.cldr.sources import build_cldr
from training.data.prepared import PreparedSource, find_prepared
from training.evaluation.pairs import Pairs, encode_pairs, load_pairs, nearest
from training.models.encoders import load_encoder
from training.models.encoding import embed_chunk, packed_texts
from training.models.loading import load_whole_model
from training.models.model_ref import resolve
from training.stages.stage import run_stage

logger = logging.getLogger("training")

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "claims" / "recipe.yaml"


class Claim(NamedTuple):
    """A stage of the recipe that should score higher than another by a metric of :func:`measure`."""

    statement: str
    better: str
    worse: str
    metric: str


CLAIMS = (
    Claim("distilled > not distilled", "student", "student_undistilled", "held_out"),
    Claim("pruned start > random start", "student", "student_random", "held_out"),
    Claim("two stages > stage 2 alone", "stage2", "stage2_alone", "held_out"),
    Claim("matryoshka > plain at 1/8 of the width", "stage1", "stage1_plain", "narrow"),
    Claim("instruction > none on the mixed tasks", "stage2", "stage2_raw", "mixed"),
)


def mixed_accuracy(model: F2LLMModel, sources: Sequence[PreparedSource]) -> float:
    """Return the share of validation rows whose query is nearest to its passage, not to a negative, over sources."""
    scores = [_row_accuracy(model, source) for source in sources if len(source.rows["validation"])]
    if not scores:
        raise UserError("no source has validation rows to judge mixed tasks by; raise 'validation_share', as in 0.05")
    return statistics.fmean(scores)


@torch.inference_mode()
def _row_accuracy(model: F2LLMModel, source: PreparedSource) -> float:
    rows = np.asarray(source.rows["validation"])[:, : 2 + source.num_negatives]
    texts, index = np.unique(rows, return_inverse=True)
    embeddings = torch.empty(len(texts), model.config.hidden_size)
    for batch in packed_texts(source, texts[texts >= 0], 8192):
        embeddings[np.searchsorted(texts, batch.positions)] = embed_chunk(model, batch.input_ids, batch.lengths)
    embeddings = torch.nn.functional.normalize(embeddings, dim=-1)[index.reshape(rows.shape)]
    cosines = torch.einsum("nd,nkd->nk", embeddings[:, 0], embeddings[:, 1:])
    # Rows with fewer negatives are filled with -1.
    cosines[torch.from_numpy(rows[:, 1:] < 0)] = -torch.inf
    return float((cosines[:, :1] > cosines[:, 1:]).all(dim=1).float().mean())


def measure(stage: Stage, model: Path, pairs: Pairs) -> dict[str, float]:
    """Return the scores of a stage's finished model, in percent.

    ``held_out`` is the accuracy@1 on held-out names, ``narrow`` that of an eighth of the width, and ``mixed`` that of
    the sources, each of which asks for something else about the same names, such as their currency.
    """
    encoded = encode_pairs(load_encoder(resolve(str(model), "output_dir"), "output_dir", device="cpu"), pairs)
    width = encoded.queries.shape[1]
    found = {}
    for name, dim in (("held_out", width), ("narrow", width // 8)):
        found[name] = float(pairs.hits(nearest(encoded.queries, encoded.candidates, dim)).mean())
    data = Path(stage.arguments.output_dir) / DATA
    folders = find_prepared(stage.arguments.prepared_folder, json.loads(data.read_text())) if data.exists() else []
    if folders:
        found["mixed"] = mixed_accuracy(load_whole_model(str(model)).eval(), [PreparedSource(f) for f in folders])
    return {name: 100 * score for name, score in found.items()}


def verdict(differences: Sequence[float]) -> str:
    """Return whether a claim holds in every seed, in none, or in some."""
    ahead, count = sum(difference > 0 for difference in differences), len(differences)
    words = {count: "yes", 0: "no"}.get(ahead, "undecided")
    return f"{words} ({ahead} of {count} seeds)"


def table(scores: Mapping[int, Mapping[str, Mapping[str, float]]]) -> str:
    """Format every claim in Markdown: mean ± deviation over seeds, whose stages share data, order and start."""
    lines = ["| claim | with | without | difference, points | shows |", "| --- " * 5 + "|"]
    for claim in CLAIMS:
        better, worse = (
            np.array([of[stage][claim.metric] for of in scores.values()]) for stage in (claim.better, claim.worse)
        )
        numbers = [
            f"{values.mean():{sign}.1f} ± {values.std(ddof=len(values) > 1):.1f}"
            for values, sign in ((better, ""), (worse, ""), (better - worse, "+"))
        ]
        lines.append(f"| {' | '.join([claim.statement, *numbers, verdict(better - worse)])} |")
    return "\n".join(lines)


def run_seed(recipe: Path, seed: int, output: Path, manifest: Path, pairs: Pairs) -> dict[str, dict[str, float]]:
    """Train (unless it is finished) and score every stage with one seed."""
    overrides = {"seed": seed, "output_dir": str(output / f"seed-{seed}"), "manifest": str(manifest)}
    scores = {}
    for stage in load_recipe(recipe, overrides).stages:
        scores[stage.name] = measure(stage, run_stage(stage, resume=True), pairs)
        shown = ", ".join(f"{name} {score:.1f}" for name, score in scores[stage.name].items())
        logger.info("seed %d, %s: %s", seed, stage.name, shown)
    return scores


def _prepare_worker() -> None:
    # Small models gain nothing from a second thread, and lose much where threads wait for a busy core.
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for library in ("httpx", "sentence_transformers"):
        logging.getLogger(library).setLevel(logging.WARNING)
    disable_progress_bar()


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = command_parser("claims.py", __doc__)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of every arm (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/claims"), help="folder to write (%(default)s)")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="recipe with a stage for each arm")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = make_parser().parse_args(words)
    return run_command(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    if arguments.seeds < 1:
        raise UserError("--seeds must be at least 1")
    stages = {stage.name for stage in load_recipe(arguments.recipe).stages}
    if missing := sorted({arm for claim in CLAIMS for arm in (claim.better, claim.worse)} - stages):
        raise UserError(f"{arguments.recipe}: lacks the stages {', '.join(missing)}, which are compared; see {RECIPE}")
    check_output(arguments.output, [arguments.recipe], ["data", "seed-*", "claims.json", "claims.md", ".*"])
    data = build_cldr(arguments.output / "data")
    pairs = load_pairs(data / "held_out.parquet", data / "candidates.parquet")
    scores: dict[int, dict[str, dict[str, float]]] = {}
    work = (arguments.output, data / "manifest.yaml", pairs)
    seeds = [(arguments.recipe, seed, *work) for seed in range(arguments.seeds)]
    # Each trains on one thread.
    processes = min(2 * (os.cpu_count() or 1), arguments.seeds)
    for (_, seed, *_), found in run_in_workers(run_seed, seeds, processes, initializer=_prepare_worker):
        scores[seed] = found
        # After each seed: an interrupted run keeps what it has.
        write_whole(arguments.output / "claims.json", json.dumps(scores, indent=2) + "\n")
        write_whole(arguments.output / "claims.md", table(scores) + "\n")
    sys.stdout.write(table(scores) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
