"""From a finished run to a folder that can be uploaded as it is."""

from __future__ import annotations

import filecmp
import json
import logging
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from training.common.content import Content
from training.common.errors import StoppedError, UserError, in_one_line
from training.common.outputs import check_output, locked, scratch_folder
from training.common.run_folder import FINAL_MODEL, publish
from training.publishing.adapter_model import ADAPTER_CONFIG, AdapterModel, read_adapter
from training.publishing.cleaning import check_nothing_private, private_texts
from training.publishing.evaluation import write_evaluation
from training.publishing.folder_model import standard_settings
from training.publishing.licence import licence_of, licence_text
from training.publishing.lineage import ARGUMENTS, Lineage, stage_arguments
from training.publishing.record import RECORD, ModelRelease, StageRecord, load_release
from training.publishing.states import ModelState, find_state
from training.publishing.training_data import language_rows_of
from training.publishing.weights import DTYPES, MAX_SHARD_SIZE, parse_size
from training.publishing.whole_model import WholeModel, read_whole_model

logger = logging.getLogger("training")

CARD, LICENCE = "README.md", "LICENSE"
# What draws and writes the card, by the name of the module.
_EXTRA = {"jinja2": "jinja2", "matplotlib": "matplotlib"}


@dataclass(frozen=True)
class PackOptions:
    """How a run is packed.

    Attributes:
        name: Of the model, without organisation; a repository's name.
        dtype: Of the weights, one of ``DTYPES``; that in which the run saved them if None.
        max_shard_size: Of a file of weights at most, such as ``5GB``.
        licence: SPDX identifier of the weights' licence; if None, the one that follows from what they were made of.
        licence_file: Its text; that of this repository for Apache 2.0 if None.
        author: Whom the card names.
        checkpoint: A checkpoint of the run, such as ``checkpoint-500``; its finished model if None.
        evaluation: Folder of an evaluation; if None, the first in the run or beside it that is of this model.
        base: Name on the Hub of the model that the run's adapter adapts, where that was a folder.
    """

    name: str
    dtype: str | None = None
    max_shard_size: str = MAX_SHARD_SIZE
    licence: str | None = None
    licence_file: Path | None = None
    author: str | None = None
    checkpoint: str | None = None
    evaluation: Path | None = None
    base: str | None = None


def pack(run: Path, output: Path, options: PackOptions) -> Path:
    """Writes a folder with all that belongs to a released model; it appears whole or not at all.

    The same run and options give the same bytes: a folder that holds them already is left alone, and an older
    release in its place is replaced.

    Args:
        run: Folder of a run, of training or of pruning, whose model may be an adapter; of a merged model; or of a
            SentenceTransformer that was tuned elsewhere.
        output: The folder to write.
        options: How.

    Returns:
        ``output``.

    Raises:
        UserError: If the run is none, is not finished or is damaged, an option is faulty, the folder holds something
            else, or a file would tell something private. Nothing that was there is touched.
        StoppedError: If the folder cannot be written.
    """
    _check(options)
    output = output.resolve()
    state = find_state(run, options.checkpoint)
    reads = (state.folder, options.evaluation, options.licence_file)
    check_output(output, [path for path in reads if path is not None])
    with ExitStack() as stack:
        stack.enter_context(locked(output))
        _check_output(output)
        _pack(state, output, options, stack)
    return output


def _pack(state: ModelState, output: Path, options: PackOptions, stack: ExitStack) -> None:
    model: WholeModel | AdapterModel
    if state.is_unknown:
        model = read_whole_model(state, options.base, stack.enter_context(standard_settings(state.folder)))
    elif (state.folder / ADAPTER_CONFIG).is_file():
        model = read_adapter(state, options.base)
    else:
        model = read_whole_model(state, options.base)
    lineage = Lineage(state)
    stages = lineage.records()
    licence = options.licence or licence_of(lineage, stages)
    text = licence_text(licence, options.licence_file)
    release = _release(options, licence, model, lineage, stages)
    try:
        with scratch_folder(output) as partial:
            model.copy_files(partial, release.dtype)
            _write_json(partial / ARGUMENTS, stage_arguments(state))
            (partial / LICENCE).write_text(text, encoding="utf-8")
            write_evaluation(state, lineage.states, options.name, partial, options.evaluation)
            # What can be faulty comes first: weights may take minutes.
            model.copy_weights(partial, release.dtype, options.max_shard_size)
            _describe(partial, release, lineage)
            check_nothing_private(partial, private_texts(lineage.states.values()))
            if _same(partial, output):
                logger.info("%s: holds this release already", output)
            else:
                publish(partial, output)
                logger.info("%s: packed %s, %d files", output, options.name, len(_files(output)))
    # A full disk comes out of safetensors as an error of its own.
    except (OSError, SafetensorError) as error:
        raise StoppedError(f"{output}: could not be written ({in_one_line(error)}); make room or mend that") from error


