"""What the Hub means by a status, and what to do about it."""

from __future__ import annotations

import re

from huggingface_hub.errors import HfHubHTTPError

_LOGIN = (
    "the Hub refuses the login (status 401): its token is wrong or has expired; run `hf auth login --force`, or set "
    "HF_TOKEN to a valid one"
)
_FULL = "the storage of its owner is full or its plan does not allow more; make room there, or use another repository"
_REMEDIES = {
    402: _FULL,
    409: "somebody else changes it at the same time; look at it and run the same command again",
    413: "it is larger than the Hub takes, or than its owner's storage; make smaller files or room there",
    422: "a name, or the header of the card, is not as the Hub wants it; correct that and run the same command again",
    423: "it is locked, as while it is moved; run the same command again later",
    507: _FULL,
}
# Calls of the Hub itself; large files go to a storage service, by addresses that the Hub signs.
_OF_HUB = ("/api/", ".git/info/lfs/", "/resolve/")
_ABOUT_STORAGE = re.compile(r"storage|quota|billing|exceed", re.IGNORECASE)


def explain_status(what: str, error: HfHubHTTPError, repo: str | None) -> str:
    """A line for a call that was refused: what, the status, what the Hub says to it, and what to do.

    Args:
        what: Of the call.
        error: Of the client.
        repo: The repository that it is about.
    """
    status, said = error.response.status_code, _said(error)
    told = f"(status {status}{f': {said}' if said else ''})"
    if not any(part in str(error.response.request.url) for part in _OF_HUB):
        return _of_storage(what, status, told)
    if status == 401:
        return _LOGIN
    if status == 403 and not _ABOUT_STORAGE.search(said):
        done = "read" if error.response.request.method in ("GET", "HEAD") else "written"
        return (
            f"{repo or what}: may not be {done} by this login {told}; use a token that may (`hf auth login --force`), "
            "or another repository"
        )
    remedy = _FULL if status == 403 else _REMEDIES.get(status)
    return f"{what}: the Hub refuses it {told}" + (f": {remedy}" if remedy else "")


def _of_storage(what: str, status: int, told: str) -> str:
    remedy = _REMEDIES.get(status)
    if status in (401, 403):
        remedy = (
            "the address that the Hub signed has expired, or something between, such as a proxy, forbids it; run the "
            "same command again"
        )
    return f"{what}: the Hub's storage of large files refuses it {told}" + (f": {remedy}" if remedy else "")


def _said(error: HfHubHTTPError) -> str:
    """What the answer says in words; nothing that is signed or longer than a line."""
    said = error.server_message or ""
    # The address of a stored file may carry a signature behind its question mark.
    return " ".join(re.sub(r"\?\S+", "?…", said).split())[:200]
