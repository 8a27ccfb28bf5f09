"""One repository of the Hub: what it holds, and the single steps that change it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, GitRefs, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import DatasetInfo, ModelInfo, RepoFile

from training.common.content import RemoteFile
from training.common.errors import UserError
from training.common.outputs import temporary_folder
from training.publishing.hub.retries import Patience

T = TypeVar("T")


@dataclass(frozen=True)
class HubRepository:
    """A repository, whether it exists or not.

    What fails for a reason that passes is tried again, but for :meth:`head` and :meth:`commit`, which are parts of
    larger attempts.

    Attributes:
        api: The client.
        patience: How long to try.
        name: ``ORG/NAME``.
        kind: ``model`` or ``dataset``.
    """

    api: HfApi
    patience: Patience
    name: str
    kind: str = "model"

    def call(self, what: str, work: Callable[[], T], tries: int | None = None) -> T:
        """As :meth:`Patience.call`, about this repository."""
        return self.patience.call(what, work, self.name, tries)

    def _found(self, what: str, work: Callable[[], T]) -> T | None:
        """The result of a call; None if what it asks for is not there."""

        def attempt() -> T | None:
            try:
                return work()
            except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
                return None

        return self.call(what, attempt)

    def info(self) -> ModelInfo | DatasetInfo | None:
        """What the Hub says of it; None if there is no such repository."""
        return self._found(f"looking for {self.name}", lambda: self.api.repo_info(self.name, repo_type=self.kind))

    def create(self, private: bool | None = None) -> None:
        """Makes it; nothing is done if it is there, as after an answer that was lost."""

        def create() -> None:
            self.api.create_repo(self.name, repo_type=self.kind, private=private, exist_ok=True)

        self.call(f"making {self.name}", create)

    def refs(self) -> GitRefs | None:
        """Branches and tags; None if there is no such repository."""
        return self._found(f"reading {self.name}", self._refs)

    def _refs(self) -> GitRefs:
        return self.api.list_repo_refs(self.name, repo_type=self.kind)

    def head(self, branch: str) -> str | None:
        """The commit of a branch; None if there is none. Tries once."""
        return next((each.target_commit for each in self._refs().branches if each.name == branch), None)

    def tagged(self, tag: str) -> str | None:
        """The commit that has a tag; None if there is no such repository or tag."""
        refs = self.refs()
        return next((each.target_commit for each in refs.tags if each.name == tag), None) if refs else None

    def files(self, revision: str) -> dict[str, RemoteFile] | None:
        """The files of a revision by path; None if there is no such repository or revision."""

        def listed() -> dict[str, RemoteFile]:
            entries = self.api.list_repo_tree(self.name, recursive=True, revision=revision, repo_type=self.kind)
            files = [entry for entry in entries if isinstance(entry, RepoFile)]
            return {each.path: RemoteFile(each.size, each.blob_id, each.lfs and each.lfs.sha256) for each in files}

        return self._found(f"listing {self.name} at {revision}", listed)

    def read(self, path: str, revision: str) -> bytes | None:
        """The content of a small file; None if there is no such repository, revision or file."""

        def content() -> bytes:
            # A folder of its own: the cache would be read without a word when the Hub is down.
            with temporary_folder() as folder:
                local = self.api.hf_hub_download(
                    self.name, path, revision=revision, repo_type=self.kind, local_dir=folder, cache_dir=folder
                )
                return Path(local).read_bytes()

        return self._found(f"reading {path} of {self.name}", content)

    def upload(self, addition: CommitOperationAdd, branch: str) -> None:
        """Uploads the content of a large file ahead of the commit, unless the Hub has it."""

        def upload() -> None:
            self.api.preupload_lfs_files(self.name, [addition], revision=branch, repo_type=self.kind, free_memory=False)

        # The client tries each request of an upload six times by itself.
        self.call(f"uploading {addition.path_in_repo} to {self.name}", upload, tries=1)

    def commit(
        self, branch: str, head: str, operations: Sequence[CommitOperationAdd | CommitOperationDelete], message: str
    ) -> str:
        """Commits to a branch that is at ``head``, and returns the commit. Tries once.

        Raises:
            ConnectionError: If the branch is elsewhere. This counts as passing: the next try must look who moved it.
        """
        try:
            info = self.api.create_commit(
                self.name,
                operations,
                commit_message=message,
                revision=branch,
                repo_type=self.kind,
                parent_commit=head,
            )
        except HfHubHTTPError as error:
            if error.response.status_code == 412:
                raise ConnectionError(f"{branch} is not at {head[:12]}") from None
            raise
        return info.oid

    def create_branch(self, branch: str, commit: str) -> None:
        """Makes a branch at a commit; nothing is done if it is there.

        Raises:
            UserError: If the branch is at another commit.
        """

        def create() -> str:
            self.api.create_branch(self.name, branch=branch, revision=commit, repo_type=self.kind, exist_ok=True)
            return self._made(branch, self.head(branch))

        if self.call(f"making {branch} of {self.name}", create) != commit:
            raise UserError(f"{self.name}: somebody else made {branch} meanwhile; look at it and run this again")

    @staticmethod
    def _made(name: str, commit: str | None) -> str:
        """The commit of what the Hub says that it made.

        Raises:
            ConnectionError: If it is not there. This counts as passing: a listing may be late.
        """
        if commit is None:
            raise ConnectionError(f"{name} is not there though the Hub said so")
        return commit

    def delete_branch(self, branch: str) -> None:
        """Removes a branch; nothing is done if it is gone."""

        def delete() -> None:
            self.api.delete_branch(self.name, branch=branch, repo_type=self.kind)

        self._found(f"removing {branch} of {self.name}", delete)

    def create_tag(self, tag: str, commit: str) -> None:
        """Tags a commit; nothing is done if it has the tag.

        Raises:
            UserError: If another commit has it.
        """

        def create() -> str:
            self.api.create_tag(self.name, tag=tag, revision=commit, repo_type=self.kind, exist_ok=True)
            commits = (each.target_commit for each in self._refs().tags if each.name == tag)
            return self._made(tag, next(commits, None))

        if self.call(f"tagging {self.name}", create) != commit:
            raise UserError(f"{self.name}: somebody else made tag {tag} meanwhile; look at it and run this again")

    def delete_tag(self, tag: str) -> None:
        """Removes a tag; nothing is done if it is gone."""
        self._found(
            f"removing tag {tag} of {self.name}",
            lambda: self.api.delete_tag(self.name, tag=tag, repo_type=self.kind),
        )
