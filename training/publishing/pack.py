"""Pack a finished run into a folder that can be uploaded unchanged."""

from __future__ import annotations

import argparse
import filecmp
import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError

from training.common.errors import StoppedError, UserError, in_one_line
from training.common.hub import check_repository
from training.common.outputs import check_output, locked, move_into_place, scratch_folder
from training.common.run_folder import FINAL_MODEL
from training.models.merging import MAX_SHARD_SIZE
from training.models.model_folder import user_error
from training.publishing.adapter import merged_adapter, read_adapter
from training.publishing.card import CARD, model_card
from training.publishing.evaluation import draw_figures, save_losses, write_evaluation
from training.publishing.lineage import ARGUMENTS, Lineage, language_rows_of, stage_arguments
from training.publishing.model_files import (
    DTYPES,
    ModelFiles,
    card_field,
    copy_model_files,
    copy_weights,
    read_model_files,
    standard_settings,
)
from training.publishing.record import RECORD, AdapterRecord, ModelRelease, changed_files, contents_of, load_release
from training.publishing.states import check_nothing_private, find_state, is_hub_name, private_texts, write_json
from training.stages.continuation import CHANGED_DATA, read_changes

logger = logging.getLogger("training")

LICENCE = "LICENSE"
# The licence of this repository.
OWN_LICENCE = "apache-2.0"
# SPDX identifiers of licences that require at most a notice with copies and forbid no use. Whether a licence that
# requires more (attribution of adaptations, the same licence, no commercial use) allows a release is for a person to
# judge.
PERMISSIVE = frozenset(
    """
    0bsd apache-2.0 bsd-2-clause bsd-3-clause bsl-1.0 cc0-1.0 cdla-permissive-2.0 isc mit mit-0 pddl pddl-1.0
    unicode-3.0 unicode-dfs-2016 unlicense zlib
    """.split()
)


