"""Calls to the Hub: retried after temporary failures, explained in one line when they are refused."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from json import JSONDecodeError
from typing import TypeVar

from huggingface_hub.errors import (
    FileMetadataError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from training.common.errors import StoppedError, UserError, in_one_line

logger = logging.getLogger("training")

T = TypeVar("T")

# Timeouts, rate limits and server errors. 412: the branch has moved; the next try finds out who moved it.
_TEMPORARY = (408, 412, 429, 500, 502, 503, 504)
# A Hub that asks for a longer wait counts as unavailable.
_LONGEST_WAIT_SECONDS = 60.0
_MESSAGES = {
    LocalTokenNotFoundError: "not logged in to the Hub; run `hf auth login` or set HF_TOKEN",
    OfflineModeIsEnabled: "the client is offline; unset HF_HUB_OFFLINE",
    RepositoryNotFoundError: "there is no such repository, or the login may not see it",
}
_LOGIN = "run `hf auth login --force`, or set HF_TOKEN to a valid token"
_FULL = "the storage of its owner is full or its plan does not allow more; make room there, or use another repository"
_REMEDIES = {
    401: f"not logged in, or the token is wrong or has expired; {_LOGIN}",
    402: _FULL,
    403: f"this login may not do it; use a token that may ({_LOGIN}), or another repository",
    409: "somebody else changes it at the same time; look at it and run the same command again",
    413: "it is larger than the Hub or its owner's storage allows; make smaller files or room there",
    422: "the Hub does not accept a name or the header of the card; correct it and run the same command again",
    507: _FULL,
}
# Raised by huggingface_hub where it builds its objects from an answer.
_UNEXPECTED_ANSWER = (AttributeError, LookupError, TypeError, JSONDecodeError, UnicodeDecodeError, FileMetadataError)
# In the Hub's own addresses. Large files go to a storage service, by addresses that the Hub signs.
_HUB_PATHS = ("/api/", ".git/info/lfs/", "/resolve/")
_EXPIRED = "the address of the storage has expired, or a proxy forbids it; run the same command again"


class HubUnavailableError(StoppedError):
    """The Hub cannot be reached, or kept failing until the last try."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often a failed call is tried again, with ``sleep`` in between: for 1, 2, 4, … seconds."""

    tries: int = 6
    sleep: Callable[[float], None] = time.sleep

    def call(self, what: str, work: Callable[[], T]) -> T:
        """Return the result of a call that does ``what`` (``"making org/name"``); retry temporary failures.

        Raises:
            HubUnavailableError: If the last try fails, too. A refusal is a ``UserError``.
        """
        for attempt in count(1):
            try:
                return work()
            except Exception as wrapped:
                error = _cause(wrapped)
                if not _is_temporary(error):
                    raise _explained(what, error) from None
                asked, reason = "", in_one_line(error) or type(error).__name__
                if isinstance(error, HfHubHTTPError):
                    asked, reason = (
                        error.response.headers.get("Retry-After", ""),
                        f"status {error.response.status_code}",
                    )
                wait = max(2.0 ** (attempt - 1), float(asked) if asked.isdigit() else 0.0)
                if attempt == self.tries or wait > _LONGEST_WAIT_SECONDS:
                    raise HubUnavailableError(f"the Hub is unavailable ({what}: {reason})") from None
            logger.info("%s: %s; trying again in %.0f seconds", what, reason, wait)
            self.sleep(wait)


def _cause(error: Exception) -> Exception:
    """Return the original error: huggingface_hub wraps those of uploads of large files, and of downloads."""
    while isinstance(error, RuntimeError | LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _has_malformed_token(error: Exception) -> bool:
    # Compared by name: versions of huggingface_hub use different HTTP libraries.
    return isinstance(error, HTTPError) and type(error).__name__ == "LocalProtocolError"


def _is_temporary(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TEMPORARY
    known = isinstance(error, HTTPError | ConnectionError | TimeoutError | LocalEntryNotFoundError)
    return known and not isinstance(error, OfflineModeIsEnabled) and not _has_malformed_token(error)


def _explained(what: str, error: Exception) -> Exception:
    """Return the error for the user: what was refused, why, and the remedy."""
    for kind, message in _MESSAGES.items():
        if isinstance(error, kind):
            return UserError(f"{what}: {message}")
    if _has_malformed_token(error):
        # The text of this error quotes the token.
        return UserError(f"the login cannot be sent: its token holds invalid characters; {_LOGIN}")
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, in_one_line(error.server_message or "")
        remedy = _REMEDIES.get(status)
        if status in (401, 403) and not any(part in str(error.response.request.url) for part in _HUB_PATHS):
            remedy = _EXPIRED
        elif status == 403 and re.search("storage|quota|billing|exceed", said, re.IGNORECASE):
            remedy = _FULL
        answer = f"{what}: the Hub refuses it (status {status}{f': {said}' if said else ''})"
        return UserError(f"{answer}; {remedy}" if remedy else answer)
    if isinstance(error, _UNEXPECTED_ANSWER):
        return HubUnavailableError(
            f"{what}: the answer is not one of a Hub ({type(error).__name__}: {in_one_line(error)}); a proxy or a "
            "login page may have sent it: check the network and HF_ENDPOINT"
        )
    if isinstance(error, ValueError) and not isinstance(error, UserError):
        return UserError(f"{what}: {in_one_line(error)}")
    return error
