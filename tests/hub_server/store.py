"""What a Hub keeps: accounts, and repositories of commits, branches and tags, in memory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Account", "Commit", "Entry", "Missing", "Refused", "Repository", "Store", "git_blob"]

_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class Missing(Exception):
    """Something that was asked for is not there; ``code`` is the client's name of it: ``RepoNotFound``, …"""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Refused(Exception):
    """A request that the Hub answers with ``status``."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def git_blob(content: bytes) -> str:
    """The id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Account:
    """Who a token belongs to."""

    name: str
    organisations: tuple[str, ...] = ()
    may_write: bool = True

    def owns(self, namespace: str) -> bool:
        return namespace in (self.name, *self.organisations)


@dataclass(frozen=True)
class Entry:
    """A file of a commit; a large one is known by the SHA-256 of its content, too."""

    blob: str
    size: int
    sha256: str | None = None

    @property
    def oid(self) -> str:
        return self.sha256 or self.blob


@dataclass(frozen=True)
class Commit:
    id: str
    tree: Mapping[str, Entry]
    title: str
    parent: str | None


@dataclass
class Repository:
    """A repository; ``moves`` are all the positions that its branches and tags ever had, in order."""

    kind: str
    name: str
    private: bool = False
    gated: str | bool = False
    blobs: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    moves: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self.commit("main", "initial commit", {".gitattributes": self.add_blob(_ATTRIBUTES)}, [])

    def add_blob(self, content: bytes) -> Entry:
        blob = git_blob(content)
        self.blobs[blob] = content
        return Entry(blob, len(content))

    def large_entry(self, sha256: str) -> Entry:
        """The entry of a large file, which must have been uploaded."""
        if sha256 not in self.large:
            raise Refused(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        size = len(self.large[sha256])
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return Entry(git_blob(pointer.encode()), size, sha256)

    def content(self, entry: Entry) -> bytes:
        return self.blobs[entry.blob] if entry.sha256 is None else self.large[entry.sha256]

    def find(self, revision: str) -> Commit:
        """The commit of a branch, a tag or an id."""
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        if commit not in self.commits:
            raise Missing("RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[commit]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The content of all files of a revision by path, without those that the Hub adds."""
        tree = self.find(revision).tree
        return {path: self.content(entry) for path, entry in tree.items() if path != ".gitattributes"}

    def commit(
        self, branch: str, title: str, added: Mapping[str, Entry], deleted: list[str], expected: str | None = None
    ) -> Commit:
        """Commits to a branch, whose head must be ``expected`` if that is given."""
        with self._lock:
            if self.commits and branch not in self.branches:
                raise Missing("RevisionNotFound", f"Invalid rev id: {branch}")
            parent = self.branches.get(branch)
            if expected is not None and expected != parent:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(self.commits[parent].tree) if parent else {}
            for path in deleted:
                if path not in tree:
                    raise Missing("EntryNotFound", f"A file with this name doesn't exist: {path}")
                del tree[path]
            tree |= added
            lines = [f"{path} {entry.blob}" for path, entry in sorted(tree.items())]
            text = json.dumps([self.kind, self.name, lines, parent, title, len(self.commits)])
            commit = Commit(hashlib.sha1(text.encode()).hexdigest(), tree, title, parent)
            self.commits[commit.id] = commit
            self.move(branch, commit.id)
            return commit

    def move(self, branch: str, commit: str) -> None:
        self.branches[branch] = commit
        self.moves.append((branch, commit))

    def history(self, revision: str) -> list[Commit]:
        """The commits of a revision, newest first."""
        commit: Commit | None = self.find(revision)
        commits = []
        while commit is not None:
            commits.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return commits


class Store:
    """All accounts by token, and all repositories by kind (``model``, ``dataset``, ``space``) and name."""

    def __init__(self, accounts: Mapping[str, Account]) -> None:
        self.accounts = dict(accounts)
        self.repositories: dict[tuple[str, str], Repository] = {}

    def create(self, kind: str, name: str, private: bool = False) -> Repository:
        repository = Repository(kind, name, private)
        self.repositories[kind, name] = repository
        return repository

    def repository(self, name: str, kind: str = "model") -> Repository:
        if (kind, name) not in self.repositories:
            raise Missing("RepoNotFound", "Repository not found")
        return self.repositories[kind, name]

    def readable(self, kind: str, name: str, account: Account | None) -> Repository:
        repository = self.repository(name, kind)
        if repository.private and not (account and account.owns(name.split("/")[0])):
            raise Missing("RepoNotFound", "Repository not found")
        return repository

    def writable(self, kind: str, name: str, account: Account | None) -> Repository:
        repository = self.readable(kind, name, account)
        self.check_owner(name.split("/")[0], account)
        return repository

    def check_owner(self, namespace: str, account: Account | None) -> None:
        if account is None:
            raise Refused(401, "Invalid username or password.")
        if not account.owns(namespace) or not account.may_write:
            raise Refused(403, f'You don\'t have the rights to write under the namespace "{namespace}"')
