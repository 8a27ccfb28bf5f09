"""What may change between a run and its continuation, and the note of what did."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from training.common.errors import OutputError, in_one_line
from training.common.paths import from_run
from training.common.run_folder import FINAL_MODEL, RECIPE, holds_model, last_checkpoint, step_of, write_whole
from training.config.arguments import StageArguments
from training.config.evaluation_arguments import FOLLOWING_SCHEDULERS
from training.config.recipe import Stage
from training.config.stage_keys import MACHINE, RUNNING

logger = logging.getLogger(__name__)

Changes = dict[str, tuple[Any, Any]]

# In the run's folder: from which step on which keys had other values.
CHANGES = "changes.json"
# Stands among these keys for the data itself.
CHANGED_DATA = "data"
# Keys that may differ between a run and its continuation: none of them changes what is learnt.
_FREE_KEYS = RUNNING | MACHINE
# Nor do these, unless the best model is chosen by them: then scores before and after a change would not compare.
_SAMPLE_KEYS = frozenset({"evaluation_sample", "evaluation_sample_candidates", "query_instruction"})
# And where dropout is drawn, so does how the texts are divided.
_CHUNK_KEYS = frozenset({"max_tokens_per_forward"})
# What a finished model is evaluated by, each time.
_EVALUATION_KEYS = frozenset({"evaluation_pairs", "evaluation_candidates"})
# Checkpoints hold the state of these: weights of a shape, an optimizer of a kind, a trained tokenizer.
_SETTLED_KEYS = frozenset(
    {
        *("optim", "optim_args", "optim_target_modules", "model_config", "tokenizer_vocab_size", "fp16"),
        *("lora", "lora_rank", "lora_target_modules", "lora_dora", "teacher_projection"),
    }
)
# What decides the learning rate, where it follows a metric: then it is a state, too.
_SCHEDULE_KEYS = frozenset({"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"})
_DEFAULTS = {each.name: each.default for each in fields(StageArguments)}
_NUMBERS = frozenset(each.name for each in fields(StageArguments) if re.search(r"\b(int|float)\b", str(each.type)))


def check_keys(output_dir: Path, stage: Stage, accept_changes: bool) -> Changes:
    """Compares what a stage is told with what it was told when it was started.

    Args:
        output_dir: The run's folder.
        stage: The stage.
        accept_changes: Whether keys may differ that change what is learnt.

    Returns:
        The keys that differ and are accepted, with the value before and the value now.

    Raises:
        UserError: If there are differences that are not accepted, or that could have no effect.
    """
    written, finished = output_dir / RECIPE, holds_model(output_dir / FINAL_MODEL)
    before = _read(written, accept_changes, yaml.safe_load, "keys")
    if before is None:
        # A run that is not finished writes it itself.
        if finished and stage.arguments.should_save:
            write_whole(written, yaml.safe_dump(stage.keys, sort_keys=False))
        return {}
    keys, free = stage.keys, _free_keys(stage, finished)
    changed = {
        key: (before.get(key), keys.get(key)) for key in sorted({*before, *keys} - free) if not _same(key, before, keys)
    }
    if not changed:
        return {}
    told = ", ".join(f"{key}: {old!r} → {new!r}" for key, (old, new) in changed.items())
    if finished and changed.keys() - _EVALUATION_KEYS:
        further = (
            "" if stage.arguments.prunes else f" or train its model further from 'model: {output_dir / FINAL_MODEL}'"
        )
        raise OutputError(
            f"{output_dir}: stage {stage.name!r} is finished, so that other keys ({told}) would change nothing",
            f"undo the change,{further} with another output_dir; --stage NAME runs other stages alone",
        )
    if not finished and not stage.arguments.prunes:
        _check_settled(output_dir, before, stage, changed)
    _accept(f"{written}: the run was started with other keys ({told})", accept_changes)
    return changed


def _free_keys(stage: Stage, finished: bool) -> frozenset[str]:
    # Of a finished run the sample chooses nothing any more.
    chosen_by = _SAMPLE_KEYS if stage.arguments.chooses_by_pairs and not finished else frozenset()
    divided = _CHUNK_KEYS if stage.arguments.told_dropout and not finished else frozenset()
    return (_FREE_KEYS | _SAMPLE_KEYS) - chosen_by - divided


def _check_settled(output_dir: Path, before: Mapping[str, Any], stage: Stage, changed: Changes) -> None:
    """Refuses changes that could not take effect, accepted or not."""
    settled = _SETTLED_KEYS
    types = [str(keys.get("lr_scheduler_type")) for keys in (before, stage.keys)]
    if any(each in FOLLOWING_SCHEDULERS for each in types):
        settled = settled | _SCHEDULE_KEYS
    for key, (old, new) in changed.items():
        moved = key == "model" and not Path(str(old)).exists() and Path(str(new)).exists()
        if key in settled or (key == "model" and not moved):
            raise OutputError(
                f"{output_dir}: key {key!r} cannot change ({old!r} → {new!r}) while a run goes on, for its checkpoints "
                "hold what follows from it",
                f"undo the change, or start again from 'model: {last_checkpoint(output_dir)}' with another output_dir",
            )


def _accept(what: str, accepted: bool) -> None:
    """Warns of a change since the run was started, or refuses it.

    Raises:
        UserError: If it is not accepted.
    """
    if not accepted:
        raise OutputError(what, "undo it, give another output_dir, or add --accept-changes to go on regardless")
    logger.warning("%s; going on regardless", what)


def check_data(noted: Path, data: Mapping[str, str], accept_changes: bool) -> Changes:
    """Compares the data of a run with what it noted of it when it was started.

    Returns:
        The fingerprints before and now, as :data:`CHANGED_DATA`, if they differ and that is accepted.

    Raises:
        UserError: If it changed or the note cannot be read, and that is not accepted.
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