@dataclass(frozen=True)
class PackOptions:
    """Options of ``publish.py pack``, whose help explains them."""

    name: str
    dtype: str | None = None
    max_shard_size: str = MAX_SHARD_SIZE
    licence: str | None = None
    licence_file: Path | None = None
    author: str | None = None
    checkpoint: str | None = None
    evaluation: Path | None = None
    base: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``publish.py pack``."""
    add = parser.add_argument
    what = "folder of a finished run, OUTPUT_DIR/STAGE, of a merged model, or of a SentenceTransformer without a run"
    add("run_folder", metavar="RUN", type=Path, help=what)
    add("--output", type=Path, help="folder to write (default: packed/NAME beside the run)")
    add("--name", required=True, help="name of the model, without organisation: f2llm-v2-330m")
    add("--dtype", help=f"dtype of the weights: {' or '.join(DTYPES)} (default: that of training and evaluation)")
    add("--max-shard-size", default=MAX_SHARD_SIZE, help="maximum size of a weight file (default: %(default)s)")
    what = f"{OWN_LICENCE} if all sources, the start and the teacher have licences that ask at most for a notice"
    add("--licence", help=f"SPDX identifier of the weights' licence (default: {what}; required otherwise)")
    add("--licence-file", type=Path, help=f"text of the licence, if it is not {OWN_LICENCE}")
    add("--author", help="author on the card")
    add("--checkpoint", help="pack this checkpoint of the run: checkpoint-N")
    what = "folder of the model's evaluation (default: report in the run or beside it, or another there)"
    add("--evaluation", type=Path, help=what)
    add("--base", help="name on the Hub of an adapter's base, if it was trained on a folder: ORG/NAME")


def run(arguments: argparse.Namespace) -> None:
    """Run ``publish.py pack``."""
    options = PackOptions(**{each.name: getattr(arguments, each.name) for each in fields(PackOptions)})
    run = arguments.run_folder
    pack(run, arguments.output or run.absolute().parent / "packed" / options.name, options)


def pack(run: Path, output: Path, options: PackOptions) -> Path:
    """Write a folder with everything that belongs to a released model, whole or not at all; return ``output``.

    ``run`` is the folder of a run of training (also of an adapter) or of pruning, of a merged model, or of a
    SentenceTransformer that was tuned elsewhere. The same run and options give the same bytes: an identical folder is
    left alone, and an older release is replaced.

    Raises:
        StoppedError: If the folder cannot be written.
    """
    with user_error(f"--name {options.name!r}", "give a name for a repository, without its organisation"):
        check_repository(f"org/{options.name}", "the repository")
    if options.dtype not in (None, *DTYPES):
        raise UserError(f"--dtype {options.dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    if options.licence is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", options.licence):
        raise UserError(f"--licence {options.licence!r} is not an identifier such as apache-2.0 or cc-by-nc-4.0")
    output = output.resolve()
    state = find_state(run, options.checkpoint)
    check_output(output, filter(None, (state.folder, options.evaluation, options.licence_file)))
    with ExitStack() as stack:
        stack.enter_context(locked(output))
        is_packed = (output / RECORD).is_file()
        if is_packed and (changed := next(changed_files(vars(load_release(output)), contents_of(output)), None)):
            raise UserError(f"{output}: {changed} was changed since it was packed; move it or give another --output")
        if not is_packed and output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"{output}: exists and is no packed model; give another --output")
        if state.kind == "adapter":
            files, adapter = read_adapter(state, options.base)
        else:
            settings = stack.enter_context(standard_settings(state.folder)) if state.kind == "unknown" else state.folder
            files, adapter = read_model_files(settings, state.folder), merged_adapter(state, options.base)
        _pack(Lineage(state), files, adapter, output, options)
    return output


def _pack(
    lineage: Lineage, files: ModelFiles, adapter: AdapterRecord | None, output: Path, options: PackOptions
) -> None:
    state, states, stages = lineage.state, lineage.states, lineage.records
    licence, text = _licence_and_text(lineage, options.licence, options.licence_file)
    trained = [each for each in states.values() if each.kind not in ("pruning", "merging")]
    release = ModelRelease(
        name=options.name,
        licence=licence,
        dtype=options.dtype or files.weights.dtype,
        languages=tuple(sorted({code for stage in stages for source in stage.sources for code in source.languages})),
        stages=stages,
        trained_dtype=files.weights.dtype,
        author=options.author,
        language_rows=language_rows_of(trained[-1]) if trained else {},
        adapter=adapter,
        **files.fields(),
    )
    try:
        with scratch_folder(output) as scratch:
            copy_model_files(files, scratch, release.dtype)
            write_json(scratch / ARGUMENTS, stage_arguments(state))
            (scratch / LICENCE).write_text(text, encoding="utf-8")
            write_evaluation(state, states, options.name, scratch, options.evaluation)
            # After everything that may be refused: weights may take minutes.
            copy_weights(files.weights, scratch, release.dtype, options.max_shard_size)
            # Losses, record, figures and card: each is made from what is there before it.
            # The log of a checkpoint ends at its step.
            logs = {name: each.run if each.folder.name == FINAL_MODEL else each.folder for name, each in states.items()}
            save_losses(logs, scratch)
            (scratch / RECORD).write_text(release.to_json(), encoding="utf-8")
            draw_figures(scratch)
            (scratch / CARD).write_text(model_card(scratch), encoding="utf-8")
            contents = contents_of(scratch)
            sizes = {name: content.size for name, content in contents.items()}
            hashes = {name: content.sha256 for name, content in contents.items()}
            (scratch / RECORD).write_text(replace(release, files=sizes, sha256=hashes).to_json(), encoding="utf-8")
            check_nothing_private(scratch, private_texts(states.values()))
            # The record has the hashes of all other files.
            if (output / RECORD).is_file() and filecmp.cmp(scratch / RECORD, output / RECORD, shallow=False):
                logger.info("%s: holds this release already", output)
            else:
                move_into_place(scratch, output)
                logger.info("%s: packed %s, %d files", output, options.name, len(contents_of(output)))
    # safetensors reports a full disk with its own error class.
    except (OSError, SafetensorError) as error:
        raise StoppedError(f"{output}: could not be written ({in_one_line(error)}); make room or mend that") from error


def _licence_and_text(lineage: Lineage, licence: str | None, path: Path | None) -> tuple[str, str]:
    if licence is None:
        if doubts := list(dict.fromkeys(_doubts(lineage))):
            raise UserError(
                f"--licence is missing, and does not follow from {doubts[0]}, the first of {len(doubts)} such; give "
                f"it, such as {OWN_LICENCE}, or cc-by-nc-4.0 with its text as --licence-file"
            )
        licence = OWN_LICENCE
        logger.info("licence: %s; the data, and what training started from, allow it", licence)
    if path is None:
        if licence.lower() != OWN_LICENCE:
            raise UserError(f"--licence {licence}: its text is missing; give it with --licence-file")
        path = Path(__file__).resolve().parents[2] / "LICENSE"
    with user_error(f"--licence-file {path}: cannot be read", "give the licence's text"):
        text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise UserError(f"--licence-file {path}: is empty; give the licence's text")
    return licence, text


def _doubts(lineage: Lineage) -> Iterator[str]:
    for stage in lineage.records:
        if stage.kind == "unknown" or (stage.kind in ("training", "adapter", "merged_adapter") and not stage.sources):
            yield f"the data of {stage.name} (not known)"
        for source in stage.sources:
            if (source.licence or "").strip().lower() not in PERMISSIVE:
                yield f"source {source.name} ({source.licence or 'no licence in the manifest'})"
    for name, state in lineage.states.items():
        # Neither recipe nor manifest names the first data any more.
        if any(CHANGED_DATA in note["keys"] for note in read_changes(state.run)):
            yield f"the data of {name} (changed while it was trained)"
    for name, path in lineage.outside:
        # The remains of a path are not the name of a repository.
        cached = try_to_load_from_cache(path, CARD) if is_hub_name(path) else None
        licence = card_field(Path(cached) if isinstance(cached, str) else Path(path) / CARD, "license")
        if not (isinstance(licence, str) and licence.strip().lower() in PERMISSIVE):
            yield f"model {name or path} ({licence or 'no licence on a card here'})"
