"""Ablations behind the paper's claims, in miniature: trains every arm with several seeds and says what comes out.

python training/examples/claims.py [--seeds 3] [--output runs/claims]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from modeling_f2llm.modeling_f2llm import F2LLMModel
from training.common.command import run_command
from training.common.errors import OutputError, StoppedError, UserError
from training.common.outputs import check_output
from training.common.run_folder import DATA, write_whole
from training.common.workers import run_in_workers
from training.config.recipe import Stage, load_recipe
from training.data.cldr.build import build_cldr
from training.data.prepared import PreparedSource, find_prepared
from training.evaluation.pairs import Pairs, load_pairs, nearest
from training.models.encoders import load_encoder
from training.models.encoding import embed_chunk
from training.models.loading import load_whole_model
from training.models.packed_texts import packed_texts
from training.models.reference import resolve
from training.stages.stage import run_stage

logger = logging.getLogger("training")

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "claims" / "recipe.yaml"
_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Claim:
    """One arm of the recipe should come out ahead of another.

    Attributes:
        statement: What the paper says, in short.
        better: The stage that should be ahead.
        worse: The stage that it is compared with.
        metric: What decides: ``held_out`` (accuracy@1 on held-out names at full width), ``narrow`` (the same at an
            eighth of the width) or ``mixed`` (see :func:`mixed_accuracy`).
        published: What the paper reports for it.
    """

    statement: str
    better: str
    worse: str
    metric: str
    published: str


CLAIMS = (
    Claim(
        "distilled > not distilled",
        "student",
        "student_undistilled",
        "held_out",
        "+4.67, +4.26, +1.78 points for 80M, 160M, 330M (Table 4)",
    ),
    Claim("pruned start > random start", "student", "student_random", "held_out", "the method; no figure"),
    Claim("two stages > stage 2 alone", "stage2", "stage2_alone", "held_out", "the method; no figure"),
    Claim(
        "matryoshka > plain at 1/8 of the width",
        "stage1",
        "stage1_plain",
        "narrow",
        "steep gains from 8 to 128 dimensions, then a plateau (Figure 5); no figure without",
    ),
    Claim("instruction > none on the mixed tasks", "stage2", "stage2_raw", "mixed", "the method; no figure"),
)


@dataclass(frozen=True)
class Outcome:
    """What came out of a claim.

    Attributes:
        claim: The claim.
        better: Score of the arm that should be ahead, by seed, in percent.
        worse: Score of the other arm by seed.
    """

    claim: Claim
    better: list[float]
    worse: list[float]

    @property
    def differences(self) -> list[float]:
        """Percentage points by seed: both arms of a seed share data, order and where they start from."""
        return [a - b for a, b in zip(self.better, self.worse, strict=True)]

    @property
    def verdict(self) -> str:
        """Whether the claim shows: in every seed, in none of them, or now and then."""
        ahead = sum(difference > 0 for difference in self.differences)
        count = len(self.differences)
        words = {count: "shows", 0: "does not show"}.get(ahead, "undecided")
        return f"{words} ({ahead} of {count} seeds)"


def mixed_accuracy(model: F2LLMModel, sources: Sequence[PreparedSource]) -> float:
    """Share of validation rows whose query is nearer to its passage than to every negative, mean over the sources.

    Every source asks something else of the same names: their English form, their currency, names of the same kind or of
    the same language.

    Raises:
        UserError: If no source has a validation row.
    """
    scores = [score for source in sources if (score := _row_accuracy(model, source)) is not None]
    if not scores:
        raise UserError("no source has validation rows to judge mixed tasks by; raise 'validation_share', as in 0.05")
    return statistics.fmean(scores)


@torch.inference_mode()
def _row_accuracy(model: F2LLMModel, source: PreparedSource) -> float | None:
    rows = np.asarray(source.rows["validation"])
    if not len(rows):
        return None
    texts, index = np.unique(rows, return_inverse=True)
    embeddings = torch.empty(len(texts), model.config.hidden_size)
    for batch in packed_texts(source, texts[texts >= 0], _TOKENS_AT_ONCE):
        embeddings[np.searchsorted(texts, batch.positions)] = embed_chunk(model, batch.input_ids, batch.lengths)
    embeddings = torch.nn.functional.normalize(embeddings, dim=-1)[index.reshape(rows.shape)]
    cosines = torch.einsum("nd,nkd->nk", embeddings[:, 0], embeddings[:, 1:])
    # A row that has fewer negatives is filled with -1.
    cosines[torch.from_numpy(rows[:, 1:] < 0)] = -torch.inf
    return float((cosines[:, :1] > cosines[:, 1:]).all(dim=1).float().mean())


def measure(stage: Stage, model: Path, pairs: Pairs) -> dict[str, float]:
    """Scores a stage's finished model, in percent."""
    encoder = load_encoder(resolve(str(model), "output_dir"), "output_dir", device="cpu")
    options = {"convert_to_tensor": True, "show_progress_bar": False, "batch_size": 256}
    queries = encoder.encode_query(pairs.queries, **options).float()
    candidates = encoder.encode_document(pairs.candidates, **options).float()
    width = queries.shape[1]
    found = {
        name: float(pairs.hits(nearest(queries, candidates, dim)).mean())
        for name, dim in (("held_out", width), ("narrow", width // 8))
    }
    noted = Path(stage.arguments.output_dir) / DATA
    folders = find_prepared(stage.arguments.prepared_folder, json.loads(noted.read_text())) if noted.exists() else []
    if folders:
        found["mixed"] = mixed_accuracy(load_whole_model(str(model)).eval(), [PreparedSource(f) for f in folders])
    return {name: 100 * score for name, score in found.items()}


def compare(scores: Mapping[int, Mapping[str, Mapping[str, float]]]) -> list[Outcome]:
    """Judges every claim.

    Args:
        scores: Metrics of each stage by seed.
    """
    return [
        Outcome(
            claim,
            [of_seed[claim.better][claim.metric] for of_seed in scores.values()],
            [of_seed[claim.worse][claim.metric] for of_seed in scores.values()],
        )
        for claim in CLAIMS
    ]


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table: percent, mean ± standard deviation over the seeds."""
    lines = [
        "| claim | ahead | behind | difference, points | here | published |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        numbers = [_mean_and_deviation(each) for each in (outcome.better, outcome.worse)]
        difference = _mean_and_deviation(outcome.differences, sign=True)
        cells = [outcome.claim.statement, *numbers, difference, outcome.verdict, outcome.claim.published]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean_and_deviation(values: Sequence[float], sign: bool = False) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{'+' if sign else ''}.1f} ± {deviation:.1f}"


def run_seed(recipe: Path, seed: int, output: Path, manifest: Path, pairs: Pairs) -> dict[str, dict[str, float]]:
    """Trains and scores every stage with one seed; finished stages are found, not trained again."""
    overrides = {"seed": seed, "output_dir": str(output / f"seed-{seed}"), "manifest": str(manifest)}
    scores = {}
    for stage in load_recipe(recipe, overrides).stages:
        start = time.perf_counter()
        try:
            model = run_stage(stage, resume=True)
        except StoppedError as error:
            # How to go on is this command's to say.
            raise StoppedError(f"seed {seed}, stage {stage.name}: {error.what}") from error
        except OutputError as error:
            raise error.advising("mend or undo that, or give another --output") from None
        scores[stage.name] = measure(stage, model, pairs)
        shown = ", ".join(f"{name} {score:.1f}" for name, score in scores[stage.name].items())
        logger.info("seed %d, %s: %s (%.0f s)", seed, stage.name, shown, time.perf_counter() - start)
    return scores


def _prepare_worker() -> None:
    """Models of this size gain nothing from a second thread, and lose much where threads wait for a busy core."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for library in ("httpx", "sentence_transformers"):
        logging.getLogger(library).setLevel(logging.WARNING)
    disable_progress_bar()


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of every arm")
    parser.add_argument(
        "--processes", type=int, default=2 * (os.cpu_count() or 1), help="seeds trained at once, each on one thread"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/claims"), help="folder of data, models and results")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="recipe with a stage for each arm")
    arguments = parser.parse_args(words)
    for name in ("seeds", "processes"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command line; see :func:`~training.common.command.run_command` for its exit status."""
    disable_progress_bar()
    arguments = _arguments(words)
    return run_command(lambda: _run(arguments))


def _check_arms(recipe: Path) -> None:
    stages = {stage.name for stage in load_recipe(recipe).stages}
    if missing := sorted({arm for claim in CLAIMS for arm in (claim.better, claim.worse)} - stages):
        raise UserError(f"{recipe}: lacks the stages {', '.join(missing)}, which the claims compare; see {RECIPE}")


def _run(arguments: argparse.Namespace) -> None:
    _check_arms(arguments.recipe)
    check_output(arguments.output, [arguments.recipe], ["data", "seed-*", "claims.json", "claims.md", ".*"])
    data = build_cldr(arguments.output / "data")
    pairs = load_pairs(data / "held_out.parquet", data / "candidates.parquet")
    results: dict[str, Any] = {"scores": {}}
    start = time.perf_counter()
    work = (arguments.output, data / "manifest.yaml", pairs)
    seeds = [(arguments.recipe, seed, *work) for seed in range(arguments.seeds)]
    for (_, seed, *_), scores in run_in_workers(
        run_seed, seeds, min(arguments.processes, arguments.seeds), initializer=_prepare_worker
    ):
        results["scores"][seed] = scores
        outcomes = compare(results["scores"])
        results["claims"] = [{**asdict(outcome), "verdict": outcome.verdict} for outcome in outcomes]
        results["seconds"] = round(time.perf_counter() - start)
        # After each seed: a run that is cut short leaves what it has.
        write_whole(arguments.output / "claims.json", json.dumps(results, indent=2) + "\n")
        write_whole(arguments.output / "claims.md", table(outcomes) + "\n")
    sys.stdout.write(table(outcomes) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
