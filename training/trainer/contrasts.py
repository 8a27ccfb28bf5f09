"""Whether the rows of sources have anything to be told from; a loss of 0 teaches nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from training.common.errors import UserError
from training.config.arguments import StageArguments
from training.data.manifest import Source
from training.data.prepared import PreparedSource

logger = logging.getLogger("training")

_OTHERS = "or train on other sources with 'task_types: [retrieval]' or 'sources'"


def check_contrasts(args: StageArguments, sources: Sequence[Source | PreparedSource]) -> None:
    """Refuses clustering and classification without hard negatives, which are all that they learn from.

    A teacher makes up for them.

    Args:
        args: The stage.
        sources: Its sources, before they are prepared or after.

    Raises:
        UserError: If a source can teach nothing.
    """
    if _is_taught(args):
        return
    for source in sources:
        kind = source.task_type
        if kind == "retrieval":
            continue
        learns = f"source {source.name!r}: {kind} learns from hard negatives alone, and"
        if not args.num_hard_negatives[kind]:
            default = type(args).__dataclass_fields__[f"num_hard_negatives_{kind}"].default
            raise UserError(f"{learns} none are drawn; write 'num_hard_negatives_{kind}: {default}', {_OTHERS}")
        if isinstance(source, PreparedSource) and not source.num_negatives:
            raise UserError(f"{learns} its files have no column 'negative_1'; add negatives to them, {_OTHERS}")


def warn_of_single_rows(args: StageArguments, sources: Sequence[PreparedSource]) -> None:
    """Warns of retrieval sources some of whose batches have one row and no hard negative.

    Args:
        args: The stage.
        sources: Its sources.
    """
    for source in sources:
        rows = len(source.rows["train"])
        if source.task_type != "retrieval" or not rows or _is_taught(args):
            continue
        batches = -(-rows // args.global_batch_size)
        # Batches differ by one row at most.
        single = 2 * batches - rows
        if single > 0 and not min(args.num_hard_negatives["retrieval"], source.num_negatives):
            remedy = "write 'global_batch_size: 3' or more, or give" if rows > 1 else "add rows, or give"
            logger.warning(
                "source %r: %d of its %d batches have one row and no hard negative, so that nothing is learnt from "
                "them; %s its rows hard negatives and write 'num_hard_negatives_retrieval: 1' or more",
                source.name,
                single,
                batches,
                remedy,
            )


def _is_taught(args: StageArguments) -> bool:
    return args.teacher is not None and args.distillation_weight > 0
