"""Uploads checkpoints in the background of a training. Hub failures never interrupt the training."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.common.errors import UserError, in_one_line
from training.common.hub import check_revision
from training.publishing.hub.checkpoints import CheckpointUpload, PushQueue
from training.publishing.hub.hub import Hub, HubUnavailableError
from training.publishing.hub.upload import Destination
from training.trainer.stopping import Interruption

logger = logging.getLogger(__name__)

# Seconds to wait for the Hub to check the login.
_LOGIN_SECONDS = 20.0
# Seconds to wait for uploads at the end of a training, and after a signal, whose sender often allows only 30 s.
_LAST_SECONDS, _INTERRUPTED_SECONDS = 120.0, 5.0
# Seconds before a Hub that was down is tried again: at first, and at most after doubling each time.
_WAITS = (30.0, 900.0)
# A recipe has no keys for the options of push-checkpoints.
_REMEDY = (
    "give another repository as 'push_checkpoints', or run publish.py push-checkpoints with --stage-name or --replace"
)


def check_uploads(run: Path) -> None:
    """Refuse uploads that cannot work, without the network: before a run prepares its data."""
    if get_token() is None:
        raise UserError("key 'push_checkpoints': not logged in to the Hub; run 'hf auth login' or set HF_TOKEN")
    check_revision("key 'output_dir'", run.resolve().name)


def push_callback(repo: str, run: Path, interruption: Interruption | None = None) -> PushCheckpoints:
    """Return the callback of a run, after checking the login. A Hub that is down is only logged."""
    ended: list[UserError | HubUnavailableError | None] = []

    def check_login() -> None:
        try:
            hub = Hub(tries=1)
            hub.call("checking the login", hub.api.whoami)
            ended.append(None)
        except (UserError, HubUnavailableError) as error:
            ended.append(error)

    # In a thread: a Hub that hangs must not delay the training.
    thread = threading.Thread(target=check_login, daemon=True)
    thread.start()
    thread.join(_LOGIN_SECONDS)
    fault = ended[0] if ended else "the Hub does not answer"
    if isinstance(fault, UserError):
        raise UserError(f"key 'push_checkpoints': {fault}")
    if fault is not None:
        logger.warning("%s; checkpoints stay in the queue until it is back", fault)
    return PushCheckpoints(repo, run, interruption)


def push_pending(repo: str, run: Path) -> None:
    """Upload what an earlier training left in the queue, for a limited time."""
    if PushQueue(run).pending():
        callback = push_callback(repo, run)
        callback.begin()
        callback.end()


class PushCheckpoints(TrainerCallback):
    """Puts each checkpoint into the run's queue, from which a thread uploads them, oldest first.

    If the queue or disk is full, the checkpoint is skipped with a warning. A Hub that is down is tried again after
    growing waits and after each new checkpoint; a refusal ends the uploads with a warning. What is then left in the
    queue is uploaded by the next start of the training, or by ``publish.py push-checkpoints``.
    """

    def __init__(self, repo: str, run: Path, interruption: Interruption | None = None) -> None:
        self.repo, self.run, self.queue, self.interruption = repo, run, PushQueue(run), interruption
        self.pushed = 0
        self._news, self._ending = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._command = f"run: python training/publish.py push-checkpoints {run} --repo {repo}"

    def begin(self) -> None:
        """Start the uploads, of what an earlier training left in the queue first."""
        self.queue.tidy()
        # A daemon: a Hub that hangs cannot keep the process alive, and half an upload is invisible.
        self._thread = threading.Thread(target=self._work, name="upload of checkpoints", daemon=True)
        self._thread.start()

    def end(self, hurry: bool = False) -> None:
        """Wait for the uploads, only for seconds in a ``hurry``. To be called when the finished model is saved."""
        if self._thread is None:
            return
        hurry = hurry or (self.interruption is not None and self.interruption.signal is not None)
        self._ending.set()
        self._news.set()
        self._thread.join(_INTERRUPTED_SECONDS if hurry else _LAST_SECONDS)
        pending = [path.name for path in self.queue.pending()]
        logger.info("%s: %d checkpoints uploaded", self.repo, self.pushed)
        if pending:
            logger.warning("%s: not uploaded yet: %s; %s", self.repo, ", ".join(pending), self._command)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the uploads."""
        self.begin()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the new checkpoint into the queue."""
        checkpoint = self.run / f"checkpoint-{state.global_step}"
        try:
            self.queue.add(checkpoint)
        except (UserError, OSError) as error:
            logger.warning("%s is not uploaded: %s. While the run keeps it, %s", checkpoint, error, self._command)
        self._news.set()

    def _work(self) -> None:
        wait, longest = _WAITS
        try:
            # At the end of the training, the waits between tries end, too.
            upload = CheckpointUpload(self.run, Destination(self.repo), Hub(tries=3, sleep=self._ending.wait))
            while True:
                self._news.clear()
                available = self._upload_pending(upload)
                if self._ending.is_set():
                    return
                self._news.wait(None if available else wait)
                wait = _WAITS[0] if available else min(2 * wait, longest)
        # Nothing may interrupt the training.
        except Exception as error:
            error = error.advising(_REMEDY) if isinstance(error, UserError) else error
            logger.warning("%s: no further checkpoints are uploaded in this run: %s", self.repo, in_one_line(error))

    def _upload_pending(self, upload: CheckpointUpload) -> bool:
        """Upload what is in the queue; return whether the Hub was available."""
        while pending := self.queue.pending():
            try:
                revision = upload.upload(pending[0])
            except HubUnavailableError as error:
                logger.warning("%s; %d checkpoints are in the queue", error, len(pending))
                return False
            except (UserError, OSError):
                # `push-checkpoints` may have uploaded it meanwhile.
                if not pending[0].exists():
                    continue
                raise
            self.queue.remove(pending[0])
            self.pushed += 1
            logger.info("%s: uploaded %s", self.repo, revision)
        return True
