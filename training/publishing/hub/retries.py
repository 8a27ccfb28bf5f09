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
    RevisionNotFoundError,
)

from training.common.errors import StoppedError, UserError, in_one_line

logger = logging.getLogger("training")

T = TypeVar("T")

# Timeouts, rate limits and server errors. 412: the branch has moved; the next try finds out who moved it.
_TEMPORARY = (408, 412, 429, 500, 502, 503, 504)
_MESSAGES = (
    (LocalTokenNotFoundError, "not logged in to the Hub; run `hf auth login` or set HF_TOKEN"),
    (OfflineModeIsEnabled, "{what}: the client is offline; unset HF_HUB_OFFLINE"),
    (RepositoryNotFoundError, "{repo}: there is no such repository, or the login may not see it"),
    (RevisionNotFoundError, "{repo}: there is no such revision ({what})"),
)
_FULL = "the storage of its owner is full or its plan does not allow more; make room there, or use another repository"
_REMEDIES = {
    402: _FULL,
    409: "somebody else changes it at the same time; look at it and run the same command again",
    413: "it is larger than the Hub or its owner's storage allows; make smaller files or room there",
    422: "the Hub does not accept a name or the header of the card; correct it and run the same command again",
    423: "it is locked, for example while it is moved; run the same command again later",
    507: _FULL,
}
# In the Hub's own addresses. Large files go to a storage service, by addresses that the Hub signs.
_HUB_PATHS = ("/api/", ".git/info/lfs/", "/resolve/")


class HubUnavailableError(StoppedError):
    """The Hub cannot be reached, or kept failing until the last try."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often a failed call is tried again.

    Attributes:
        tries: Tries per call.
        first_wait: Seconds before the second try; each further wait is twice as long.
        longest_wait: Seconds. A Hub that asks for a longer wait counts as unavailable.
        sleep: Waits.
    """

    tries: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    sleep: Callable[[float], None] = time.sleep

    def call(self, what: str, work: Callable[[], T], repo: str | None = None, tries: int | None = None) -> T:
        """Return the result of a call; retry temporary failures.

        Args:
            what: What the call does, for messages: ``"making org/name"``.
            work: The call.
            repo: The repository that it is about.
            tries: Instead of the policy's: 1 for calls that huggingface_hub repeats.

        Raises:
            HubUnavailableError: If the last try fails, too. A refusal is a ``UserError``.
        """
        for attempt in count(1):
            try:
                return work()
            except Exception as wrapped:
                error = _cause(wrapped)
                if not _is_temporary(error):
                    raise _explained(what, error, repo) from None
                asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
                wait = max(self.first_wait * 2 ** (attempt - 1), float(asked) if asked.isdigit() else 0.0)
                if attempt == (tries or self.tries) or wait > self.longest_wait:
                    raise HubUnavailableError(f"the Hub is unavailable ({what}: {_reason(error)})") from None
            logger.info("%s: %s; trying again in %.0f seconds", what, _reason(error), wait)
            self.sleep(wait)


def _cause(error: Exception) -> Exception:
    """Return the original error: huggingface_hub wraps those of uploads of large files, and of downloads."""
    while isinstance(error, RuntimeError | LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _is_malformed(error: Exception) -> bool:
    """Return whether the request was invalid. The text of this error quotes the token."""
    # Compared by name: versions of huggingface_hub use different HTTP libraries.
    return isinstance(error, HTTPError) and type(error).__name__ == "LocalProtocolError"


def _is_temporary(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TEMPORARY
    known = isinstance(error, HTTPError | ConnectionError | TimeoutError | LocalEntryNotFoundError)
    return known and not isinstance(error, OfflineModeIsEnabled) and not _is_malformed(error)


def _reason(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"status {error.response.status_code}"
    return in_one_line(error) or type(error).__name__


def _explained(what: str, error: Exception, repo: str | None) -> Exception:
    """Return the error for the user: what was refused, why, and the remedy."""
    for kind, message in _MESSAGES:
        if isinstance(error, kind):
            return UserError(message.format(what=what, repo=repo))
    if _is_malformed(error):
        return UserError(
            "the Hub's client cannot send the login: its token holds invalid characters; "
            "run `hf auth login --force`, or set HF_TOKEN to a valid one"
        )
    if isinstance(error, HfHubHTTPError):
        return UserError(_explain_status(what, error, repo))
    # huggingface_hub builds its objects from any answer, and says of some that it expected another one.
    unexpected = isinstance(error, AttributeError | LookupError | TypeError | JSONDecodeError | FileMetadataError)
    is_value_error = isinstance(error, ValueError) and not isinstance(error, UserError)
    if unexpected or (is_value_error and re.search("improperly formatted|Malformed response", str(error))):
        logger.debug("%s: the answer cannot be read", what, exc_info=error)
        return HubUnavailableError(
            f"{what}: the answer is not one of a Hub ({type(error).__name__}: {in_one_line(error)}); a proxy or a "
            "login page may have sent it: check the network and HF_ENDPOINT"
        )
    return UserError(f"{what}: {in_one_line(error)}") if is_value_error else error


def _explain_status(what: str, error: HfHubHTTPError, repo: str | None) -> str:
    status, request = error.response.status_code, error.response.request
    # The address of a stored file may carry a signature behind its question mark.
    said = " ".join(re.sub(r"\?\S+", "?…", error.server_message or "").split())[:200]
    answer = f"(status {status}{f': {said}' if said else ''})"
    service, remedy = "the Hub", _REMEDIES.get(status)
    if not any(part in str(request.url) for part in _HUB_PATHS):
        service = "the Hub's storage of large files"
        if status in (401, 403):
            remedy = "the signed address has expired, or a proxy forbids it; run the same command again"
    elif status == 401:
        return (
            "the Hub refuses the login (status 401): its token is wrong or has expired; run `hf auth login --force`, "
            "or set HF_TOKEN to a valid one"
        )
    elif status == 403 and re.search("storage|quota|billing|exceed", said, re.IGNORECASE):
        remedy = _FULL
    elif status == 403:
        done = "read" if request.method in ("GET", "HEAD") else "written"
        return (
            f"{repo or what}: may not be {done} by this login {answer}; use a token that may "
            "(`hf auth login --force`), or another repository"
        )
    return f"{what}: {service} refuses it {answer}" + (f": {remedy}" if remedy else "")
