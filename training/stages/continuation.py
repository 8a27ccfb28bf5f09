"""What may change between a run and its continuation, and the record of what did."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.common.errors import OutputError
from training.common.outputs import write_whole
from training.common.run_folder import FINAL_MODEL, RECIPE, from_run, holds_model, last_checkpoint, step_of
from training.common.yaml_file import load_yaml
from training.config.arguments import (
    CHUNKS,
    EVALUATION,
    MACHINE,
    NEVER,
    RUNNING,
    SAMPLE,
)
from training.config.checks import FOLLOWING_SCHEDULERS
from training.config.recipe import Stage, read_values

logger = logging.getLogger(__name__)

# Key → value before and value now.
Changes = dict[str, tuple[Any, Any]]

# In the run's folder: from which step on which keys had other values; one stands for the data itself.
CHANGES, CHANGED_DATA = "changes.json", "data"
# What decides the learning rate: where it follows a metric, checkpoints hold its state.
_SCHEDULE = {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"}


def check_keys(output_dir: Path, stage: Stage, accept_changes: bool) -> Changes:
    """Return the accepted changes of a stage's keys since its run started; refuse those that could have no effect."""
    args, keys, finished = stage.arguments, stage.keys, holds_model(output_dir / FINAL_MODEL)
    before, free = load_yaml(output_dir / RECIPE), RUNNING | MACHINE | SAMPLE
    # A finished run chooses no model and draws no dropout any more.
    if not finished:
        free = free - (SAMPLE if args.chooses_by_pairs else set()) - (CHUNKS if args.draws_dropout else set())
    # Their meanings, however they are written; a default may be given or left out.
    values, changed = [read_values(of) for of in (before, keys)], {}
    for name in sorted({*before, *keys} - free):
        old, new = (of.get(name) for of in values)
        # Paths as they are seen from the run, from any working directory.
        seen = [from_run(name, of) for of in (before, keys)]
        if old != new and (seen[0] is None or seen[0] != seen[1]):
            changed[name] = (before.get(name), keys.get(name))
    if not changed:
        return {}
    differ = ", ".join(f"{name}: {old!r} → {new!r}" for name, (old, new) in changed.items())
    if finished and changed.keys() - EVALUATION:
        further = "" if args.prunes else f" or train its model further from 'model: {output_dir / FINAL_MODEL}'"
        raise OutputError(
            f"{output_dir}: stage {stage.name!r} is finished, so that other keys ({differ}) would change nothing",
            f"undo the change,{further} with another output_dir; --stage NAME runs other stages alone",
        )
    follows = any(str(of.get("lr_scheduler_type")) in FOLLOWING_SCHEDULERS for of in (before, keys))
    settled = NEVER | (_SCHEDULE if follows else set())
    for name, (old, new) in changed.items() if not (finished or args.prunes) else ():
        moved = Path(str(new)).exists() and not Path(str(old)).exists()
        if name in settled or (name == "model" and not moved):
            raise OutputError(
                f"{output_dir}: key {name!r} cannot change ({old!r} → {new!r}) while a run goes on: its checkpoints "
                "hold what follows from it",
                f"undo the change, or start again from 'model: {last_checkpoint(output_dir)}' with another output_dir",
            )
    _accept(f"{output_dir / RECIPE}: the run was started with other keys ({differ})", accept_changes)
    return changed


def check_data(noted: Path, data: Mapping[str, str], accept_changes: bool) -> Changes:
    """Return the fingerprints of a run's data before and now, as a change, if they differ and that is accepted."""
    if not noted.exists() or (before := load_yaml(noted)) == data:
        return {}
    changed = sorted(name.rstrip("/") for name in {*before, *data} if before.get(name) != data.get(name))
    _accept(f"{noted}: the data changed since the run started ({', '.join(changed)})", accept_changes)
    return {CHANGED_DATA: (before, dict(data))}


def _accept(what: str, accepted: bool) -> None:
    if not accepted:
        raise OutputError(what, "undo it, give another output_dir, or add --accept-changes to go on regardless")
    logger.warning("%s; going on regardless", what)


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
    """Return the recorded changes: ``step``, and ``keys`` with the value before and from then on."""
    path = output_dir / CHANGES
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
