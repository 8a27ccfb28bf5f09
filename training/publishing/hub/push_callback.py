"""Publishes checkpoints while a training runs: in the background, and never at the cost of the training."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.common.errors import UserError
from training.publishing.hub.background_upload import BackgroundUpload
from training.publishing.hub.hub import Hub
from training.publishing.hub.retries import HubUnavailableError, Patience
from training.publishing.hub.upload_queue import QueueFullError, UploadQueue
from training.trainer.interruption import Interruption

logger = logging.getLogger(__name__)

# For an answer to who is logged in: a Hub that hangs must not hold up the training.
_LOGIN_SECONDS = 20.0
# At the end, for what is under way: the process then ends, and what waits stays in the queue.
_LAST_SECONDS = 120.0
# After a signal: who sent it waits for 30 s or so, and what takes longer goes on at the next start.
_INTERRUPTED_SECONDS = 5.0


def push_callback(repo: str, run: Path, interruption: Interruption | None = None) -> PushCheckpoints:
    """The callback of a run, once it is sure that uploads can work at all.

    Args:
        repo: ``ORG/NAME``.
        run: The run's folder.
        interruption: Says whether a signal ended the training.

    Raises:
        UserError: If nobody is logged in, the token is wrong, or a package is missing. A Hub that is down is no error.
    """
    if find_spec("jinja2") is None:
        raise UserError("key 'push_checkpoints' needs jinja2; install it: pip install -e '.[publish]'")
    try:
        _check_login()
    except UserError as error:
        raise UserError(f"key 'push_checkpoints': {error}") from None
    return PushCheckpoints(repo, run, interruption)


def push_what_waits(repo: str, run: Path) -> None:
    """Uploads what an earlier training of the run left waiting, for a while.

    Args:
        repo: ``ORG/NAME``.
        run: The run's folder.

    Raises:
        UserError: As :func:`push_callback`, if something waits.
    """
    if UploadQueue(run).waiting():
        callback = push_callback(repo, run)
        callback.begin()
        callback.end()


def _check_login() -> None:
    """Raises a UserError if the login is missing or wrong, as far as the Hub says so in time."""
    if get_token() is None:
        raise UserError("not logged in to the Hub; run `hf auth login` or set HF_TOKEN")
    refusals: list[UserError] = []

    def ask() -> None:
        try:
            Hub(patience=Patience(tries=1)).login()
        except UserError as error:
            refusals.append(error)
        except HubUnavailableError as error:
            logger.warning("%s; checkpoints wait until it is back", error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_LOGIN_SECONDS)
    if asking.is_alive():
        logger.warning("the Hub does not answer; checkpoints wait until it does")
    if refusals:
        raise refusals[0]


class PushCheckpoints(TrainerCallback):
    """Puts each checkpoint into the run's queue, from which a thread uploads them.

    What waited from an earlier start is uploaded, too. A full queue or disk, or a Hub that refuses, costs uploads and
    is logged; the training goes on. The queue is emptied by the next start, or by ``publish.py push-checkpoints``.

    Args:
        repo: ``ORG/NAME``.
        run: The run's folder.
        interruption: Says whether a signal ended the training; then its end hardly waits.
        last_seconds: How long the end of the training waits for the uploads.
        upload: Uploads what is in a queue; the usual one if None.
    """

    def __init__(
        self,
        repo: str,
        run: Path,
        interruption: Interruption | None = None,
        last_seconds: float = _LAST_SECONDS,
        upload: Callable[[UploadQueue], BackgroundUpload] | None = None,
    ) -> None:
        self.repo, self.run = repo, run
        self.queue = UploadQueue(run)
        self.interruption = interruption
        self.last_seconds = last_seconds
        self._start = upload or (lambda queue: BackgroundUpload(queue, run, repo))
        self._upload: BackgroundUpload | None = None

    def begin(self) -> None:
        """Starts to upload what waits."""
        if self._upload is None:
            self.queue.tidy()
            self._upload = self._start(self.queue)

    def end(self, hurry: bool = False) -> None:
        """Waits for the uploads, and says what became of them; to be called when the finished model is saved.

        Args:
            hurry: Hardly wait, as after a signal.
        """
        if self._upload is None:
            return
        hurry = hurry or (self.interruption is not None and self.interruption.signal is not None)
        pushed = self._upload.finish(min(self.last_seconds, _INTERRUPTED_SECONDS) if hurry else self.last_seconds)
        self._upload = None
        waiting = [path.name for path in self.queue.waiting()]
        logger.info("%s: %d checkpoints uploaded", self.repo, pushed)
        if waiting:
            logger.warning("%s: not uploaded yet: %s; %s", self.repo, ", ".join(waiting), self._command())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts to upload what waits from an earlier start."""
        self.begin()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts the checkpoint, which is whole by now, into the queue."""
        checkpoint = self.run / f"checkpoint-{state.global_step}"
        try:
            self.queue.add(checkpoint)
        except (QueueFullError, UserError, OSError) as error:
            logger.warning("%s is not uploaded: %s. While the run keeps it, %s", checkpoint, error, self._command())
        if self._upload is not None:
            self._upload.look_again()

    def _command(self) -> str:
        return f"run: python training/publish.py push-checkpoints {self.run} --repo {self.repo}"
