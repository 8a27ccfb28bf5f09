"""Ablations of the paper's claims in miniature: train every arm with several seeds and say what is shown.

python training/examples/claims.py [--seeds 5] [--output runs/claims]
"""

from __future__ import annotations

import argparse
import json
import logging
import math
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
from scipy.stats import t
from torch import Tensor
from torch.nn.functional import normalize as unit
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
from training.evaluation.significance import LEVEL, paired_test
from training.models.encoders import load_encoder
from training.models.encoding import embed_chunk, packed_texts
from training.models.loading import load_whole_model
from training.models.model_ref import resolve
from training.stages.stage import run_stage
from training.trainer.batches import epoch_batches

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
    Claim("two stages > stage 2 alone, as many steps", "stage2", "stage2_alone", "held_out"),
    Claim("matryoshka > plain at 1/8 of the width", "stage1", "stage1_plain", "narrow"),
    Claim("instruction > none, candidates of three tasks", "stage2", "stage2_raw", "shared"),
    Claim("instruction > none, each row's own candidates", "stage2", "stage2_raw", "own"),
)
# A stage that is given as many steps as others have together.
_STEPS_OF = {"stage2_alone": ("stage1", "stage2")}
# Sources that ask for different things about the same names; their passages are the candidates of all of them.
TASKS = ("cldr_translation", "cldr_territory_currency", "cldr_territory_language")
_TOKENS_AT_ONCE = 8192
# Whether each example of a measurement was right, by group: the score is the mean of the groups' means.
Hits = list[np.ndarray]


@torch.inference_mode()
def _embed(model: F2LLMModel, source: PreparedSource, positions: np.ndarray) -> Tensor:
    """``(…)`` positions of texts → ``(…, d)`` embeddings of length 1."""
    texts, index = np.unique(positions, return_inverse=True)
    embeddings = torch.empty(len(texts), model.config.hidden_size)
    for batch in packed_texts(source, texts, _TOKENS_AT_ONCE):
        embeddings[np.searchsorted(texts, batch.positions)] = embed_chunk(model, batch.input_ids, batch.lengths)
    return unit(embeddings, dim=-1)[index.reshape(positions.shape)]


def own_hits(model: F2LLMModel, sources: Sequence[PreparedSource]) -> Hits:
    """Return ``(n,)`` by source: is the query of a validation row nearer to its passage than to its negatives?"""
    found = []
    for source in sources:
        rows = np.asarray(source.rows["validation"])[:, : 2 + source.num_negatives]
        # Rows with fewer negatives are filled with -1.
        embeddings, missing = _embed(model, source, np.maximum(rows, 0)), torch.from_numpy(rows[:, 1:] < 0)
        cosines = torch.einsum("nd,nkd->nk", embeddings[:, 0], embeddings[:, 1:]).masked_fill(missing, -torch.inf)
        found.append((cosines[:, :1] > cosines[:, 1:]).all(dim=1).numpy())
    return _with_examples(found)


def shared_hits(model: F2LLMModel, sources: Sequence[PreparedSource]) -> Hits:
    """Return ``(n,)`` by source: is one of its passages for a validation query the nearest of all sources' passages?

    Texts that differ only in spelling or by an instruction are one: candidates are read without an instruction where
    there is such a text, and queries come once, in an order that depends on their texts alone.
    """
    if not sources or not all(source.has_forms for source in sources):
        raise UserError(f"stage 2 is compared on {', '.join(TASKS)}, with 'mask_duplicates: true'; give it these")
    passages = [np.unique(np.concatenate([rows[:, 1] for rows in source.rows.values()])) for source in sources]
    forms, lengths = (
        np.concatenate([take(own) for take, own in zip(taken, passages, strict=True)])
        for taken in ([source.forms for source in sources], [source.lengths for source in sources])
    )
    order = np.lexsort((lengths, forms))
    distinct, first = np.unique(forms[order], return_index=True)
    chosen, start = order[first], 0
    candidates = torch.empty(len(distinct), model.config.hidden_size)
    for source, own in zip(sources, passages, strict=True):
        here = (chosen >= start) & (chosen < start + len(own))
        candidates[here] = _embed(model, source, own[chosen[here] - start])
        start += len(own)
    found = []
    for source in sources:
        rows = np.asarray(source.rows["validation"])
        queries, first, of_row = np.unique(source.forms(rows[:, 0]), return_index=True, return_inverse=True)
        right = of_row * len(distinct) + np.searchsorted(distinct, source.forms(rows[:, 1]))
        best = nearest(_embed(model, source, rows[first, 0]), candidates, candidates.shape[1])
        found.append(np.isin(np.arange(len(queries)) * len(distinct) + best, right))
    return _with_examples(found)


