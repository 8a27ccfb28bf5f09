"""What all commands share: logging, exit status and the one line that reports an error."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable

from training.common.errors import InterruptedTrainingError, StoppedError, UserError, in_one_line, lost_contact

_QUIET = ("faiss", "gguf", "httpx", "httpx2", "mteb", "sentence_transformers")
# Environment variables that hold secrets, and text that looks like one: a Hub token, the login in a URL (as in proxy
# addresses), the signature of a URL.
_SECRET_NAME = re.compile("TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_TOKEN = re.compile(r"hf_\w{8,}|(?<=://)[^\s/@]+(?=@)|(?<=[Ss]ignature=)[^\s&'\"]+")
_SHORTEST_SECRET = 6


def run_command(work: Callable[[], int | None], resumes: bool = False) -> int:
    """Run a command and return its exit status; an error is reported in one line.

    The status is 0 for success; 1 if the work stopped (a full disk, a failed task, work submitted to a cluster) or the
    program has a bug, whose traceback goes to a file; 2 for faulty input; 128 plus the number of the signal that ended
    it (130 for Ctrl-C). Finished work is kept in all cases. Ranks other than 0 name themselves.

    Args:
        work: Does everything, or raises; a result is the exit status.
        resumes: Whether the command continues with ``--resume`` and its errors say where it stopped.
    """
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(level=logging.WARNING if rank else logging.INFO, format="%(message)s")
    for library in _QUIET:
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        return work() or 0
    except (Exception, KeyboardInterrupt) as error:
        kind, message, status = _ending(error, resumes)
        process = f"[process {rank}] " if rank else ""
        sys.stderr.write(f"{process}{kind}: {message}\n")
        return status


def require(package: str, extra: str) -> None:
    """End a script with one line if an optional package that its imports need is missing.

    Args:
        package: The package to import.
        extra: The extra of this project that installs it.
    """
    try:
        __import__(package)
    except ImportError as error:
        sys.stderr.write(f"error: this command needs {package} ({error}); install it: pip install -e '.[{extra}]'\n")
        raise SystemExit(2) from None


def _ending(error: Exception | KeyboardInterrupt, resumes: bool) -> tuple[str, str, int]:
    """Return the kind, the message and the exit status of an error."""
    again = f"To go on, run the same command {'with --resume' if resumes else 'again'}"
    if isinstance(error, UserError):
        return "error", str(error), 2
    if isinstance(error, StoppedError) and resumes:
        return "stopped", str(error), 128 + error.signal if isinstance(error, InterruptedTrainingError) else 1
    # A full disk or a folder that cannot be written loses no work. The remedy in a StoppedError is about training.
    if isinstance(error, StoppedError | OSError):
        return "stopped", f"{error.what if isinstance(error, StoppedError) else error}. {again}", 1
    if isinstance(error, KeyboardInterrupt):
        number = signal.Signals(*error.args or [signal.SIGINT])
        return "stopped", f"{f'{number.name}: ended at once' if resumes else 'interrupted'}. {again}", 128 + number
    # How pathlib reports links in a circle.
    if isinstance(error, RuntimeError) and "Symlink loop" in str(error):
        return "error", f"{in_one_line(error)}; correct the link, or give another path", 2
    # torch's error is recognised by name: not every command loads torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        what = f"out of memory ({in_one_line(error) or type(error).__name__})"
        return "stopped", f"{what}; free some, or give the command less at once. {again}", 1
    # Without torch, there are no other ranks to lose.
    if "torch" in sys.modules and lost_contact(error):
        what = "lost contact with another process: look above for what ended that one"
        return "stopped", f"{what} ({in_one_line(error)}). {again}", 1
    what = _without_secrets(f"{type(error).__name__}: {in_one_line(error)}")
    return "error", f"unexpected {what}; please report it, with its traceback: {_saved_traceback(error)}", 1


def _saved_traceback(error: Exception) -> str:
    """Return the path of a new file with the traceback, readable by the user only."""
    text = _without_secrets("".join(traceback.format_exception(error)))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="f2llm-traceback-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(text)
    except OSError as reason:
        return f"not saved ({reason})"
    return file.name


def _without_secrets(text: str) -> str:
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, f"<{name}>")
    return _TOKEN.sub("<token>", text)
