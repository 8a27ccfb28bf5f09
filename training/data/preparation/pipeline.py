"""From the published format to prepared sources: each distinct text tokenised once, rows as integers."""

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
from training.common.errors import UserError
from training.common.executor import Executor, Phase, SubmittedError, run_phases
from training.common.outputs import check_output, checksums_of, locked, publish, write_whole
from training.data.manifest import Source
from training.data.preparation.plan import PreparationOptions, make_plan
from training.data.preparation.reading import read_shard
from training.data.preparation.tokenising import FORMAT, assemble, choose_validation, place_shard, tokenise_partition
from training.data.prepared import FILE_PATTERNS, PreparedSource
from training.data.storage import identity

logger = logging.getLogger(__name__)

# Fewer texts take less time than starting processes.
_CELLS_WORTH_PROCESSES = 1_000_000
# Digits of the fingerprint in the name of a folder, and the suffix of a folder with texts.
_DIGITS, _WITH_TEXTS = 16, "-texts"
# Folder of remembered file hashes, and the mark of work that continues without this command.
_HASHES, _SUBMITTED = ".hashes", "submitted"


def prepare(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | str,
    options: PreparationOptions,
    executor: Executor | None = None,
) -> list[PreparedSource]:
    """Prepare each source into a subfolder, or find it there if it is finished and unchanged.

    The output bytes do not depend on the executor. A killed run continues where it was. If a source is faulty, those
    prepared before it stay.

    Args:
        sources: What to prepare.
        tokenizer: A fast tokenizer with an EOS token.
        folder: Folder of the prepared sources.
        options: How.
        executor: Where tasks run; if None, processes on this machine, more than one if there is enough to do.

    Raises:
        SubmittedError: If the executor works asynchronously; all sources are submitted then.
    """
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
        except SubmittedError as error:
            submitted = error
    if submitted is not None:
        raise submitted
    for source in prepared:
        same, rows = source.description["query_is_passage"], sum(source.description["rows"].values())
        if same:
            logger.warning(
                "source %r: in %d of %d rows the query is the passage in some spelling; these teach next to nothing",
                source.name,
                same,
                rows,
            )
        if source.num_negatives == 0 and source.task_type == "retrieval":
            logger.info("%s: no negative columns: rows learn only from the other passages of their batch", source.name)
    return prepared


def _prepare_source(
    source: Source, tokenizer: str, folder: Path, options: PreparationOptions, executor: Executor | None
) -> PreparedSource:
    """Prepare one source into a subfolder that is complete or absent.

    The subfolder is named after the source and the fingerprint of everything that its content depends on, so runs with
    other settings never touch it. Of two commands that need the same source, one waits. A finished source with texts
    is also used where none are needed.
    """
    fingerprint = _fingerprint(source, tokenizer, options, folder)
    bare = folder / f"{source.name}-{fingerprint[:_DIGITS]}"
    with_texts = bare.with_name(bare.name + _WITH_TEXTS)
    output = with_texts if options.keep_texts else bare
    _clear_leftovers(folder, source.name, output)
    usable = [with_texts] if options.keep_texts else [bare, with_texts]
    # A finished source may be on a read-only disk, so it is looked for before the lock, and again under it.
    prepared = _find(usable, fingerprint)
    if prepared is None:
        with locked(output):
            prepared = _find(usable, fingerprint)
            if prepared is None:
                _make(source, tokenizer, output, fingerprint, options, executor)
                prepared = PreparedSource(output).check()
                logger.info("prepared %s", source.name)
    return prepared


def _find(folders: Sequence[Path], fingerprint: str) -> PreparedSource | None:
    """The finished source in the first folder that contains it, checked."""
    for folder in folders:
        try:
            prepared = PreparedSource(folder)
        except UserError:
            continue
        whole = all(checksums_of(folder / name).exists() for name in prepared.arrays)
        if whole and prepared.description.get("fingerprint") == fingerprint:
            return prepared.check()
    return None


def _make(
    source: Source,
    tokenizer: str,
    output: Path,
    fingerprint: str,
    options: PreparationOptions,
    executor: Executor | None,
) -> None:
    check_output(output, ours=FILE_PATTERNS, option="prepared_dir")
    plan = make_plan(source, output.with_name(f".{output.name}.partial"), options)
    # The folder's name holds the fingerprint: if it was begun, a killed command did part of the same work.
    if not plan.file("tokenizer").exists():
        plan.make_folders()
        write_whole(plan.file("tokenizer"), tokenizer)
    executor = executor or Executor()
    if executor.name == "local" and executor.workers is None and plan.cells < _CELLS_WORTH_PROCESSES:
        executor = replace(executor, workers=1)
    phases = [
        Phase("read", partial(read_shard, plan), len(plan.shards)),
        Phase("split", partial(choose_validation, plan), 1),
        Phase("tokenise", partial(tokenise_partition, plan), plan.partitions),
        Phase("place", partial(place_shard, plan), len(plan.shards)),
    ]
    try:
        run_phases(phases, plan.folder / "tasks", executor)
    except SubmittedError:
        # The work continues after this command and its lock have ended.
        (plan.folder / _SUBMITTED).touch()
        raise
    whole = plan.folder / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    assemble(plan, whole, fingerprint)
    publish(whole, output)
    shutil.rmtree(plan.folder)


def _clear_leftovers(folder: Path, name: str, output: Path) -> None:
    """Remove what killed commands began for this source with other settings, unless it is being worked on."""
    for work in folder.glob(f".{escape(name)}-*.partial"):
        begun = folder / work.name.removeprefix(".").removesuffix(".partial")
        digits = begun.name.removeprefix(f"{name}-").removesuffix(_WITH_TEXTS)
        if len(digits) != _DIGITS or (work / _SUBMITTED).exists() or (begun == output and not begun.exists()):
            continue
        with suppress(UserError), locked(begun, busy="is being prepared"):
            shutil.rmtree(work, ignore_errors=True)


def _fingerprint(source: Source, tokenizer: str, options: PreparationOptions, folder: Path) -> str:
    """Hash everything that the prepared rows and tokens depend on."""
    described = {**asdict(source), "files": [identity(file, folder / _HASHES) for file in source.files]}
    # No prepared byte depends on these, nor on the negatives of other task types.
    del described["category"], described["licence"]
    chosen = {**asdict(options), "num_hard_negatives": dict(options.num_hard_negatives)[source.task_type]}
    # Texts are stored beside the tokens or not.
    del chosen["keep_texts"]
    key = json.dumps([FORMAT, described, chosen]) + tokenizer
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
