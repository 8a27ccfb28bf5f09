"""Calls to the Hub: tried again when it is down for a moment, and explained when they are refused."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from json import JSONDecodeError
from typing import TypeVar

from huggingface_hub import get_session
from huggingface_hub.errors import (
    FileMetadataError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from training.common.errors import StoppedError, UserError, in_one_line
from training.publishing.hub.refusals import explain_status

logger = logging.getLogger("training")

T = TypeVar("T")

# Timeouts, too many requests, and servers in trouble.
_PASSING = (408, 429, 500, 502, 503, 504)
# Seconds without a byte after which a connection is given up; the client itself would wait for ever.
_SILENCE = 300.0


class HubUnavailableError(StoppedError):
    """The Hub cannot be reached, or is in trouble, and stayed so for as long as we were patient."""


@dataclass(frozen=True)
class Patience:
    """How long to try.

    Attributes:
        tries: Of one call.
        first_wait: Seconds before the second try; each further wait is twice as long.
        longest_wait: Seconds. A Hub that asks to wait longer counts as unavailable.
        sleep: Waits.
    """

    tries: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    sleep: Callable[[float], None] = time.sleep

    def call(self, what: str, work: Callable[[], T], repo: str | None = None, tries: int | None = None) -> T:
        """Does the work, again if it fails for a reason that passes.

        Args:
            what: Of the work, for messages: ``"creating org/name"``.
            work: A call of the client that may be repeated.
            repo: The repository that it is about.
            tries: Instead of the usual number; 1 for calls that the client itself repeats.

        Raises:
            UserError: If the Hub refuses the call.
            HubUnavailableError: If it fails each time.
        """
        tries = self.tries if tries is None else tries
        for attempt in range(1, tries + 1):
            try:
                get_session().timeout = _SILENCE
                return work()
            except Exception as error:
                if not passes(error):
                    raise explain(what, error, repo) from None
                wait = max(self.first_wait * 2 ** (attempt - 1), _asked_wait(error) or 0.0)
                if attempt == tries or wait > self.longest_wait:
                    raise HubUnavailableError(f"the Hub is unavailable ({what}: {_reason(error)})") from None
                logger.info("%s: %s; trying again in %.0f seconds", what, _reason(error), wait)
                self.sleep(wait)
        raise AssertionError("unreachable")


def passes(error: BaseException) -> bool:
    """Whether an error may be gone at the next try: a server in trouble, or a connection that broke."""
    error = _root(error)
    if isinstance(error, OfflineModeIsEnabled) or _is_malformed(error):
        return False
    if isinstance(error, HfHubHTTPError):
        return _status(error) in _PASSING
    return isinstance(error, HTTPError | ConnectionError | TimeoutError | LocalEntryNotFoundError)


def _root(error: BaseException) -> BaseException:
    """What happened: the client wraps errors of an upload of a large file, and of a download that it has no copy of."""
    wraps = isinstance(error, RuntimeError | LocalEntryNotFoundError) and error.__cause__ is not None
    return _root(error.__cause__) if wraps else error


def _is_malformed(error: BaseException) -> bool:
    """Whether the client made no valid request, whose text would quote the header of the token."""
    # By name: the HTTP library differs between versions of the client.
    return isinstance(error, HTTPError) and type(error).__name__ == "LocalProtocolError"


def _status(error: HfHubHTTPError) -> int:
    return error.response.status_code


def _asked_wait(error: BaseException) -> float | None:
    """Seconds that the Hub asks us to wait; None if it does not say."""
    if not isinstance(error, HfHubHTTPError):
        return None
    value = error.response.headers.get("Retry-After", "").strip()
    return float(value) if value.isdigit() else None


def _reason(error: BaseException) -> str:
    error = _root(error)
    if isinstance(error, HfHubHTTPError):
        return f"status {_status(error)}"
    return in_one_line(error) if isinstance(error, Exception) and str(error) else type(error).__name__


def explain(what: str, error: Exception, repo: str | None = None) -> Exception:
    """The error for the user: what was refused, why, and what to do. No message holds the token."""
    root = _root(error)
    if isinstance(root, UserError | StoppedError):
        return root
    if isinstance(root, LocalTokenNotFoundError):
        return UserError("not logged in to the Hub; run `hf auth login` or set HF_TOKEN")
    if _is_malformed(root):
        return UserError(
            "the Hub's client cannot send the login: its token holds characters that no token has; "
            "run `hf auth login --force`, or set HF_TOKEN to a valid one"
        )
    if isinstance(root, OfflineModeIsEnabled):
        return UserError(f"{what}: the client is offline; unset HF_HUB_OFFLINE")
    if isinstance(root, RepositoryNotFoundError):
        return UserError(f"{repo}: there is no such repository, or the login may not see it")
    if isinstance(root, RevisionNotFoundError):
        return UserError(f"{repo}: there is no such revision ({what})")
    if isinstance(root, HfHubHTTPError):
        return UserError(explain_status(what, root, repo))
    # The client makes its objects of whatever was answered.
    if isinstance(root, AttributeError | IndexError | KeyError | TypeError) or _is_unreadable(root):
        logger.debug("%s: the answer cannot be read", what, exc_info=root)
        return HubUnavailableError(
            f"{what}: the answer is not one of a Hub ({type(root).__name__}: {in_one_line(root)}); something between, "
            "such as a proxy or a login page, may have given it: look at the network and at HF_ENDPOINT"
        )
    if isinstance(root, HFValidationError | ValueError):
        return UserError(f"{what}: {in_one_line(root)}")
    return error


def _is_unreadable(error: BaseException) -> bool:
    """Whether the client says that it expected another answer."""
    said = isinstance(error, ValueError) and re.search("improperly formatted|Malformed response", str(error))
    return isinstance(error, JSONDecodeError | FileMetadataError) or bool(said)