def _check(options: PackOptions) -> None:
    try:
        validate_repo_id(options.name)
        fault = "it has a slash" if "/" in options.name else None
    except HFValidationError as error:
        fault = in_one_line(error)
    if fault:
        raise UserError(
            f"--name {options.name!r} cannot name a repository ({fault}); give one without organisation, of letters, "
            "digits and single - _ ."
        )
    if options.dtype is not None and options.dtype not in DTYPES:
        raise UserError(f"--dtype {options.dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    parse_size(options.max_shard_size)
    if options.licence is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", options.licence):
        raise UserError(f"--licence {options.licence!r} is no identifier; give one such as apache-2.0 or cc-by-nc-4.0")
    missing = [package for module, package in _EXTRA.items() if find_spec(module) is None]
    if missing:
        raise UserError(f"packing needs {' and '.join(missing)}; install them: pip install -e '.[publish]'")


def _check_output(output: Path) -> None:
    """Makes sure that only a release, as it was packed, can be replaced.

    Raises:
        UserError: If the folder holds something else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or not (output / RECORD).is_file():
        raise UserError(f"{output}: exists and is no packed model; give another --output")
    recorded, found = load_release(output).files, _files(output)
    changed = sorted(path for path in {*recorded, *found} if recorded.get(path) != found.get(path))
    if changed:
        raise UserError(
            f"{output}: was changed since it was packed ({', '.join(changed[:3])}); move it or give another --output"
        )


def _release(
    options: PackOptions,
    licence: str,
    model: WholeModel | AdapterModel,
    lineage: Lineage,
    stages: tuple[StageRecord, ...],
) -> ModelRelease:
    trained = [state for state in lineage.states.values() if not (state.prunes or state.merges)]
    return ModelRelease(
        name=options.name,
        licence=licence,
        dtype=options.dtype or model.dtype,
        languages=_languages(stages),
        stages=stages,
        trained_dtype=model.dtype,
        author=options.author,
        language_rows=language_rows_of(trained[-1]) if trained else {},
        **model.fields,
    )


def _languages(stages: Iterable[StageRecord]) -> tuple[str, ...]:
    return tuple(sorted({code for stage in stages for source in stage.sources for code in source.languages}))


def _describe(folder: Path, release: ModelRelease, lineage: Lineage) -> None:
    """Adds losses, record, figures and card, each of which tells of what was there before it."""
    from training.publishing.card import model_card
    from training.publishing.figures import draw_figures, save_losses

    # A checkpoint's own log ends at its step.
    logs = {name: each.run if each.folder.name == FINAL_MODEL else each.folder for name, each in lineage.states.items()}
    save_losses(logs, folder)
    (folder / RECORD).write_text(release.to_json(), encoding="utf-8")
    draw_figures(folder)
    (folder / CARD).write_text(model_card(folder), encoding="utf-8")
    files = _files(folder)
    hashes = {name: Content(folder / name).sha256 for name in files}
    (folder / RECORD).write_text(replace(release, files=files, sha256=hashes).to_json(), encoding="utf-8")


def _files(folder: Path) -> dict[str, int]:
    """Bytes of the files in a folder but the record, by path; hidden ones are an uploading client's."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.as_posix() != RECORD and not any(part.startswith(".") for part in name.parts):
            sizes[name.as_posix()] = path.stat().st_size
    return sizes


def _same(one: Path, other: Path) -> bool:
    """Whether two packed folders hold the same bytes."""
    names = [RECORD, *_files(one)]
    if not (other / RECORD).is_file() or _files(one) != _files(other):
        return False
    return not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
