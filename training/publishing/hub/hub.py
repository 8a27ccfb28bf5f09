"""Repositories on the Hub. A branch is written whole or not at all, and writing it twice changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, set_client_factory
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from training.common.errors import UserError
from training.common.hub import ATTRIBUTES, SCRATCH, Content, same_files
from training.common.outputs import temporary_folder
from training.publishing.hub.retries import RetryPolicy

logger = logging.getLogger("training")

T = TypeVar("T")

# Seconds without a byte after which a connection is closed; huggingface_hub itself has no timeout.
_TIMEOUT = 300.0


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
    """A Hub, used with the login of huggingface_hub. The token is not read here, and no message holds it."""

    def __init__(self, api: HfApi | None = None, retries: RetryPolicy | None = None) -> None:
        _set_timeout()
        self.api = api or HfApi()
        self.retries = retries or RetryPolicy()

    def repository(self, name: str, kind: str = "model") -> HubRepository:
        """Return a repository, whether it exists or not."""
        return HubRepository(self, name, kind)


@dataclass(frozen=True)
class HubRepository:
    """A ``model`` or ``dataset`` repository (``kind``) called ``ORG/NAME``, whether it exists or not.

    Temporary failures are retried. Calls raise ``UserError`` if the Hub refuses them, and ``HubUnavailableError`` if it
    stays down.
    """

    hub: Hub
    name: str
    kind: str = "model"

    @property
    def address(self) -> str:
        """The address of its page."""
        return f"{self.hub.api.endpoint}/{'' if self.kind == 'model' else f'{self.kind}s/'}{self.name}"

    def _find(self, what: str, work: Callable[[], T]) -> T | None:
        """Return the result of a call, or None if what it asks for does not exist."""

        def attempt() -> T | None:
            with suppress(RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
                return work()
            return None

        return self.hub.retries.call(what, attempt)

    def check(self, private: bool | None = None) -> bool:
        """Return whether it exists. Refuse a public repository if ``private``."""
        ask = self.hub.api.repo_info
        info = self._find(f"looking for {self.name}", lambda: ask(self.name, repo_type=self.kind, timeout=_TIMEOUT))
        if private and info is not None and not info.private:
            raise UserError(f"{self.name}: is public on the Hub already; make it private there, or leave out --private")
        return info is not None

    def ensure(self, private: bool | None = None) -> None:
        """Create it if it does not exist, public or private as its owner's settings say if ``private`` is None."""
        create = self.hub.api.create_repo
        if not self.check(private):
            self.hub.retries.call(
                f"making {self.name}", lambda: create(self.name, repo_type=self.kind, private=private, exist_ok=True)
            )
            logger.info("%s: created", self.address)

    def refs(self) -> dict[str, dict[str, str]]:
        """Return the commit of each ``branch`` and each ``tag`` by name."""
        ask = self.hub.api.list_repo_refs
        refs = self.hub.retries.call(f"reading {self.name}", lambda: ask(self.name, repo_type=self.kind))
        listed = {"branch": refs.branches, "tag": refs.tags}
        return {kind: {each.name: each.target_commit for each in found} for kind, found in listed.items()}

    def files(self, revision: str = "main") -> dict[str, RepoFile] | None:
        """Return the files of a branch, tag or commit by path, or None if there is no such revision."""

        def listed() -> dict[str, RepoFile]:
            entries = self.hub.api.list_repo_tree(self.name, recursive=True, revision=revision, repo_type=self.kind)
            files = [entry for entry in entries if isinstance(entry, RepoFile)]
            return {each.path: each for each in files}

        return self._find(f"listing {self.name} at {revision}", listed)

    def read(self, path: str, revision: str = "main") -> bytes | None:
        """Return the content of a small file, or None if it does not exist."""

        def content() -> bytes:
            # Not the shared cache, which is read silently when the Hub is down.
            with temporary_folder() as folder:
                folders = {"local_dir": folder, "cache_dir": folder}
                ask = self.hub.api.hf_hub_download
                return Path(ask(self.name, path, revision=revision, repo_type=self.kind, **folders)).read_bytes()

        return self._find(f"reading {path} of {self.name}", content)

    def publish(
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
            logger.info("%s: removing %s, which an interrupted upload left", self.name, scratch)
            self._delete("branch", scratch)
        if revision in branches:
            if parent not in (None, branches[revision]):
                raise WrittenMeanwhileError(self.name, revision)
            return self._write(revision, branches[revision], wanted, message)
        self._create("branch", scratch, branches["main"])
        commit = self._write(scratch, branches["main"], wanted, message)
        self._create("branch", revision, commit)
        self._delete("branch", scratch)
        return commit

    def _write(self, branch: str, head: str, wanted: Mapping[str, Content], message: str) -> str:
        """Bring a branch from the commit ``head`` to the wanted files; return its commit."""
        held = self.files(head) or {}
        changed = {path: each for path, each in wanted.items() if path not in held or not each.is_in(held[path])}
        surplus = [path for path in held if path not in wanted and path != ATTRIBUTES]
        if not changed and not surplus:
            return head
        logger.info("%s: uploading %.1f MB", self.name, sum(each.size for each in changed.values()) / 1e6)
        target = {"revision": branch, "repo_type": self.kind}
        additions = [CommitOperationAdd(path, each.payload) for path, each in sorted(changed.items())]
        operations = [*additions, *(CommitOperationDelete(path, is_folder=False) for path in surplus)]

        def upload() -> None:
            self.hub.api.preupload_lfs_files(self.name, additions, free_memory=False, **target)

        def commit() -> str:
            now = self.refs()["branch"].get(branch)
            if now == head:
                check_unchanged(wanted)
                known = {"commit_message": message, "parent_commit": head, **target}
                return self.hub.api.create_commit(self.name, operations, **known).oid
            # After a lost answer, the commit is there.
            if now is not None and same_files(wanted, self.files(now) or {}):
                return now
            raise WrittenMeanwhileError(self.name, branch)

        # Large files first. A further try sends only what the Hub has not got yet.
        self.hub.retries.call(f"uploading to {self.name}", upload)
        done = self.hub.retries.call(f"committing to {self.name}", commit)
        if not same_files(wanted, self.files(done) or {}):
            raise UserError(f"{self.name}: {branch} does not hold what was uploaded, and is not tagged; run this again")
        logger.info("%s: %d files uploaded, %d removed, commit %s", self.name, len(changed), len(surplus), done[:12])
        return done

    def tag(self, tag: str, commit: str) -> None:
        """Tag a commit, and take the tag from another commit."""
        holder = self.refs()["tag"].get(tag)
        if holder not in (None, commit):
            self._delete("tag", tag)
        if holder != commit:
            self._create("tag", tag, commit)

    def _create(self, kind: str, name: str, commit: str) -> None:
        """Create a ``branch`` or ``tag`` at a commit."""
        send = getattr(self.hub.api, f"create_{kind}")

        given = {kind: name, "revision": commit, "repo_type": self.kind, "exist_ok": True}
        # After a lost answer, it exists.
        self.hub.retries.call(f"making {name} of {self.name}", lambda: send(self.name, **given))
        if self.refs()[kind].get(name) != commit:
            raise WrittenMeanwhileError(self.name, name)

    def _delete(self, kind: str, name: str) -> None:
        send = getattr(self.hub.api, f"delete_{kind}")
        self._find(f"removing {name} of {self.name}", lambda: send(self.name, **{kind: name}, repo_type=self.kind))


def check_unchanged(wanted: Mapping[str, Content]) -> None:
    """Refuse files that were changed since they were hashed."""
    for path, content in wanted.items():
        if not content.is_unchanged:
            raise UserError(f"{path}: was changed while it was uploaded; nothing was committed, run this again")
