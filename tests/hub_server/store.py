"""What a Hub keeps in memory: repositories with commits, branches and tags, and collections."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.utils.sha import git_hash

_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class Refused(Exception):
    """A request that the Hub answers with a status, and a ``code`` such as ``RepoNotFound``."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Entry:
    """A file of a commit; a large one also has the SHA-256 of its content."""

    blob: str
    size: int
    sha256: str | None = None


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
    blobs: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    moves: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self):
        self._lock = threading.RLock()
        self.commit("main", "initial commit", {".gitattributes": self.add_blob(_ATTRIBUTES)}, [])

    def add_blob(self, content):
        blob = git_hash(content)
        self.blobs[blob] = content
        return Entry(blob, len(content))

    def large_entry(self, sha256):
        if sha256 not in self.large:
            raise Refused(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        size = len(self.large[sha256])
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return Entry(git_hash(pointer.encode()), size, sha256)

    def content(self, entry):
        return self.blobs[entry.blob] if entry.sha256 is None else self.large[entry.sha256]

    def find(self, revision):
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        if commit not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[commit]

    def files(self, revision="main"):
        """Return the content of all files of a revision by path, except those that the Hub adds."""
        tree = self.find(revision).tree
        return {path: self.content(entry) for path, entry in tree.items() if path != ".gitattributes"}

    def commit(self, branch, title, added, deleted, expected=None):
        """Commit to a branch, whose head must be ``expected`` if that is given."""
        with self._lock:
            if self.commits and branch not in self.branches:
                raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            parent = self.branches.get(branch)
            if expected not in (None, parent):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(self.commits[parent].tree) if parent else {}
            for path in deleted:
                if tree.pop(path, None) is None:
                    raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            tree |= added
            lines = [f"{path} {entry.blob}" for path, entry in sorted(tree.items())]
            text = json.dumps([self.kind, self.name, lines, parent, title, len(self.commits)])
            commit = Commit(hashlib.sha1(text.encode()).hexdigest(), tree, title, parent)
            self.commits[commit.id] = commit
            self.move(branch, commit.id)
            return commit

    def move(self, branch, commit):
        self.branches[branch] = commit
        self.moves.append((branch, commit))


@dataclass
class Store:
    """The names that a token may write to, repositories by kind and name, and collections by slug."""

    accounts: dict[str, tuple[str, ...]]
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    collections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def create(self, kind, name, private=False):
        return self.repositories.setdefault((kind, name), Repository(kind, name, private))

    def readable(self, kind, name, owned):
        repository = self.repositories.get((kind, name))
        if repository is None or (repository.private and name.split("/")[0] not in owned):
            # To a stranger, a missing repository and a private one look the same.
            raise Refused(404 if owned else 401, "Repository not found", "RepoNotFound")
        return repository

    def check_owner(self, namespace, owned):
        if not owned:
            raise Refused(401, "Invalid username or password.")
        if namespace not in owned:
            raise Refused(403, f'You don\'t have the rights to write under the namespace "{namespace}"')
