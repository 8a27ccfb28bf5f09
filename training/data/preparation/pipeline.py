"""From the published format to prepared sources: each distinct text tokenised once, rows as integers."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_f2llm.tokenizer import append_eos
from training.common.errors import UserError
from training.common.executor import Executor, Phase, SubmittedError, run_phases
from training.common.outputs import check_output, checksums_of, locked, move_into_place, write_whole
from training.data.manifest import Source
from training.data.preparation.plan import PreparationOptions, make_plan
from training.data.preparation.reading import read_shard
from training.data.preparation.writing import (
    FORMAT,
    assemble,
    choose_validation,
    join_hashes,
    place_shard,
    tokenise_partition,
)
from training.data.prepared import FILE_PATTERNS, PreparedSource
from training.data.storage import identity

logger = logging.getLogger(__name__)

# Fewer texts take less time than starting processes.
_CELLS_WORTH_PROCESSES = 1_000_000


def prepare(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | str,
    options: PreparationOptions,
    executor: Executor | None = None,
) -> list[PreparedSource]:
    """Prepare each source into a subfolder of ``folder``, or find it there if it is finished and unchanged.

    Without an executor, tasks run on this machine, in several processes if there is enough to do. If it works
    asynchronously, ``SubmittedError`` is raised once all sources are submitted. The tokenizer must be a fast one.
    """
    for source in sources if options.instructions and options.query_prompt is None else ():
        if source.instruction is None:
            what = f"source {source.name!r} has no instruction, and there is no model whose query prompt could be used"
            raise UserError(f"{what}; add 'instruction' to the manifest, or prepare raw text with --raw")
    try:
        append_eos(tokenizer)
    except ValueError as error:
        raise UserError(str(error)) from None
    backend = tokenizer.backend_tokenizer
    # The truncation and padding of the last call would be part of the JSON.
    backend.no_truncation()
    backend.no_padding()
    as_json = backend.to_str()
    prepared, submitted = [], None
    for source in tqdm(sources, desc="prepare", unit="source", disable=None):
        try:
            prepared.append(_prepare_source(source, as_json, Path(folder), options, executor))
            prepared[-1].weight = source.weight
        except SubmittedError as error:
            submitted = error
    if submitted is not None:
        raise submitted
    for source in prepared:
        same, rows = source.description["query_is_passage"], sum(source.description["rows"].values())
        # Graded pairs of equal texts are compared with others.
        if same and source.task_type != "similarity":
            what = "in %d of %d rows the query is the passage in some spelling; these teach next to nothing"
            logger.warning(f"source %r: {what}", source.name, same, rows)
        if source.num_negatives == 0 and source.task_type == "retrieval":
            logger.info("%s: no negative columns: rows learn only from the other passages of their batch", source.name)
    return prepared


def _prepare_source(
    source: Source, tokenizer: str, folder: Path, options: PreparationOptions, executor: Executor | None
) -> PreparedSource:
    """Prepare one source into a subfolder that is complete or absent; of two commands that need it, one waits."""
    fingerprint = _fingerprint(source, tokenizer, options, folder)
    output = folder / f"{source.name}-{fingerprint[:16]}{'-texts' if options.keep_texts else ''}"
    # A finished source may be on a read-only disk, so it is looked for before the lock, and again under it.
    if (finished := _finished(output, fingerprint)) is not None:
        return finished
    with locked(output):
        if (finished := _finished(output, fingerprint)) is not None:
            return finished
        check_output(output, ours=FILE_PATTERNS, option="prepared_dir")
        plan = make_plan(source, output.with_name(f".{output.name}.partial"), options)
        # The folder's name holds the fingerprint: if it was begun, a killed command did part of the same work.
        if not plan.file("tokenizer").exists():
            plan.folder.mkdir(parents=True, exist_ok=True)
            write_whole(plan.file("tokenizer"), tokenizer)
        executor = executor or Executor()
        if executor.name == "local" and executor.workers is None and plan.cells < _CELLS_WORTH_PROCESSES:
            executor = replace(executor, workers=1)
        phases = [
            Phase("read", partial(read_shard, plan), len(plan.shards)),
            Phase("split", partial(choose_validation, plan), 1),
            Phase("tokenise", partial(tokenise_partition, plan), plan.partitions),
            Phase("join", partial(join_hashes, plan), 1),
            Phase("place", partial(place_shard, plan), len(plan.shards)),
        ]
        # A version that divides the source otherwise does not go on with these tasks.
        run_phases(phases, plan.folder / f"tasks-{len(plan.shards)}", executor)
        whole = plan.folder / "whole"
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        assemble(plan, whole, fingerprint)
        move_into_place(whole, output)
        shutil.rmtree(plan.folder)
    logger.info("prepared %s", source.name)
    return PreparedSource(output).check()


def _finished(folder: Path, fingerprint: str) -> PreparedSource | None:
    try:
        prepared = PreparedSource(folder)
    except UserError:
        return None
    whole = all(checksums_of(folder / name).exists() for name in prepared.mapped_files)
    return prepared.check() if whole and prepared.description.get("fingerprint") == fingerprint else None


def _fingerprint(source: Source, tokenizer: str, options: PreparationOptions, folder: Path) -> str:
    """Hash everything that the prepared rows and tokens depend on."""
    described = {**asdict(source), "files": [identity(file, folder / ".hashes") for file in source.files]}
    # No prepared byte depends on these, nor on the negatives of other task types.
    for key in ("category", "licence", "stages", "instruction_from", "weight"):
        del described[key]
    chosen = {**asdict(options), "num_hard_negatives": dict(options.num_hard_negatives).get(source.task_type, 0)}
    # Texts are stored beside the tokens or not.
    del chosen["keep_texts"]
    # Without them, the folders are those of before.
    if not options.document_scores or source.task_type == "similarity":
        del chosen["document_scores"]
    if source.instruction is not None or not options.instructions:
        del chosen["query_prompt"], chosen["document_prompt"]
    key = json.dumps([FORMAT, described, chosen]) + tokenizer
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
