"""Pack a finished run into a folder that can be uploaded unchanged.

Example::

    python training/publish.py pack runs/quickstart/student --name f2llm-quickstart
"""

from __future__ import annotations

import argparse
import filecmp
import logging
import re
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from training.common.errors import StoppedError, UserError, in_one_line
from training.common.hub import Content
from training.common.outputs import check_output, locked, publish, scratch_folder
from training.common.run_folder import FINAL_MODEL
from training.publishing.adapter import merged_adapter, read_adapter
from training.publishing.evaluation import draw_figures, save_losses, write_evaluation
from training.publishing.licence import OWN_LICENCE, licence_of, licence_text
from training.publishing.lineage import ARGUMENTS, Lineage, language_rows_of, stage_arguments
from training.publishing.model_files import (
    ADAPTER_CONFIG,
    ModelToPack,
    copy_model_files,
    family_of,
    read_model_files,
    standard_settings,
)
from training.publishing.record import RECORD, ModelRelease, StageRecord, load_release
from training.publishing.states import ModelState, check_nothing_private, find_state, private_texts, write_json
from training.publishing.weights import DTYPES, MAX_SHARD_SIZE, parse_size, read_weights

logger = logging.getLogger("training")

CARD, LICENCE = "README.md", "LICENSE"
# Optional packages that draw figures and render the card.
_EXTRA = ("jinja2", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``publish.py pack``."""
    parser.add_argument(
        "run_folder",
        metavar="RUN",
        type=Path,
        help="folder of a finished run, OUTPUT_DIR/STAGE, of a merged model, or of a SentenceTransformer without a run",
    )
    parser.add_argument("--name", required=True, help="name of the model, without organisation: f2llm-v2-330m")
    parser.add_argument("--output", type=Path, help="folder to write (default: packed/NAME beside the run)")
    parser.add_argument(
        "--dtype", help=f"dtype of the weights: {' or '.join(DTYPES)} (default: that of training and evaluation)"
    )
    parser.add_argument(
        "--max-shard-size", default=MAX_SHARD_SIZE, help="maximum size of a weight file (default: %(default)s)"
    )
    parser.add_argument(
        "--licence",
        help=f"SPDX identifier of the weights' licence (default: {OWN_LICENCE} if all sources, the start and the "
        "teacher have licences that ask at most for a notice; required otherwise)",
    )
    parser.add_argument("--licence-file", type=Path, help=f"text of the licence, if it is not {OWN_LICENCE}")
    parser.add_argument("--author", help="author on the card")
    parser.add_argument("--checkpoint", help="pack this checkpoint of the run: checkpoint-N")
    parser.add_argument(
        "--evaluation",
        type=Path,
        help="folder of the model's evaluation (default: report in the run or beside it, or another there)",
    )
    parser.add_argument(
        "--base", metavar="ORG/NAME", help="name on the Hub of an adapter's base, if it was trained on a folder"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run ``publish.py pack``."""
    options = PackOptions(**{each.name: getattr(arguments, each.name) for each in fields(PackOptions)})
    beside = arguments.run_folder.absolute().parent / "packed"
    pack(arguments.run_folder, arguments.output or beside / arguments.name, options)


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


def read_whole_model(state: ModelState, base: str | None = None, settings: Path | None = None) -> ModelToPack:
    """Look at a whole model.

    Args:
        state: The model.
        base: Hub name of the base of an adapter that was merged into it.
        settings: Folder of its files without the weights, if that is another one.
    """
    files = read_model_files(settings or state.folder)
    weights = read_weights(state.folder, files.config)
    record = {
        "parameters": weights.parameters,
        "dimension": files.config.hidden_size,
        "dimensions": files.dimensions,
        "max_length": files.max_length,
        "shape": files.shape,
        "prompts": files.prompts,
        "versions": files.versions,
        "family": family_of(files.config),
        "adapter": merged_adapter(state, base),
    }
    return ModelToPack(weights, record, partial(copy_model_files, files))


def pack(run: Path, output: Path, options: PackOptions) -> Path:
    """Write a folder with everything that belongs to a released model; it appears whole or not at all.

    The same run and options give the same bytes: an identical folder is left alone, and an older release is replaced.

    Args:
        run: Folder of a run of training (also of an adapter) or of pruning, of a merged model, or of a
            SentenceTransformer that was tuned elsewhere.
        output: The folder to write.
        options: Options.

    Returns:
        ``output``.

    Raises:
        UserError: If the run is not finished or damaged, an option is wrong, the folder holds something else, or a
            file holds something private.
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
        if (state.folder / ADAPTER_CONFIG).is_file() and not state.is_unknown:
            model: ModelToPack = read_adapter(state, options.base)
        else:
            settings = stack.enter_context(standard_settings(state.folder)) if state.is_unknown else None
            model = read_whole_model(state, options.base, settings)
        _pack(state, model, output, options)
    return output


def _pack(state: ModelState, model: ModelToPack, output: Path, options: PackOptions) -> None:
    lineage = Lineage(state)
    stages = lineage.records()
    licence = options.licence or licence_of(lineage, stages)
    text = licence_text(licence, options.licence_file)
    release = _release(options, licence, model, lineage, stages)
    try:
        with scratch_folder(output) as scratch:
            model.copy_files(scratch, release.dtype)
            write_json(scratch / ARGUMENTS, stage_arguments(state))
            (scratch / LICENCE).write_text(text, encoding="utf-8")
            write_evaluation(state, lineage.states, options.name, scratch, options.evaluation)
            # After everything that may be refused: weights may take minutes.
            model.copy_weights(scratch, release.dtype, options.max_shard_size)
            _describe(scratch, release, lineage)
            check_nothing_private(scratch, private_texts(lineage.states.values()))
            if _same(scratch, output):
                logger.info("%s: holds this release already", output)
            else:
                publish(scratch, output)
                logger.info("%s: packed %s, %d files", output, options.name, len(_files(output)))
    # safetensors reports a full disk with its own error class.
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
        raise UserError(f"--licence {options.licence!r} is not an identifier such as apache-2.0 or cc-by-nc-4.0")
    missing = [package for package in _EXTRA if find_spec(package) is None]
    if missing:
        raise UserError(f"packing needs {' and '.join(missing)}; install them: pip install -e '.[publish]'")


def _check_output(output: Path) -> None:
    """Refuse to replace anything but an unchanged release."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / RECORD).is_file():
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
    model: ModelToPack,
    lineage: Lineage,
    stages: tuple[StageRecord, ...],
) -> ModelRelease:
    trained = [state for state in lineage.states.values() if not (state.prunes or state.merges)]
    languages = {code for stage in stages for source in stage.sources for code in source.languages}
    return ModelRelease(
        name=options.name,
        licence=licence,
        dtype=options.dtype or model.weights.dtype,
        languages=tuple(sorted(languages)),
        stages=stages,
        trained_dtype=model.weights.dtype,
        author=options.author,
        language_rows=language_rows_of(trained[-1]) if trained else {},
        **model.fields,
    )


def _describe(folder: Path, release: ModelRelease, lineage: Lineage) -> None:
    """Add losses, record, figures and card, each of which is made from what is there before it."""
    # It needs jinja2, whose absence `_check` reports.
    from training.publishing.card import model_card

    # The log of a checkpoint ends at its step.
    logs = {name: each.run if each.folder.name == FINAL_MODEL else each.folder for name, each in lineage.states.items()}
    save_losses(logs, folder)
    (folder / RECORD).write_text(release.to_json(), encoding="utf-8")
    draw_figures(folder)
    (folder / CARD).write_text(model_card(folder), encoding="utf-8")
    files = _files(folder)
    hashes = {name: Content(folder / name).sha256 for name in files}
    (folder / RECORD).write_text(replace(release, files=files, sha256=hashes).to_json(), encoding="utf-8")


def _files(folder: Path) -> dict[str, int]:
    """Sizes in bytes of the files except the record, by path; hidden files are an uploading client's."""
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
