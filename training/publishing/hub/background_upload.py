"""A thread that uploads the checkpoints of a queue, one after the other, for as long as a training runs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from training.common.errors import UserError, in_one_line
from training.publishing.hub.hub import Hub
from training.publishing.hub.retries import HubUnavailableError, Patience
from training.publishing.hub.upload_queue import UploadQueue

logger = logging.getLogger(__name__)

# Seconds before a Hub that was down is tried again; each further time is twice as long.
_FIRST_WAIT, _LONGEST_WAIT = 30.0, 900.0
# A training has no options of the upload.
_REMEDY = (
    "give another repository as 'push_checkpoints', or run publish.py push-checkpoints with --stage-name or --replace"
)


class BackgroundUpload:
    """Uploads what is in a queue, and what is put into it.

    A Hub that is down is tried again, later and later, and whenever there is something new. What it refuses for good
    ends the uploads, with a warning. Nothing is ever raised.

    Args:
        queue: The queue.
        run: Folder of the run that it belongs to.
        repo: ``ORG/NAME``.
        waits: Seconds before the first further try of a Hub that is down, and at most.
        upload: Uploads a checkpoint; the usual way if None.
    """

    def __init__(
        self,
        queue: UploadQueue,
        run: Path,
        repo: str,
        *,
        waits: tuple[float, float] = (_FIRST_WAIT, _LONGEST_WAIT),
        upload: Callable[[Path], str] | None = None,
    ) -> None:
        self.queue, self.run, self.repo = queue, run, repo
        self.pushed = 0
        self._upload = upload
        self._first_wait, self._longest_wait = waits
        self._wait = self._first_wait
        self._news = threading.Event()
        self._ending = threading.Event()
        # A daemon: a Hub that hangs cannot keep the process from ending. What is half uploaded is not to be seen.
        self._thread = threading.Thread(target=self._work, name="upload of checkpoints", daemon=True)
        self._thread.start()

    def look_again(self) -> None:
        """Says that there is something new in the queue."""
        self._news.set()

    def finish(self, seconds: float) -> int:
        """Waits until all is uploaded, the Hub fails, or the time is over; returns how many were uploaded.

        Args:
            seconds: To wait at most.
        """
        until = time.monotonic() + seconds
        self._ending.set()
        self._news.set()
        self._thread.join(max(until - time.monotonic(), 0))
        return self.pushed

    def _work(self) -> None:
        try:
            while True:
                self._news.clear()
                down = self._upload_all()
                if self._ending.is_set():
                    return
                self._news.wait(self._wait if down else None)
                self._wait = min(2 * self._wait, self._longest_wait) if down else self._first_wait
        except UserError as error:
            logger.warning("%s: no further checkpoints are uploaded in this run: %s", self.repo, error)
        # The training is worth more than the reason, whatever it is.
        except Exception as error:
            logger.warning(
                "%s: no further checkpoints are uploaded in this run (%s: %s)",
                self.repo,
                type(error).__name__,
                in_one_line(error),
            )

    def _upload_all(self) -> bool:
        """Uploads what waits; whether the Hub is down."""
        while waiting := self.queue.waiting():
            if self._upload is None:
                self._upload = self._usual()
            try:
                revision = self._upload(waiting[0])
            except HubUnavailableError as error:
                logger.warning("%s; %d checkpoints wait", error, len(waiting))
                return True
            except (UserError, OSError) as error:
                # `push-checkpoints` may have uploaded it meanwhile.
                if not waiting[0].exists():
                    continue
                if isinstance(error, UserError):
                    raise error.advising(_REMEDY) from None
                raise
            self.queue.remove(waiting[0])
            self.pushed += 1
            logger.info("%s: uploaded %s", self.repo, revision)
        return False

    def _usual(self) -> Callable[[Path], str]:
        from training.publishing.hub.checkpoint_files import CheckpointedRun
        from training.publishing.hub.checkpoint_upload import CheckpointUpload

        # When the training ends, no further try is waited for.
        patience = Patience(tries=3, sleep=self._ending.wait)
        return CheckpointUpload(CheckpointedRun.of(self.run), self.repo, Hub(patience=patience)).upload
