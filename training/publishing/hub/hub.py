"""Repositories on the Hub. A branch is written whole or not at all, and writing it twice changes nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, set_client_factory
from huggingface_hub.errors import (
    FileMetadataError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from training.common.errors import StoppedError, UserError, in_one_line
from training.common.hub import ATTRIBUTES, SCRATCH, Content, same_files
from training.common.outputs import temporary_folder

logger = logging.getLogger("training")

T = TypeVar("T")

# Seconds without a byte after which a connection is closed; huggingface_hub itself has no timeout.
_TIMEOUT = 300.0
# A Hub that asks for a longer wait counts as unavailable.
_LONGEST_WAIT_SECONDS = 60.0
# Timeouts, rate limits and server errors. 412: the branch has moved; the next try finds out who moved it.
_TEMPORARY = (408, 412, 429, 500, 502, 503, 504)
# A proxy or a login page may answer instead of the Hub.
_MISSING = (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)
_UNEXPECTED_ANSWER = (AttributeError, LookupError, TypeError, JSONDecodeError, UnicodeDecodeError, FileMetadataError)
_LOGIN = "run `hf auth login --force`, or set HF_TOKEN to a valid token"
_FULL = "the storage of its owner is full or its plan does not allow more; make room there, or use another repository"
_REMEDIES = {
    401: f"not logged in, or the token is wrong or has expired; {_LOGIN}",
    402: _FULL,
    403: f"this login may not do it ({_LOGIN}), or the storage of its owner is full",
    413: _FULL,
    507: _FULL,
}
_MESSAGES = {
    LocalTokenNotFoundError: f"not logged in to the Hub; {_LOGIN}",
    OfflineModeIsEnabled: "the client is offline; unset HF_HUB_OFFLINE",
    RepositoryNotFoundError: "there is no such repository, or the login may not see it",
}


class HubUnavailableError(StoppedError):
    """The Hub cannot be reached, or kept failing until the last try."""


class WrittenMeanwhileError(UserError):
    """Somebody else wrote to a branch that was about to be written."""

    def __init__(self, repo: str, branch: str) -> None:
        super().__init__(f"{repo}: somebody else wrote to {branch} meanwhile; look at it and run this again")


@cache
def _set_timeout() -> None:
    """Give the HTTP session of huggingface_hub a timeout. The process has only one session, so once is enough."""
    session = get_session()
    set_client_factory(lambda: type(session)(event_hooks=session.event_hooks, follow_redirects=True, timeout=_TIMEOUT))


class Hub:
    """A Hub, used with the login of huggingface_hub. The token is not read here, and no message holds it.

    Args:
        tries: How often a call is tried that fails for a short time, such as with a timeout or a server error.
        sleep: Waits between two tries for 1, 2, 4, … seconds, or as long as the Hub asks for.
        api: The client; by default that of ``HF_ENDPOINT``.
    """

    def __init__(self, tries: int = 6, sleep: Callable[[float], None] | None = None, api: HfApi | None = None) -> None:
        _set_timeout()
        self.tries, self.sleep, self.api = tries, sleep or time.sleep, api or HfApi()

    def call(self, what: str, work: Callable[[], T]) -> T:
        """Return the result of a call that does ``what`` (``"making org/name"``).

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
                    asked = error.response.headers.get("Retry-After", "")
                    reason = f"status {error.response.status_code}"
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
        status, said = error.response.status_code, in_one_line(error.server_message or "no message")
        return UserError("; ".join(filter(None, [f"{what}: status {status}: {said}", _REMEDIES.get(status)])))
    # Raised by huggingface_hub where it builds its objects from an answer.
    if isinstance(error, _UNEXPECTED_ANSWER):
        return HubUnavailableError(f"{what}: the answer is not one of a Hub ({in_one_line(error)}); check the network")
    # A card that huggingface_hub refuses.
    if isinstance(error, ValueError) and not isinstance(error, UserError):
        return UserError(f"{what}: {in_one_line(error)}")
    return error