def _with_examples(found: Hits) -> Hits:
    if found := [hits for hits in found if len(hits)]:
        return found
    raise UserError("no source has validation rows to judge tasks by; raise 'validation_share', as in 0.05")


def _sources_of(stage: Stage) -> list[PreparedSource]:
    fingerprints = json.loads((Path(stage.arguments.output_dir) / DATA).read_text())
    return [PreparedSource(folder) for folder in find_prepared(stage.arguments.prepared_folder, fingerprints)]


def measure(stage: Stage, model: Path, pairs: Pairs) -> dict[str, Hits]:
    """Return what a claim needs of a stage's finished model.

    ``held_out`` is the accuracy@1 on held-out names and ``narrow`` that of an eighth of the width; ``shared`` and
    ``own`` are on validation rows of the sources, which ask for different things about the same names.
    """
    wanted = {claim.metric for claim in CLAIMS if stage.name in (claim.better, claim.worse)}
    found = {}
    if wanted & {"held_out", "narrow"}:
        encoded = encode_pairs(load_encoder(resolve(str(model), "output_dir"), "output_dir", device="cpu"), pairs)
        width = encoded.queries.shape[1]
        found = {name: [encoded.hits(dim)] for name, dim in (("held_out", width), ("narrow", width // 8))}
    if "shared" in wanted:
        whole, sources = load_whole_model(str(model)).eval(), _sources_of(stage)
        found["shared"] = shared_hits(whole, [source for source in sources if source.name in TASKS])
        found["own"] = own_hits(whole, sources)
    return found


def score(hits: Hits) -> float:
    """Return the mean of the groups' means, in percent."""
    return 100 * statistics.fmean(float(each.mean()) for each in hits)


def verdict(p_value: float, differences: np.ndarray) -> tuple[float, str]:
    """Return half of the 95 % interval over ``(n,)`` seeds of a mean difference, and whether a claim is shown.

    ``p_value`` is that of the paired test over examples. Student's t over seeds also contains what another start and
    order would change, which no number of examples does. One seed has no such interval.
    """
    count, mean = len(differences), differences.mean()
    half = t.ppf((1 + LEVEL) / 2, count - 1) * differences.std(ddof=1) / count**0.5 if count > 1 else np.inf
    if p_value > 1 - LEVEL or abs(mean) <= half:
        return half, "not shown"
    return half, "shown" if mean > 0 else "contradicted"


def table(found: Mapping[int, Mapping[str, Mapping[str, Hits]]]) -> str:
    """Format every claim in Markdown, in points: mean ± deviation over seeds, whose stages share data and order."""
    head = ["claim", "with", "without", "difference", "95 % over examples", f"95 % over {len(found)} seeds", "verdict"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for claim in CLAIMS:
        sides = [[of[name][claim.metric] for of in found.values()] for name in (claim.better, claim.worse)]
        better, worse = (np.array([score(hits) for hits in side]) for side in sides)
        test = paired_test(*([group for hits in side for group in hits] for side in sides))
        half, word = verdict(test.p_value, better - worse)
        numbers = [
            f"{values.mean():{sign}.1f} ± {values.std(ddof=len(values) > 1):.1f}"
            for values, sign in ((better, ""), (worse, ""), (better - worse, "+"))
        ]
        mean = (better - worse).mean()
        intervals = [(100 * test.difference.low, 100 * test.difference.high), (mean - half, mean + half)]
        numbers += [f"{low:+.1f} to {high:+.1f}" if np.isfinite(low) else "–" for low, high in intervals]
        lines.append(f"| {' | '.join([claim.statement, *numbers, word])} |")
    return "\n".join(lines)


def steps_of(stage: Stage) -> int:
    """Return the steps of a stage whose sources are prepared."""
    args = stage.arguments
    batches, _ = epoch_batches([len(source.rows["train"]) for source in _sources_of(stage)], args.global_batch_size)
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * int(batches.sum()))


def depths(stages: Sequence[Stage]) -> dict[str, int]:
    """Return by stage how many stages one after the other must be finished before it can run."""
    found: dict[str, int] = {}
    for stage in stages:
        args = stage.arguments
        read = [Path(name) for name in (args.model, args.teacher, args.tokenizer, args.prepared_dir) if name]
        makers = {
            other.name
            for other in stages
            if other.name in found and any(path.is_relative_to(other.arguments.output_dir) for path in read)
        }
        found[stage.name] = 1 + max((found[name] for name in makers.union(_STEPS_OF.get(stage.name, ()))), default=-1)
    return found


def run_arm(recipe: Path, seed: int, name: str, output: Path, manifest: Path, pairs: Pairs) -> dict[str, Hits]:
    """Train (unless it is finished) and measure a stage with one seed."""
    overrides = {"seed": seed, "output_dir": str(output / f"seed-{seed}"), "manifest": str(manifest)}
    stages = {stage.name: stage for stage in load_recipe(recipe, overrides).stages}
    if name in _STEPS_OF:
        steps = {"max_steps": sum(steps_of(stages[other]) for other in _STEPS_OF[name])}
        stages = {stage.name: stage for stage in load_recipe(recipe, overrides | steps).stages}
    found = measure(stages[name], run_stage(stages[name], resume=True), pairs)
    shown = ", ".join(f"{metric} {score(hits):.1f}" for metric, hits in found.items())
    logger.info("seed %d, %s: %s", seed, name, shown or "done")
    return found


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
    parser.add_argument("--seeds", type=int, default=5, help="trainings of every arm (%(default)s)")
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
    stages = depths(load_recipe(arguments.recipe).stages)
    if missing := sorted({arm for claim in CLAIMS for arm in (claim.better, claim.worse)} - {*stages}):
        raise UserError(f"{arguments.recipe}: lacks the stages {', '.join(missing)}, which are compared; see {RECIPE}")
    check_output(arguments.output, [arguments.recipe], ["data", "seed-*", "claims.json", "claims.md", ".*"])
    # As many negatives as the recipe reads, so that every stage prepares its data in a fraction of the time.
    data = build_cldr(arguments.output / "data", num_negatives=2)
    pairs = load_pairs(data / "held_out.parquet", data / "candidates.parquet")
    work = (arguments.output, data / "manifest.yaml", pairs)
    found: dict[int, dict[str, dict[str, Hits]]] = {seed: {} for seed in range(arguments.seeds)}
    # Stages that wait for the same number of others run side by side, with all seeds, each on one thread.
    for depth in range(max(stages.values()) + 1):
        arms = [(arguments.recipe, seed, name, *work) for seed in found for name in stages if stages[name] == depth]
        processes = min(os.cpu_count() or 1, len(arms))
        for (_, seed, name, *_), hits in run_in_workers(run_arm, arms, processes, initializer=_prepare_worker):
            found[seed][name] = hits
            scores = {
                seed: {stage: {metric: score(each) for metric, each in own.items()} for stage, own in of.items()}
                for seed, of in found.items()
            }
            write_whole(arguments.output / "claims.json", json.dumps(scores, indent=2) + "\n")
    write_whole(arguments.output / "claims.md", table(found) + "\n")
    sys.stdout.write(table(found) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
