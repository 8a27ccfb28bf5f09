"""What the commands of this folder share: their log, and how they end."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable

from training.errors import StoppedError, UserError

__all__ = ["run_command"]


def run_command(work: Callable[[], int | None]) -> int:
    """Does the work of a command and returns its exit status, with one line for whatever ended it.

    0; 1 if the work stopped (a full disk, a failed task, work handed over to a cluster); 2 for faulty input; 130 for
    Ctrl-C. What is done is kept in all cases.

    Args:
        work: Does everything, or raises; a result is the exit status.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for library in ("faiss", "gguf", "httpx", "httpx2", "mteb", "sentence_transformers"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        return work() or 0
    except UserError as error:
        return _report("error", error, 2)
    except (StoppedError, OSError) as error:
        # The remedy of a training is to resume, which is what all of these commands do.
        what = error.what if isinstance(error, StoppedError) else error
        return _report("stopped", f"{what}. To go on, run the same command again", 1)
    except KeyboardInterrupt:
        return _report("stopped", "interrupted. To go on, run the same command again", 128 + signal.SIGINT)


def _report(kind: str, message: object, status: int) -> int:
    sys.stderr.write(f"{kind}: {message}\n")
    return status
