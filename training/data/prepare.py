"""From the published format to prepared sources: every distinct text tokenised once, rows turned into integers.

python training/data/prepare.py --manifest data/manifest.yaml --tokenizer Qwen/Qwen3-0.6B --output data/prepared
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # Run as a script from a checkout: the recipe is not an installed package.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_f2llm.tokenizer import append_eos
from training.data.executor import Executor, Phase, SubmittedError, run_phases
from training.data.manifest import Source
from training.data.options import PreparationOptions
from training.data.preparation.assembly import FORMAT, assemble
from training.data.preparation.placing import place_shard
from training.data.preparation.plan import PreparationPlan, make_plan
from training.data.preparation.reading import read_shard
from training.data.preparation.tokenising import tokenise_partition
from training.data.prepared import (
    DESCRIPTION,
    FORMS,
    OFFSETS,
    QUARANTINE,
    SPLITS,
    TEXT_OFFSETS,
    TEXTS,
    TOKENS,
    PreparedSource,
)
from training.data.storage import identity
from training.errors import UserError

__all__ = ["prepare", "prepare_source"]

logger = logging.getLogger(__name__)

# Fewer texts are done before more processes have started.
_CELLS_WORTH_PROCESSES = 1_000_000
# What a source says of itself that no prepared byte depends on.
_WITHOUT_EFFECT = ("category", "licence")


def prepare(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | str,
    options: PreparationOptions,
    executor: Executor | None = None,
) -> list[PreparedSource]:
    """Prepares each source into a subfolder of its name, reusing those that are finished and unchanged.

    The same bytes come out wherever and however the work is done. A run that was killed goes on where it was.

    Args:
        sources: What to prepare.
        tokenizer: A fast tokenizer with an EOS token.
        folder: Where the prepared sources go.
        options: How.
        executor: Where; processes on this machine if None, more than one if there is enough to do.

    Raises:
        UserError: If a source is faulty, or the tokenizer has no EOS. Sources prepared before it stay.
        SubmittedError: If the executor works on its own; all sources are submitted then.
    """
    try:
        append_eos(tokenizer)
    except ValueError as error:
        raise UserError(str(error)) from None
    folder, prepared, submitted = Path(folder), [], None
    for source in tqdm(sources, desc="prepare", unit="source", disable=None):
        try:
            prepared.append(prepare_source(source, tokenizer, folder / source.name, options, executor))
        except SubmittedError as error:
            submitted = error
        else:
            _tell_same(prepared[-1])
    if submitted is not None:
        raise submitted
    return prepared


def prepare_source(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    options: PreparationOptions,
    executor: Executor | None = None,
) -> PreparedSource:
    """Prepares one source; the folder is whole or absent.

    A finished source that has texts, or their forms, serves where none are needed, but not the other way round.
    """
    backend = _as_json(tokenizer)
    fingerprint = _fingerprint(source, backend, options)
    work = folder.with_name(f".{folder.name}.partial")
    finished = _finished(folder, fingerprint, options)
    if finished is not None:
        # Left by a run that was killed while it cleared up.
        shutil.rmtree(work, ignore_errors=True)
        return finished
    ours = {TOKENS, OFFSETS, FORMS, TEXTS, TEXT_OFFSETS, DESCRIPTION, QUARANTINE, *SPLITS.values()}
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - ours):
        raise UserError(f"{folder}: the folder holds something else than a prepared source; give another prepared_dir")
    plan = make_plan(source, work, options)
    _start_or_go_on(plan, backend, fingerprint)
    _run(plan, executor)
    whole = plan.folder / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    assemble(plan, whole, fingerprint)
    shutil.rmtree(folder, ignore_errors=True)
    whole.rename(folder)
    shutil.rmtree(plan.folder)
    prepared = PreparedSource(folder)
    logger.info("prepared %s", prepared)
    return prepared


def _tell_same(source: PreparedSource) -> None:
    """Warns of rows whose query is their passage; they are trained on."""
    same, rows = source.description["query_is_passage"], source.description["rows"]
    if same:
        logger.warning(
            "source %r: in %d of %d rows the query is the passage, in whatever spelling; these teach next to nothing",
            source.name,
            same,
            sum(rows.values()),
        )


def _finished(folder: Path, fingerprint: str, options: PreparationOptions) -> PreparedSource | None:
    """The prepared source in a folder, if it is whole and was made of the same."""
    try:
        prepared = PreparedSource(folder)
    except UserError:
        return None
    if prepared.description.get("fingerprint") != fingerprint:
        return None
    if (options.keep_texts and not prepared.has_texts) or (options.text_forms and not prepared.has_forms):
        return None
    return prepared


def _as_json(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = tokenizer.backend_tokenizer
    # The truncation and padding of the last call would be part of the JSON.
    backend.no_truncation()
    backend.no_padding()
    return backend.to_str()


def _fingerprint(source: Source, tokenizer: str, options: PreparationOptions) -> str:
    """Changes with anything that the prepared rows and tokens depend on; texts may lie beside them or not."""
    digest = hashlib.blake2b(digest_size=16)
    described = {**asdict(source), "files": [identity(file) for file in source.files]}
    for key in _WITHOUT_EFFECT:
        described.pop(key)
    # Other task types' negatives do not matter to this source.
    chosen = {**asdict(options), "num_hard_negatives": dict(options.num_hard_negatives)[source.task_type]}
    for key in ("keep_texts", "text_forms"):
        chosen.pop(key)
    digest.update(json.dumps([FORMAT, described, chosen]).encode())
    digest.update(tokenizer.encode())
    return digest.hexdigest()


def _start_or_go_on(plan: PreparationPlan, tokenizer: str, fingerprint: str) -> None:
    """Empties the folder of the work unless it holds a part of the same work."""
    begun = plan.folder / "fingerprint"
    # Tasks that are done have kept their texts or not: a part of the one is no part of the other.
    kept = {"texts": plan.options.keep_texts, "forms": plan.options.text_forms}
    ours = " with ".join([fingerprint, *(what for what, there in kept.items() if there)])
    if not begun.exists() or begun.read_text() != ours:
        shutil.rmtree(plan.folder, ignore_errors=True)
        plan.make_folders()
        plan.tokenizer_file.write_text(tokenizer, encoding="utf-8")
        begun.write_text(ours)


def _run(plan: PreparationPlan, executor: Executor | None) -> None:
    executor = executor or Executor()
    if executor.name == "local" and executor.workers is None and plan.cells < _CELLS_WORTH_PROCESSES:
        executor = replace(executor, workers=1)
    phases = [
        Phase("read", partial(read_shard, plan), len(plan.shards)),
        Phase("tokenise", partial(tokenise_partition, plan), plan.partitions),
        Phase("place", partial(place_shard, plan), len(plan.shards)),
    ]
    run_phases(phases, plan.folder / "tasks", executor)


if __name__ == "__main__":
    from training.data.prepare_command import main

    raise SystemExit(main())
