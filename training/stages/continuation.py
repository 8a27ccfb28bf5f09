"""What may change between a run and its continuation, and the record of what did."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from training.common.errors import OutputError, UserError, in_one_line
from training.common.outputs import write_whole
from training.common.run_folder import (
    FINAL_MODEL,
    RECIPE,
    from_run,
    holds_model,
    last_checkpoint,
    step_of,
)
from training.config.checks import FOLLOWING_SCHEDULERS
from training.config.recipe import Stage, read_values
from training.config.stage_keys import CHUNKS, EVALUATION, MACHINE, NEVER, RUNNING, SAMPLE

logger = logging.getLogger(__name__)

# Key → value before and value now.
Changes = dict[str, tuple[Any, Any]]

# In the run's folder: from which step on which keys had other values.
CHANGES = "changes.json"
# Stands among these keys for the data itself.
CHANGED_DATA = "data"
# What decides the learning rate: where it follows a metric, checkpoints hold its state.
_SCHEDULE = {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"}


def check_keys(output_dir: Path, stage: Stage, accept_changes: bool) -> Changes:
    """Compare the keys of a stage with those that its run was started with, and return the accepted changes.

    Changes that are not accepted, or that could have no effect, are refused.
    """
    written, finished, args = output_dir / RECIPE, holds_model(output_dir / FINAL_MODEL), stage.arguments
    before = _read(written, accept_changes, yaml.safe_load, "keys")
    if before is None:
        # A run that is not finished writes it itself.
        if finished and args.should_save:
            write_whole(written, yaml.safe_dump(stage.keys, sort_keys=False))
        return {}
    keys, free = stage.keys, RUNNING | MACHINE | SAMPLE
    # A finished run chooses no model and draws no dropout any more.
    if not finished:
        free = free - (SAMPLE if args.chooses_by_pairs else set()) - (CHUNKS if args.draws_dropout else set())
    changed = _changed(before, keys, {*before, *keys} - free)
    if not changed:
        return {}
    differ = ", ".join(f"{name}: {old!r} → {new!r}" for name, (old, new) in changed.items())
    if finished and changed.keys() - EVALUATION:
        further = "" if args.prunes else f" or train its model further from 'model: {output_dir / FINAL_MODEL}'"
        raise OutputError(
            f"{output_dir}: stage {stage.name!r} is finished, so that other keys ({differ}) would change nothing",
            f"undo the change,{further} with another output_dir; --stage NAME runs other stages alone",
        )
    if not finished and not args.prunes:
        follows = any(str(of.get("lr_scheduler_type")) in FOLLOWING_SCHEDULERS for of in (before, keys))
        _check_settled(output_dir, changed, NEVER | (_SCHEDULE if follows else set()))
    _accept(f"{written}: the run was started with other keys ({differ})", accept_changes)
    return changed


def _check_settled(output_dir: Path, changed: Changes, settled: frozenset[str]) -> None:
    """Refuse changes that could not take effect, accepted or not."""
    for name, (old, new) in changed.items():
        moved = Path(str(new)).exists() and not Path(str(old)).exists()
        if name in settled or (name == "model" and not moved):
            raise OutputError(
                f"{output_dir}: key {name!r} cannot change ({old!r} → {new!r}) while a run goes on: its checkpoints "
                "hold what follows from it",
                f"undo the change, or start again from 'model: {last_checkpoint(output_dir)}' with another output_dir",
            )


def _accept(what: str, accepted: bool) -> None:
    if not accepted:
        raise OutputError(what, "undo it, give another output_dir, or add --accept-changes to go on regardless")
    logger.warning("%s; going on regardless", what)


def check_data(noted: Path, data: Mapping[str, str], accept_changes: bool) -> Changes:
    """Compare the data of a run with what it recorded when it was started.

    Return the fingerprints before and now, as :data:`CHANGED_DATA`, if they differ and that is accepted.
    """
    if not noted.exists():
        return {}
    before = _read(noted, accept_changes, json.loads, "data")
    if before == data:
        return {}
    if before is not None:
        changed = sorted(name for name in {*before, *data} if before.get(name) != data.get(name))
        _accept(f"{noted}: the data changed since the run started ({', '.join(changed)})", accept_changes)
    return {CHANGED_DATA: (before, dict(data))}


def _read(path: Path, accept_changes: bool, parse: Callable[[str], Any], what: str) -> dict[str, Any] | None:
    """Read a mapping that a run recorded; None if it is damaged and that is accepted."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"expected a mapping, got {type(content).__name__}")
    # The parsers can raise any exception on random bytes.
    except Exception as error:
        problem = f"{path}: cannot be read ({in_one_line(error)}), so that nobody knows whether the {what} are the same"
        if not accept_changes:
            remedy = "give another output_dir, or add --accept-changes to go on and write it again"
            raise OutputError(problem, remedy) from None
        logger.warning("%s; it is written again", problem)
        return None
    return content


def note_changes(output_dir: Path, changed: Changes, checkpoint: Path | None) -> None:
    """Record from which step on which keys have other values."""
    step = 0 if checkpoint is None else step_of(checkpoint)
    # Steps after the checkpoint are done again, as the stage is now.
    notes = [{**note, "step": min(note["step"], step)} for note in read_changes(output_dir)]
    if changed:
        notes.append({"step": step, "keys": {key: list(values) for key, values in changed.items()}})
    if notes:
        write_whole(output_dir / CHANGES, json.dumps(notes, indent=2, default=str))


def read_changes(output_dir: Path) -> list[dict[str, Any]]:
    """Return the recorded changes: ``step``, and ``keys`` with the value before and from then on; damaged: none."""
    try:
        notes = json.loads((output_dir / CHANGES).read_text(encoding="utf-8"))
        return [{"step": int(note["step"]), "keys": dict(note["keys"])} for note in notes]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: cannot be read (%s)", output_dir / CHANGES, error)
        return []


def _changed(before: Mapping[str, Any], keys: Mapping[str, Any], names: Collection[str]) -> Changes:
    """Return the keys whose meaning differs, however it is written; a default may be given or left out."""
    try:
        values = [read_values(of) for of in (before, keys)]
    # Values that are faulty, perhaps only by now, are compared as they are written.
    except (UserError, ValueError, LookupError):
        values = [before, keys]
    changed = {}
    for name in sorted(names):
        old, new = (of.get(name) for of in values)
        # Paths as they are seen from the run, from any working directory.
        seen = [from_run(name, of) for of in (before, keys)]
        if old != new and (seen[0] is None or seen[0] != seen[1]):
            changed[name] = (before.get(name), keys.get(name))
    return changed