@dataclass(frozen=True)
class HubRepository:
    """A ``model`` or ``dataset`` repository (``kind``) called ``ORG/NAME``, whether it exists or not."""

    hub: Hub
    name: str
    kind: str = "model"

    @property
    def address(self) -> str:
        """The address of its page."""
        return f"{self.hub.api.endpoint}/{'' if self.kind == 'model' else f'{self.kind}s/'}{self.name}"

    def _ask(self, method: str, *arguments: Any, missing_ok: bool = False, **options: Any) -> Any:
        """Call a method of ``HfApi`` for this repository; with ``missing_ok``, None for what does not exist."""

        def attempt() -> Any:
            with suppress(*_MISSING if missing_ok else ()):
                answer = getattr(self.hub.api, method)(self.name, *arguments, repo_type=self.kind, **options)
                # A listing asks for page by page.
                return list(answer) if isinstance(answer, Iterator) else answer

        return self.hub.call(f"{method.replace('_', ' ')} of {self.name}", attempt)

    def check(self, private: bool | None = None) -> bool:
        """Return whether it exists. Refuse a public repository if ``private``."""
        info = self._ask("repo_info", missing_ok=True, timeout=_TIMEOUT)
        if private and info is not None and not info.private:
            raise UserError(f"{self.name}: is public on the Hub already; make it private there, or leave out --private")
        return info is not None

    def ensure(self, private: bool | None = None) -> None:
        """Create it if it does not exist, public or private as its owner's settings say if ``private`` is None."""
        if not self.check(private):
            self._ask("create_repo", private=private, exist_ok=True)
            logger.info("%s: created", self.address)

    def refs(self) -> dict[str, dict[str, str]]:
        """Return the commit of each ``branch`` and each ``tag`` by name."""
        refs = self._ask("list_repo_refs")
        listed = {"branch": refs.branches, "tag": refs.tags}
        return {kind: {each.name: each.target_commit for each in found} for kind, found in listed.items()}

    def files(self, revision: str = "main") -> dict[str, RepoFile] | None:
        """Return the files of a branch, tag or commit by path, or None if there is no such revision."""
        entries = self._ask("list_repo_tree", missing_ok=True, recursive=True, revision=revision)
        return None if entries is None else {each.path: each for each in entries if isinstance(each, RepoFile)}

    def read(self, path: str, revision: str = "main") -> bytes | None:
        """Return the content of a small file, or None if it does not exist."""
        # Not from the shared cache, which is read silently when the Hub is down.
        with temporary_folder() as folder:
            options = {"revision": revision, "local_dir": folder, "cache_dir": folder}
            found = self._ask("hf_hub_download", path, missing_ok=True, **options)
            return None if found is None else Path(found).read_bytes()

    def write_branch(
        self,
        files: Mapping[str, Path | bytes | Content],
        message: str,
        revision: str = "main",
        parent: str | None = None,
    ) -> str:
        """Make a branch hold exactly these files, in one commit, unless it does. Return its commit.

        A new branch appears whole or not at all: it is written under its name with :data:`SCRATCH` appended. That
        branch is removed at the end, or by the next run after an interruption. A branch that exists must be at the
        commit ``parent`` if that is given.
        """
        wanted = {path: Content.of(source) for path, source in files.items()}
        refs = self.refs()
        branches, scratch = refs["branch"], revision + SCRATCH
        if revision not in branches and revision in refs["tag"]:
            raise UserError(f"{self.name}: {revision} is a tag, and cannot be written to; give another revision")
        if scratch in branches:
            self._ask("delete_branch", missing_ok=True, branch=scratch)
        if revision in branches:
            if parent not in (None, branches[revision]):
                raise WrittenMeanwhileError(self.name, revision)
            return self._commit(revision, branches[revision], wanted, message)
        self._create("branch", scratch, branches["main"])
        commit = self._commit(scratch, branches["main"], wanted, message)
        self._create("branch", revision, commit)
        self._ask("delete_branch", missing_ok=True, branch=scratch)
        return commit

    def _commit(self, branch: str, head: str, wanted: Mapping[str, Content], message: str) -> str:
        """Bring a branch from the commit ``head`` to the wanted files; return its commit."""
        held = self.files(head) or {}
        changed = {path: each for path, each in wanted.items() if path not in held or not each.is_in(held[path])}
        surplus = held.keys() - wanted.keys() - {ATTRIBUTES}
        if not changed and not surplus:
            return head
        logger.info("%s: uploading %.1f MB", self.name, sum(each.size for each in changed.values()) / 1e6)
        additions = [CommitOperationAdd(path, each.payload) for path, each in sorted(changed.items())]
        operations = [*additions, *(CommitOperationDelete(path, is_folder=False) for path in sorted(surplus))]

        def commit() -> str:
            now = self.refs()["branch"].get(branch)
            if now == head:
                check_unchanged(wanted)
                known = {"revision": branch, "repo_type": self.kind, "parent_commit": head}
                return self.hub.api.create_commit(self.name, operations, commit_message=message, **known).oid
            # After a lost answer, the commit is there.
            if now is not None and same_files(wanted, self.files(now) or {}):
                return now
            raise WrittenMeanwhileError(self.name, branch)

        # Large files first. A further try sends only what the Hub has not got yet.
        self._ask("preupload_lfs_files", additions, free_memory=False, revision=branch)
        done = self.hub.call(f"create commit of {self.name}", commit)
        # The Hub drops what a .gitignore names.
        if not same_files(wanted, self.files(done) or {}):
            raise UserError(f"{self.name}: {branch} does not hold what was uploaded, and is not tagged; run this again")
        logger.info("%s: %d files uploaded, %d removed", self.name, len(changed), len(surplus))
        return done

    def tag(self, tag: str, commit: str) -> None:
        """Tag a commit, and take the tag from another commit."""
        holder = self.refs()["tag"].get(tag)
        if holder not in (None, commit):
            self._ask("delete_tag", missing_ok=True, tag=tag)
        if holder != commit:
            self._create("tag", tag, commit)

    def _create(self, kind: str, name: str, commit: str) -> None:
        """Create a ``branch`` or ``tag`` at a commit."""
        # After a lost answer, it exists.
        self._ask(f"create_{kind}", **{kind: name}, revision=commit, exist_ok=True)
        if self.refs()[kind].get(name) != commit:
            raise WrittenMeanwhileError(self.name, name)


def check_unchanged(wanted: Mapping[str, Content]) -> None:
    """Refuse files that were changed since they were hashed."""
    for path, content in wanted.items():
        if not content.is_unchanged:
            raise UserError(f"{path}: was changed while it was uploaded; nothing was committed, run this again")
