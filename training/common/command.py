"""What all commands share: logging, exit status, the one line that reports an error, and numbers as text."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from training.common.errors import InterruptedTrainingError, StoppedError, UserError, in_one_line, lost_contact

_QUIET = ("faiss", "gguf", "httpx", "httpx2", "mteb", "sentence_transformers")
# Environment variables that may hold secrets, and text that may be one: a Hub token, the login in a URL (as in proxy
# addresses), the signature of a URL. A report loses nothing by too many.
_SECRET_VARIABLE = re.compile("TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"hf_\w{8,}|(?<=://)[^\s/@]+(?=@)|(?<=[Ss]ignature=)[^\s&'\"]+")
# Names of keys that hold a secret, and values that are one: a Hub token, user and password in a URL.
SECRET_NAME = re.compile(
    r"(^|_)(api|access|auth|hub|hf|bearer|secret)_?(token|key)$|(^|_)(token|password|passwd|secret|credentials?)$",
    re.IGNORECASE,
)
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}|://[^/\s:@]+:[^/\s@]+@")


def command_parser(name: str, doc: str, **options: Any) -> argparse.ArgumentParser:
    """Return the parser of a command whose docstring ``doc`` is a summary and, after a blank line, examples."""
    summary, _, examples = doc.strip().partition("\n\n")
    return argparse.ArgumentParser(
        prog=name,
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,
    )


def run_command(work: Callable[[], object], resumes: bool = False) -> int:
    """Run a command and return its exit status; an error is reported in one line.

    The status is 0 for success, or the number that ``work`` returns; 1 if it stopped (a full disk, a failed task, work
    submitted to a cluster) or the program has a bug, whose traceback goes to a file; 2 for faulty input; 128 plus the
    number of the signal that ended it (130 for Ctrl-C). Finished work is kept in all cases. Ranks other than 0 name
    themselves. ``resumes``: the command continues with ``--resume`` and its errors say where it stopped.
    """
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(level=logging.WARNING if rank else logging.INFO, format="%(message)s")
    for library in _QUIET:
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        result = work()
        return result if isinstance(result, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        message, status = _ending(error, resumes)
        process = f"[process {rank}] " if rank else ""
        sys.stderr.write(f"{process}{message}\n")
        return status


def require(package: str, extra: str) -> None:
    """End a script with one line if a package that its imports need, and an ``extra`` installs, is missing."""
    try:
        __import__(package)
    except ImportError as error:
        sys.stderr.write(f"error: this command needs {package} ({error}); install it: pip install -e '.[{extra}]'\n")
        raise SystemExit(2) from None


def _ending(error: Exception | KeyboardInterrupt, resumes: bool) -> tuple[str, int]:
    """Return the message and the exit status of an error."""
    status, what = 1, in_one_line(error)
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, StoppedError):
        if resumes:
            return f"stopped: {error}", 128 + error.signal if isinstance(error, InterruptedTrainingError) else 1
        # The remedy is about training.
        what = error.what
    # A full disk or a folder that cannot be written loses no work.
    elif isinstance(error, OSError):
        what = str(error)
    elif isinstance(error, KeyboardInterrupt):
        number = signal.Signals(*error.args or [signal.SIGINT])
        what, status = f"{number.name}: ended at once" if resumes else "interrupted", 128 + number
    # torch's error is recognised by name: not every command loads torch.
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        what = f"out of memory ({what or type(error).__name__}); free some, or give the command less at once"
    # Without torch, there are no other ranks to lose.
    elif "torch" in sys.modules and lost_contact(error):
        what = f"lost contact with another process: look above for what ended that one ({what})"
    else:
        what = _without_secrets(f"{type(error).__name__}: {what}")
        return f"error: unexpected {what}; please report it, with its traceback: {_saved_traceback(error)}", 1
    return f"stopped: {what}. To go on, run the same command {'with --resume' if resumes else 'again'}", status


def _saved_traceback(error: Exception) -> str:
    """Return the path of a new file with the traceback, readable by the user only."""
    text = _without_secrets("".join(traceback.format_exception(error)))
    options = {"prefix": "f2llm-traceback-", "suffix": ".txt", "delete": False, "encoding": "utf-8"}
    try:
        with tempfile.NamedTemporaryFile("w", errors="backslashreplace", **options) as file:
            file.write(text)
    except OSError as reason:
        return f"not saved ({reason})"
    return file.name


def _without_secrets(text: str) -> str:
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and len(value) > 5:
            text = text.replace(value, f"<{name}>")
    return _SECRET_TEXT.sub("<token>", text)


def size(number: float) -> str:
    """Format bytes as MiB or GiB."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 / 10 else f"{number / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Format a time span as minutes or hours."""
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def operations(number: float) -> str:
    """Format floating-point operations; large numbers also as days of a device that does 1e15 per second."""
    days = number / (1e15 * 86_400)
    return f"{number:.3g} FLOPs" + (f" ({days:,.1f} petaflop/s-days)" if days >= 0.1 else "")
