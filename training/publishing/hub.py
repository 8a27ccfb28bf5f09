"""Repositories of the Hub, written so that a revision is whole or absent, and that doing it twice changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, GitRefs, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import DatasetInfo, ModelInfo, RepoFile

from training.errors import UserError
from training.publishing.content import ATTRIBUTES, Content, RemoteFile, same_files
from training.publishing.retries import HubUnavailableError, Patience

__all__ = ["SCRATCH", "Hub", "HubUnavailableError", "Patience"]

logger = logging.getLogger("training")

T = TypeVar("T")

# Ending of the branch on which a new revision is made.
SCRATCH = ".partial"
# Larger files are uploaded one by one before the commit, so that an interruption does not start over with all of them.
_LARGE_BYTES = 2**20
_KINDS = ("model", "dataset")


class Hub:
    """Repositories of one Hub, written with the client's own login.

    The token stays with the client: it is not read, and no message holds it.

    Args:
        api: The client; one of the endpoint and login of the environment if None.
        patience: How long to try what fails for a reason that passes.
    """

    def __init__(self, api: HfApi | None = None, patience: Patience | None = None) -> None:
        self.api = api or HfApi()
        self.patience = patience or Patience()
        self._user: str | None = None

    def user(self) -> str:
        """The name of the account that is logged in; asked once.

        Raises:
            UserError: If nobody is logged in, or the token is wrong.
            HubUnavailableError: If the Hub is down.
        """
        if self._user is None:
            self._user = self._call("asking who is logged in", self.api.whoami)["name"]
        return self._user

    def address(self, repo: str, repo_type: str = "model") -> str:
        """The page of a repository."""
        return f"{self.api.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo}"

    def ensure_repo(self, repo: str, repo_type: str = "model", private: bool | None = None) -> None:
        """Makes a repository if there is none; one that exists keeps who may see it.

        Args:
            repo: ``ORG/NAME``.
            repo_type: ``model`` or ``dataset``.
            private: Whether a new one is private; as its owner's settings say if None.

        Raises:
            UserError: If there is a repository of another kind by that name only, or the login may not make one, or an
                existing one is public and ``private`` is true.
            HubUnavailableError: If the Hub is down.
        """
        self.user()
        info = self._info(repo, repo_type)
        if info is None:
            for other in _KINDS:
                if other != repo_type and self._info(repo, other) is not None:
                    raise UserError(
                        f"{repo}: is a {other} on the Hub, not a {repo_type}; give another --repo, "
                        f"or make the {repo_type} on the Hub's site first if both are meant"
                    )
            # An answer that was lost is no matter: the repository is there at the next try.
            make = lambda: self.api.create_repo(repo, repo_type=repo_type, private=private, exist_ok=True)  # noqa: E731
            self._call(f"making {repo}", make, repo)
            logger.info("%s: made", self.address(repo, repo_type))
        elif private and not info.private:
            raise UserError(f"{repo}: is public on the Hub already; make it private there, or leave out --private")

    def _info(self, repo: str, repo_type: str) -> ModelInfo | DatasetInfo | None:
        return self._found(lambda: self.api.repo_info(repo, repo_type=repo_type), f"looking for {repo}", repo)

    def refs(self, repo: str, repo_type: str = "model") -> GitRefs | None:
        """Branches and tags; None if there is no such repository."""
        return self._found(lambda: self.api.list_repo_refs(repo, repo_type=repo_type), f"reading {repo}", repo)

    def files(self, repo: str, revision: str = "main", repo_type: str = "model") -> dict[str, RemoteFile] | None:
        """The files of a revision by path; None if there is no such repository or revision."""

        def listed() -> dict[str, RemoteFile]:
            entries = self.api.list_repo_tree(repo, recursive=True, revision=revision, repo_type=repo_type)
            files = [entry for entry in entries if isinstance(entry, RepoFile)]
            return {each.path: RemoteFile(each.size, each.blob_id, each.lfs and each.lfs.sha256) for each in files}

        # The client tries a listing six times by itself.
        return self._found(listed, f"listing {repo} at {revision}", repo, tries=1)

    def read(self, repo: str, path: str, revision: str = "main", repo_type: str = "model") -> bytes | None:
        """The content of a small file; None if there is no such repository, revision or file."""

        def content() -> bytes:
            # A folder of its own: the cache would be read without a word when the Hub is down.
            with TemporaryDirectory() as folder:
                local = self.api.hf_hub_download(
                    repo, path, revision=revision, repo_type=repo_type, local_dir=folder, cache_dir=folder
                )
                return Path(local).read_bytes()

        return self._found(content, f"reading {path} of {repo}", repo)

    def _call(self, what: str, work: Callable[[], T], repo: str | None = None, tries: int | None = None) -> T:
        return self.patience.call(what, work, repo, tries)

    def _found(self, work: Callable[[], T], what: str, repo: str, tries: int | None = None) -> T | None:
        """The result of a call that reads; None if what it asks for is not there."""

        def attempt() -> T | None:
            try:
                return work()
            except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
                return None

        return self._call(what, attempt, repo, tries)

    def publish(
        self,
        repo: str,
        files: Mapping[str, Path | bytes],
        *,
        revision: str = "main",
        message: str,
        repo_type: str = "model",
    ) -> str:
        """Makes a revision hold exactly these files, in one commit.

        Nothing is done if it holds them already. A revision (a branch) that is new appears whole or not at all: it is
        made on a branch of the name with :data:`SCRATCH` behind it, which goes in the end, and which the next run
        removes if this one is interrupted.

        Args:
            repo: ``ORG/NAME``; it must exist.
            files: By path in the repository. Files of the revision that are not among them are deleted.
            revision: Name of the branch.
            message: Of the commit.
            repo_type: ``model`` or ``dataset``.

        Returns:
            The commit that the revision is at.

        Raises:
            UserError: If the Hub refuses it, the revision is a tag, somebody else wrote to it meanwhile, or a file was
                changed meanwhile.
            HubUnavailableError: If the Hub is down; the revision is then as it was, or whole.
        """
        wanted = {path: Content(source) for path, source in files.items()}
        refs = self.refs(repo, repo_type)
        if refs is None:
            raise UserError(f"{repo}: there is no such {repo_type}, or the login may not see it")
        branches = {branch.name: branch.target_commit for branch in refs.branches}
        if revision in {tag.name for tag in refs.tags} and revision not in branches:
            raise UserError(f"{repo}: {revision} is a tag, and cannot be written to; give another --revision")
        scratch = revision + SCRATCH
        if scratch in branches:
            logger.info("%s: removing %s, which an interrupted upload left", repo, scratch)
            self._delete_branch(repo, scratch, repo_type)
        if revision in branches:
            return self._update(repo, revision, branches[revision], wanted, message, repo_type)
        return self._begin(repo, revision, branches["main"], wanted, message, repo_type)

    def _begin(
        self, repo: str, revision: str, start: str, wanted: Mapping[str, Content], message: str, repo_type: str
    ) -> str:
        """Makes a new revision on a scratch branch, and gives it its name when it is whole."""
        scratch = revision + SCRATCH
        self._create_branch(repo, scratch, start, repo_type)
        commit = self._update(repo, scratch, start, wanted, message, repo_type)
        self._create_branch(repo, revision, commit, repo_type)
        self._delete_branch(repo, scratch, repo_type)
        return commit

    def _update(
        self, repo: str, branch: str, head: str, wanted: Mapping[str, Content], message: str, repo_type: str
    ) -> str:
        """Brings a branch that is at ``head`` to the files that are wanted; returns the commit."""
        found = self._files_at(repo, head, repo_type)
        if same_files(wanted, found):
            return head
        changed = [path for path in wanted if path not in found or not wanted[path].is_in(found[path])]
        surplus = [path for path in found if path not in wanted and path != ATTRIBUTES]
        additions = self._upload(repo, branch, {path: wanted[path] for path in changed}, repo_type)
        operations = [*additions, *(CommitOperationDelete(path, is_folder=False) for path in surplus)]

        def commit() -> str:
            # Done before, and only the answer was lost? Then a second commit would be one too many.
            now = self._head(repo, branch, repo_type)
            if now != head:
                if now is not None and same_files(wanted, self._files_at(repo, now, repo_type)):
                    return now
                raise UserError(f"{repo}: somebody else wrote to {branch} meanwhile; look at it and run this again")
            return self._commit(repo, branch, head, operations, message, repo_type)

        done = self._call(f"committing to {repo}", commit, repo)
        self._verify(repo, done, wanted, repo_type)
        logger.info("%s: %d files uploaded, %d deleted, commit %s", repo, len(changed), len(surplus), done[:12])
        return done

    def _commit(self, repo: str, branch: str, head: str, operations: list, message: str, repo_type: str) -> str:
        """One try; a conflict counts as a failure that passes, for the next try looks who caused it."""
        try:
            done = self.api.create_commit(
                repo, operations, commit_message=message, revision=branch, repo_type=repo_type, parent_commit=head
            )
        except HfHubHTTPError as error:
            if error.response.status_code == 412:
                raise ConnectionError("the branch has moved") from None
            raise
        return done.oid

    def _upload(
        self, repo: str, branch: str, contents: Mapping[str, Content], repo_type: str
    ) -> list[CommitOperationAdd]:
        """Uploads the large files one by one; what the Hub has already is not sent again."""
        additions = []
        total = sum(content.size for content in contents.values()) or 1
        sent = 0
        for path, content in sorted(contents.items()):
            source = content.source
            addition = self._call(f"reading {path}", lambda p=path, s=source: CommitOperationAdd(p, s), repo)
            additions.append(addition)
            sent += content.size
            if content.size < _LARGE_BYTES:
                continue
            upload = lambda each=addition: self.api.preupload_lfs_files(  # noqa: E731
                repo, [each], revision=branch, repo_type=repo_type, free_memory=False
            )
            # The client tries each request of an upload six times by itself.
            self._call(f"uploading {path} to {repo}", upload, repo, tries=1)
            logger.info("%s: %s uploaded, %.1f of %.1f MB", repo, path, sent / 1e6, total / 1e6)
        return additions

    def _verify(self, repo: str, commit: str, wanted: Mapping[str, Content], repo_type: str) -> None:
        """A commit must hold what was wanted when the upload began."""
        if not same_files(wanted, self._files_at(repo, commit, repo_type)):
            raise UserError(
                f"{repo}: commit {commit} is not what was to be uploaded; was the folder changed meanwhile?"
            )

    def _files_at(self, repo: str, commit: str, repo_type: str) -> dict[str, RemoteFile]:
        found = self.files(repo, commit, repo_type)
        if found is None:
            raise UserError(f"{repo}: commit {commit} is gone; somebody else removed it")
        return found

    def _head(self, repo: str, branch: str, repo_type: str) -> str | None:
        """The commit of a branch; None if it is gone."""
        refs = self.api.list_repo_refs(repo, repo_type=repo_type)
        return next((each.target_commit for each in refs.branches if each.name == branch), None)

    def _create_branch(self, repo: str, branch: str, commit: str, repo_type: str) -> None:
        def create() -> None:
            self.api.create_branch(repo, branch=branch, revision=commit, repo_type=repo_type, exist_ok=True)

        self._call(f"making {branch} of {repo}", create, repo)
        now = self._call(f"reading {repo}", lambda: self._head(repo, branch, repo_type), repo)
        if now != commit:
            raise UserError(f"{repo}: somebody else made {branch} meanwhile; look at it and run this again")

    def _delete_branch(self, repo: str, branch: str, repo_type: str) -> None:
        """A branch that is gone already is no matter."""
        self._found(
            lambda: self.api.delete_branch(repo, branch=branch, repo_type=repo_type), f"removing {branch}", repo
        )

    def tag(self, repo: str, tag: str, commit: str, repo_type: str = "model", *, replace: bool = False) -> None:
        """Tags a commit; nothing is done if it has the tag.

        Args:
            repo: ``ORG/NAME``.
            tag: Name of the tag.
            commit: The commit.
            repo_type: ``model`` or ``dataset``.
            replace: Take the tag from another commit.

        Raises:
            UserError: If another commit has the tag and ``replace`` is false, or the Hub refuses it.
            HubUnavailableError: If the Hub is down.
        """
        holder = self.tagged(repo, tag, repo_type)
        if holder == commit:
            return
        if holder is not None:
            if not replace:
                raise UserError(f"{repo}: tag {tag} is on commit {holder[:12]} already; give another, or --replace")
            self._found(lambda: self.api.delete_tag(repo, tag=tag, repo_type=repo_type), f"removing {tag}", repo)

        def create() -> None:
            self.api.create_tag(repo, tag=tag, revision=commit, repo_type=repo_type, exist_ok=True)

        self._call(f"tagging {repo}", create, repo)
        if self.tagged(repo, tag, repo_type) != commit:
            raise UserError(f"{repo}: somebody else made tag {tag} meanwhile; look at it and run this again")

    def tagged(self, repo: str, tag: str, repo_type: str = "model") -> str | None:
        """The commit that has a tag; None if there is no such repository or tag."""
        refs = self.refs(repo, repo_type)
        return next((each.target_commit for each in refs.tags if each.name == tag), None) if refs else None
