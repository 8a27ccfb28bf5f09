"""Errors that a command reports in one line."""

from __future__ import annotations


class _AdvisingError(Exception):
    """A message ``what`` and, as a second argument, a ``remedy`` that depends on the command."""

    _between = "; "

    def __str__(self) -> str:
        return self._between.join(map(str, self.args))

    @property
    def what(self) -> str:
        """The message without a remedy that depends on the command."""
        return str(self.args[0])

    def advising(self, remedy: str) -> _AdvisingError:
        """Return the same error with another command's remedy, if its remedy depends on the command."""
        return self if len(self.args) < 2 else type(self)(self.what, remedy)


class UserError(_AdvisingError, ValueError):
    """Something the user gave is wrong; the message says what, where, and what to do."""


class OutputError(UserError):
    """The output folder of a training run holds something else, or cannot be written."""


class StoppedError(_AdvisingError, RuntimeError):
    """Training had to stop; the message says why, where the last good checkpoint is and how to continue."""

    _between = ". "


class NonFiniteError(StoppedError):
    """The loss, a gradient or a weight became NaN or infinite."""


class InterruptedTrainingError(StoppedError):
    """A signal asked training to stop; ``signal`` is its number."""

    def __init__(self, what: str, remedy: str, signal: int = 0) -> None:
        super().__init__(what, remedy)
        self.signal = signal


def in_one_line(error: Exception) -> str:
    """Return the message of a library's error, short enough to be part of another message."""
    text = str(error).strip()
    # A loader worker passes its whole traceback on; the cause is in the last line.
    if "in DataLoader worker" in text:
        text = text.splitlines()[-1]
    return " ".join(text.split())[:300]


def lost_contact(error: BaseException) -> bool:
    """Return whether an error says that another process of the training is gone."""
    # Data commands do not load torch.
    from torch.distributed import DistError

    return isinstance(error, RuntimeError) and (isinstance(error, DistError) or "gloo" in str(error))
