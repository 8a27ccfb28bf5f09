"""Makes a revision of a repository hold exactly what is wanted: in one commit, whole or not at all."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from training.common.content import ATTRIBUTES, LARGE_BYTES, Content, RemoteFile, same_files
from training.common.errors import UserError
from training.common.hub_names import SCRATCH
from training.publishing.hub.hub_repository import HubRepository

logger = logging.getLogger("training")


class WrittenMeanwhileError(UserError):
    """Somebody else wrote to a branch while this was about to."""


def write_revision(
    repository: HubRepository, wanted: Mapping[str, Content], revision: str, message: str, parent: str | None = None
) -> str:
    """Makes a revision hold exactly these files; see :meth:`~training.common.run_folder.publish`."""
    refs = repository.refs()
    if refs is None:
        raise UserError(f"{repository.name}: there is no such {repository.kind}, or the login may not see it")
    branches = {branch.name: branch.target_commit for branch in refs.branches}
    if revision not in branches and revision in {tag.name for tag in refs.tags}:
        raise UserError(f"{repository.name}: {revision} is a tag, and cannot be written to; give another revision")
    if "main" not in branches:
        raise UserError(f"{repository.name}: has no branch main to start from; make it on the Hub's site")
    scratch = revision + SCRATCH
    if scratch in branches:
        logger.info("%s: removing %s, which an interrupted upload left", repository.name, scratch)
        repository.delete_branch(scratch)
    if revision in branches:
        if parent is not None and branches[revision] != parent:
            raise _written_meanwhile(repository, revision)
        return _update(repository, revision, branches[revision], wanted, message)
    repository.create_branch(scratch, branches["main"])
    commit = _update(repository, scratch, branches["main"], wanted, message)
    repository.create_branch(revision, commit)
    repository.delete_branch(scratch)
    return commit


def _update(repository: HubRepository, branch: str, head: str, wanted: Mapping[str, Content], message: str) -> str:
    """Brings a branch that is at ``head`` to the files that are wanted; returns the commit."""
    found = _files_at(repository, head)
    if same_files(wanted, found):
        return head
    changed = {path: each for path, each in wanted.items() if path not in found or not each.is_in(found[path])}
    _check_unchanged(repository, wanted)
    surplus = [path for path in found if path not in wanted and path != ATTRIBUTES]
    additions = _upload(repository, branch, changed)
    operations = [*additions, *(CommitOperationDelete(path, is_folder=False) for path in surplus)]

    def commit() -> str:
        # An answer that was lost leaves the commit made: a second one would be one too many.
        now = repository.head(branch)
        if now == head:
            _check_unchanged(repository, wanted)
            return repository.commit(branch, head, operations, message)
        if now is not None and same_files(wanted, _files_at(repository, now)):
            return now
        raise _written_meanwhile(repository, branch)

    done = repository.call(f"committing to {repository.name}", commit)
    if not same_files(wanted, _files_at(repository, done)):
        raise UserError(
            f"{repository.name}: {branch} does not hold what was to be uploaded and is not tagged; run this again"
        )
    logger.info("%s: %d files uploaded, %d removed, commit %s", repository.name, len(changed), len(surplus), done[:12])
    return done


def _written_meanwhile(repository: HubRepository, branch: str) -> WrittenMeanwhileError:
    return WrittenMeanwhileError(
        f"{repository.name}: somebody else wrote to {branch} meanwhile; look at it and run this again"
    )


def _check_unchanged(repository: HubRepository, wanted: Mapping[str, Content]) -> None:
    """Makes sure that the files are still those that were hashed.

    Raises:
        UserError: If one was changed.
    """
    for path, content in wanted.items():
        if not content.is_unchanged:
            raise _changed(repository, path)


def _changed(repository: HubRepository, path: str) -> UserError:
    return UserError(
        f"{path}: was changed while it was uploaded to {repository.name}, which stays as it was; run this again"
    )


def _upload(repository: HubRepository, branch: str, contents: Mapping[str, Content]) -> list[CommitOperationAdd]:
    """Uploads the large files one by one, and returns what the commit adds."""
    additions = []
    total, sent = sum(content.size for content in contents.values()), 0
    for path, content in sorted(contents.items()):
        addition = CommitOperationAdd(path, content.payload)
        # The client hashes by itself what it sends.
        if addition.upload_info.sha256.hex() != content.sha256:
            raise _changed(repository, path)
        additions.append(addition)
        sent += content.size
        # Before the commit, so that an interruption does not start over with all of them.
        if content.size >= LARGE_BYTES:
            try:
                repository.upload(addition, branch)
            except UserError:
                # The storage refuses content of another hash.
                _check_unchanged(repository, {path: content})
                raise
            logger.info("%s: %s uploaded, %.1f of %.1f MB", repository.name, path, sent / 1e6, total / 1e6)
    return additions


def _files_at(repository: HubRepository, commit: str) -> dict[str, RemoteFile]:
    found = repository.files(commit)
    if found is None:
        raise UserError(f"{repository.name}: commit {commit} is gone; somebody else removed it")
    return found
