"""The pairs that a stage of a recipe evaluates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from training.config.arguments import StageArguments
from training.evaluation.pairs import Pairs, load_pairs


def load_stage_pairs(args: StageArguments) -> Pairs | None:
    """The pairs of a stage; None if it evaluates none.

    Raises:
        UserError: If they are missing or faulty.
    """
    return load_pairs(args.evaluation_pairs, args.evaluation_candidates) if args.evaluation_pairs else None


def check_stage_pairs(stages: Sequence[StageArguments]) -> None:
    """Reads the pairs of all stages, so that a fault in them shows before the first one runs.

    Files that are missing may be what the builder of one of the stages makes; they are read after it.

    Raises:
        UserError: If pairs are faulty, or missing and no stage has a builder.
    """
    builds = any(args.builder is not None for args in stages)
    for args in stages:
        files = [name for name in (args.evaluation_pairs, args.evaluation_candidates) if name is not None]
        if not builds or all(Path(name).exists() for name in files):
            load_stage_pairs(args)
