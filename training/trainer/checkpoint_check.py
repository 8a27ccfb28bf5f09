"""Whether a checkpoint can be resumed from, looked at before anything else is done; and what to do if it cannot."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import TrainerState

from training.common.errors import OutputError, StoppedError, UserError, in_one_line, lost_contact
from training.common.run_folder import checkpoints, last_checkpoint, missing_part, numbered_checkpoints, step_of

logger = logging.getLogger(__name__)


def checkpoint_to_resume(output_dir: Path) -> Path | None:
    """The newest checkpoint that has all its parts, if they can be read.

    Newer ones that lack a part are passed over with a warning: a run that was killed may leave them.

    Raises:
        UserError: If a part of it is damaged.
    """
    newest = last_checkpoint(output_dir)
    if newest is None:
        return None
    for passed in numbered_checkpoints(output_dir):
        if step_of(passed) > step_of(newest):
            logger.warning("%s lacks %s; going on from %s", passed, missing_part(passed), newest.name)
    with reading_checkpoint(newest):
        _check_state(newest / "trainer_state.json", step_of(newest))
        for path in sorted(newest.glob("*.safetensors")):
            with _naming(path), safe_open(path, "pt"):
                # Opening compares the size of the file with what its head says.
                pass
        for path in sorted([*newest.glob("*.pt"), *newest.glob("rng_state*.pth")]):
            with _naming(path):
                _check_tensors(path)
    return newest


def _check_state(path: Path, step: int) -> None:
    with _naming(path):
        state = TrainerState.load_from_json(str(path))
        if state.global_step != step or not isinstance(state.log_history, list):
            raise ValueError(f"it is of step {state.global_step!r}")
        if not isinstance(state.stateful_callbacks, dict):
            raise TypeError("it holds no states of callbacks")


def _check_tensors(path: Path) -> None:
    """Reads the structure of a file of tensors, not their values."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is cut or overwritten")
    if path.suffix == ".pth":
        # Random states have types of numpy; Trainer reads them.
        return
    content = torch.load(path, map_location="meta", weights_only=True)
    if path.name == "optimizer.pt" and not content["param_groups"]:
        raise ValueError("it holds no parameters")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path.name} cannot be read ({in_one_line(error)})") from None


@contextmanager
def reading_checkpoint(checkpoint: Path | str) -> Iterator[None]:
    """A block that reads a checkpoint to go on from it.

    Raises:
        OutputError: If it cannot be read; the message offers the checkpoint before it.
    """
    checkpoint = Path(checkpoint)
    try:
        yield
    except Exception as error:
        _raise_unless_damaged(error)
        before = [each for each in checkpoints(checkpoint.parent) if step_of(each) < step_of(checkpoint)]
        remedy = (
            f"move that folder elsewhere and run the same command with --resume to go on from {before[-1].name}"
            if before
            else "no other checkpoint is before it: start again with another output_dir"
        )
        raise OutputError(f"{checkpoint}: cannot be resumed from: {in_one_line(error)}", remedy) from error


@contextmanager
def reading_best(checkpoint: Path) -> Iterator[None]:
    """A block that reads the best checkpoint at the end of a training.

    Raises:
        OutputError: If it cannot be read, or holds no weights, which Trainer would pass over.
    """
    try:
        if (missing := missing_part(checkpoint)) is not None:
            raise ValueError(f"it lacks {missing}")
        yield
    except Exception as error:
        _raise_unless_damaged(error)
        raise OutputError(
            f"{checkpoint}: is the best checkpoint, but cannot be read: {in_one_line(error)}",
            "move that folder elsewhere and run the same command with --resume to end in the last one",
        ) from error


def _raise_unless_damaged(error: Exception) -> None:
    """Raises an error that does not say that a checkpoint is damaged. Damage comes out of libraries as anything."""
    if isinstance(error, UserError | StoppedError | OSError | MemoryError | torch.OutOfMemoryError):
        raise error
    if lost_contact(error):
        raise error