def _read(path: Path, accept_changes: bool, parse: Any, what: str) -> dict[str, Any] | None:
    """A mapping that a run noted of itself; None if it is damaged and that is accepted."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"expected a mapping, got {type(content).__name__}")
    # Random bytes come out of the parsers as anything.
    except Exception as error:
        problem = f"{path}: cannot be read ({in_one_line(error)}), so that nobody knows whether the {what} are the same"
        if not accept_changes:
            raise OutputError(
                problem, "give another output_dir, or add --accept-changes to go on and write it again"
            ) from None
        logger.warning("%s; it is written again", problem)
        return None
    return content


def note_changes(output_dir: Path, changed: Changes, checkpoint: Path | None) -> None:
    """Writes down from which step on which keys have other values, for whoever reads the run."""
    step = 0 if checkpoint is None else step_of(checkpoint)
    # Steps after the checkpoint are done again, as the stage is now.
    notes = [{**note, "step": min(note["step"], step)} for note in read_changes(output_dir)]
    if changed:
        notes.append({"step": step, "keys": {key: list(values) for key, values in changed.items()}})
    if notes:
        write_whole(output_dir / CHANGES, json.dumps(notes, indent=2, default=str))


def read_changes(output_dir: Path) -> list[dict[str, Any]]:
    """What was noted: ``step``, and ``keys`` with the value before and from then on. Damaged notes are none."""
    try:
        notes = json.loads((output_dir / CHANGES).read_text(encoding="utf-8"))
        return [{"step": int(note["step"]), "keys": dict(note["keys"])} for note in notes]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: cannot be read (%s)", output_dir / CHANGES, error)
        return []


def _same(key: str, before: Mapping[str, Any], keys: Mapping[str, Any]) -> bool:
    """Whether a key has one meaning; paths are compared as seen from the run, whatever the working directory is."""
    if _meant(key, before) == _meant(key, keys):
        return True
    return from_run(key, before) is not None and from_run(key, before) == from_run(key, keys)


def _meant(key: str, keys: Mapping[str, Any]) -> Any:
    """What a key means, left out or not, as YAML or as words of a command line."""
    value, default = keys.get(key), _DEFAULTS.get(key)
    return _plain(getattr(default, "value", default) if value is None else value, key in _NUMBERS)


def _plain(value: Any, is_number: bool) -> Any:
    """A value in one spelling: `2e-5` and `0.00002`, one item and a list of it, a mapping and its JSON are the same."""
    if isinstance(value, list):
        return _plain(value[0], is_number) if len(value) == 1 else [_plain(item, is_number) for item in value]
    if isinstance(value, dict) or value is None:
        return value
    text = str(value)
    # What is none of these is refused where it is read.
    with suppress(ValueError):
        if is_number:
            return float(text)
        if text.startswith("{"):
            return json.loads(text)
    return text.lower() if text.lower() in ("true", "false") else text
