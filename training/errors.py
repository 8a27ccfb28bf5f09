"""Errors that the command line reports in one line."""

from __future__ import annotations

__all__ = ["InterruptedTrainingError", "NonFiniteError", "StoppedError", "UserError", "in_one_line", "lost_contact"]


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what to do."""


class StoppedError(RuntimeError):
    """Training had to stop; the message says why, where the last good checkpoint is and how to go on."""


class NonFiniteError(StoppedError):
    """The loss, a gradient or a weight became NaN or infinite."""


class InterruptedTrainingError(StoppedError):
    """A signal asked training to stop; ``signal`` is its number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def in_one_line(error: Exception) -> str:
    """The message of a library's error, short enough to be part of one of ours."""
    text = str(error).strip()
    # A loader worker hands its traceback on: what happened is in the last line.
    if "in DataLoader worker" in text:
        text = text.splitlines()[-1]
    return " ".join(text.split())[:300]


def lost_contact(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    # Data work imports this file too, in processes that have no use for torch.
    from torch.distributed import DistError

    return isinstance(error, RuntimeError) and (isinstance(error, DistError) or "gloo" in str(error))
