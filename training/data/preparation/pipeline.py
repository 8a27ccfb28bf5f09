"""From the published format to prepared sources: every distinct text tokenised once, rows turned into integers."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from glob import escape
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_f2llm.tokenizer import append_eos
from training.common.checksums import checksums_of
from training.common.errors import UserError
from training.common.executor import Executor, Phase, SubmittedError, run_phases
from training.common.outputs import check_output, locked
from training.common.run_folder import publish, write_whole
from training.data.manifest import Source
from training.data.options import PreparationOptions
from training.data.preparation.assembly import FORMAT, assemble
from training.data.preparation.placing import place_shard
from training.data.preparation.plan import PreparationPlan, make_plan
from training.data.preparation.reading import read_shard
from training.data.preparation.splitting import choose_validation
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

logger = logging.getLogger(__name__)

# Fewer texts are done before more processes have started.
_CELLS_WORTH_PROCESSES = 1_000_000
# What a source says of itself that no prepared byte depends on.
_WITHOUT_EFFECT = ("category", "licence")
# Digits of the fingerprint in the name of a folder, and what follows them if texts are kept.
_DIGITS, _WITH_TEXTS = 16, "-texts"
# Where hashes of files are remembered, and what marks work that goes on without this command.
_HASHES, _SUBMITTED = ".hashes", "submitted"


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
            prepared.append(prepare_source(source, tokenizer, folder, options, executor))
        except SubmittedError as error:
            submitted = error
    if submitted is not None:
        raise submitted
    for source in prepared:
        _tell_same(source)
        if source.num_negatives == 0 and source.task_type == "retrieval":
            logger.info(
                "%s: no negative columns: its rows learn from the other passages of their batch alone", source.name
            )
    return prepared


def prepare_source(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    options: PreparationOptions,
    executor: Executor | None = None,
) -> PreparedSource:
    """Prepares one source into a subfolder that is whole or absent, or finds it there.

    The subfolder is named after the source and all that its content depends on: what another run reads, prepared with
    other settings, is never touched. Of two commands that need the same, one waits for the other. A finished source
    that has texts serves where none are needed, but not the other way round.

    Raises:
        UserError: If the source is faulty, or what was prepared before is damaged.
    """
    backend = _as_json(tokenizer)
    fingerprint = _fingerprint(source, backend, options, folder)
    name = f"{source.name}-{fingerprint[:_DIGITS]}"
    bare, with_texts = folder / name, folder / f"{name}{_WITH_TEXTS}"
    output = with_texts if options.keep_texts else bare
    _clear_leftovers(folder, source.name, output)
    serving = [with_texts] if options.keep_texts else [bare, with_texts]
    prepared = _find(serving, fingerprint)
    if prepared is None:
        with locked(output):
            prepared = _find(serving, fingerprint) or _prepare(source, backend, output, fingerprint, options, executor)
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


def _find(folders: Sequence[Path], fingerprint: str) -> PreparedSource | None:
    """The finished source in the first of these folders that holds it.

    Raises:
        UserError: If it is damaged.
    """
    for folder in folders:
        try:
            prepared = PreparedSource(folder)
        except UserError:
            continue
        if prepared.description.get("fingerprint") == fingerprint and _names(prepared) <= _there(folder):
            return prepared.check()
    return None


def _names(prepared: PreparedSource | None = None) -> set[str]:
    """The files of a finished source, but for its quarantine; all that there may be for None."""
    arrays = [TOKENS, OFFSETS, FORMS, *SPLITS.values(), TEXTS, TEXT_OFFSETS] if prepared is None else prepared.arrays
    return {DESCRIPTION, *arrays, *(checksums_of(Path(name)).name for name in arrays)}


def _there(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _prepare(
    source: Source,
    tokenizer: str,
    output: Path,
    fingerprint: str,
    options: PreparationOptions,
    executor: Executor | None,
) -> PreparedSource:
    check_output(output, ours={*_names(), QUARANTINE}, option="prepared_dir")
    plan = make_plan(source, output.with_name(f".{output.name}.partial"), options)
    if not plan.tokenizer_file.exists():
        # Not even begun. Otherwise the work goes on where a killed command left it: it has the name of this one.
        plan.make_folders()
        write_whole(plan.tokenizer_file, tokenizer)
    try:
        _run(plan, executor)
    except SubmittedError:
        # The work goes on when this command has ended, and its lock with it.
        (plan.folder / _SUBMITTED).touch()
        raise
    whole = plan.folder / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    assemble(plan, whole, fingerprint)
    publish(whole, output)
    shutil.rmtree(plan.folder)
    prepared = PreparedSource(output).check()
    logger.info("prepared %s", prepared)
    return prepared


def _clear_leftovers(folder: Path, name: str, output: Path) -> None:
    """Removes what killed commands began for this source with other settings, and nothing of one that is at work."""
    for work in folder.glob(f".{escape(name)}-*.partial"):
        begun = folder / work.name.removeprefix(".").removesuffix(".partial")
        digits = begun.name.removeprefix(f"{name}-").removesuffix(_WITH_TEXTS)
        if len(digits) != _DIGITS or (work / _SUBMITTED).exists() or (begun == output and not begun.exists()):
            continue
        with suppress(UserError), locked(begun, busy="is being prepared"):
            shutil.rmtree(work, ignore_errors=True)


def _as_json(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = tokenizer.backend_tokenizer
    # The truncation and padding of the last call would be part of the JSON.
    backend.no_truncation()
    backend.no_padding()
    return backend.to_str()


def _fingerprint(source: Source, tokenizer: str, options: PreparationOptions, folder: Path) -> str:
    """Changes with anything that the prepared rows and tokens depend on; texts may lie beside them or not."""
    digest = hashlib.blake2b(digest_size=16)
    described = {**asdict(source), "files": [identity(file, folder / _HASHES) for file in source.files]}
    for key in _WITHOUT_EFFECT:
        described.pop(key)
    # Other task types' negatives do not matter to this source.
    chosen = {**asdict(options), "num_hard_negatives": dict(options.num_hard_negatives)[source.task_type]}
    chosen.pop("keep_texts")
    digest.update(json.dumps([FORMAT, described, chosen]).encode())
    digest.update(tokenizer.encode())
    return digest.hexdigest()


def _run(plan: PreparationPlan, executor: Executor | None) -> None:
    executor = executor or Executor()
    if executor.name == "local" and executor.workers is None and plan.cells < _CELLS_WORTH_PROCESSES:
        executor = replace(executor, workers=1)
    phases = [
        Phase("read", partial(read_shard, plan), len(plan.shards)),
        Phase("split", partial(choose_validation, plan), 1),
        Phase("tokenise", partial(tokenise_partition, plan), plan.partitions),
        Phase("place", partial(place_shard, plan), len(plan.shards)),
    ]
    run_phases(phases, plan.folder / "tasks", executor)
