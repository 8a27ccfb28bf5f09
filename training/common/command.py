"""What all commands share: their log, and how they end."""

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
# Names of variables that hold what nobody else may read, and what has the form of a secret: a token of the Hub, the
# login in an address (as in those of proxies), the signature of one.
_SECRET_NAME = re.compile("TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_TOKEN = re.compile(r"hf_\w{8,}|(?<=://)[^\s/@]+(?=@)|(?<=[Ss]ignature=)[^\s&'\"]+")
_SHORTEST_SECRET = 6


def run_command(work: Callable[[], int | None], resumes: bool = False) -> int:
    """Does the work of a command and returns its exit status, with one line for whatever ended it.

    0; 1 if the work stopped (a full disk, a failed task, work handed over to a cluster) or the program is at fault,
    whose traceback goes to a file; 2 for faulty input; 128 and the signal's number if a signal ended it, 130 for
    Ctrl-C. What is done is kept in all cases. Processes other than the first name themselves.

    Args:
        work: Does everything, or raises; a result is the exit status.
        resumes: Whether the command goes on with ``--resume``, as what it raises says where the work stopped.
    """
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(level=logging.WARNING if rank else logging.INFO, format="%(message)s")
    for library in _QUIET:
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        return work() or 0
    except BaseException as error:
        if not isinstance(error, Exception | KeyboardInterrupt):
            raise
        kind, message, status = _ending(error, resumes)
        process = f"[process {rank}] " if rank else ""
        sys.stderr.write(f"{process}{kind}: {message}\n")
        return status


def require(package: str, extra: str) -> None:
    """Ends a script whose imports would fail for want of an optional package, with one line.

    Args:
        package: What is imported.
        extra: The extra of this project that installs it.
    """
    try:
        __import__(package)
    except ImportError as error:
        sys.stderr.write(f"error: this command needs {package} ({error}); install it: pip install -e '.[{extra}]'\n")
        raise SystemExit(2) from None


def _ending(error: Exception | KeyboardInterrupt, resumes: bool) -> tuple[str, str, int]:
    """What is said of an error, and the exit status."""
    go_on = f"To go on, run the same command {'with --resume' if resumes else 'again'}"
    if isinstance(error, UserError):
        return "error", str(error), 2
    if isinstance(error, StoppedError) and resumes:
        return "stopped", str(error), 128 + error.signal if isinstance(error, InterruptedTrainingError) else 1
    # Nothing is lost by a full disk or a folder that cannot be written.
    if isinstance(error, StoppedError | OSError):
        # The remedy of a training is to resume, which all other commands do by themselves.
        return "stopped", f"{error.what if isinstance(error, StoppedError) else error}. {go_on}", 1
    if isinstance(error, KeyboardInterrupt):
        number = signal.Signals(*error.args or [signal.SIGINT])
        return "stopped", f"{f'{number.name}: ended at once' if resumes else 'interrupted'}. {go_on}", 128 + number
    # How pathlib tells of links in a circle.
    if isinstance(error, RuntimeError) and "Symlink loop" in str(error):
        return "error", f"{in_one_line(error)}; correct the link, or give another path", 2
    # torch's own is known by its name: not every command has torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        what = f"out of memory ({in_one_line(error) or type(error).__name__})"
        return "stopped", f"{what}; free some, or give the command less at once. {go_on}", 1
    # Without torch, no process can have lost another.
    if "torch" in sys.modules and lost_contact(error):
        what = "lost contact with another process: look above for what ended that one"
        return "stopped", f"{what} ({in_one_line(error)}). {go_on}", 1
    what = _without_secrets(f"{type(error).__name__}: {in_one_line(error)}")
    return "error", f"unexpected {what}; please report it, with its traceback: {_saved_traceback(error)}", 1


def _saved_traceback(error: Exception) -> str:
    """The file that holds the traceback, which nobody but the user can read."""
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
