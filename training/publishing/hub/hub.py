"""Repositories of the Hub, written so that a revision is whole or absent, and that doing it twice changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from training.common.content import Content, RemoteFile
from training.common.errors import UserError
from training.publishing.hub.hub_repository import HubRepository
from training.publishing.hub.retries import Patience
from training.publishing.hub.revision import write_revision

logger = logging.getLogger("training")

_KINDS = ("model", "dataset")


@dataclass(frozen=True)
class Login:
    """Who is logged in.

    Attributes:
        name: Of the account.
        token_role: What its token may: ``read``, ``write`` or ``fineGrained``; None if the Hub does not say.
        roles: Its role by name of the organisation; None where the Hub does not say.
    """

    name: str
    token_role: str | None
    roles: Mapping[str, str | None]


def _login_of(told: Mapping[str, Any]) -> Login:
    role = ((told.get("auth") or {}).get("accessToken") or {}).get("role")
    roles = {str(each["name"]): each.get("roleInOrg") for each in told.get("orgs") or ()}
    return Login(str(told["name"]), role, roles)


class Hub:
    """Repositories of one Hub, written with the client's own login.

    The token stays with the client: it is not read here, and no message holds it.

    Args:
        api: The client; one of the endpoint and login of the environment if None.
        patience: How long to try what fails for a reason that passes.
    """

    def __init__(self, api: HfApi | None = None, patience: Patience | None = None) -> None:
        self.api = api or HfApi()
        self.patience = patience or Patience()
        self._login: Login | None = None

    def repository(self, repo: str, repo_type: str = "model") -> HubRepository:
        """A repository, whether it exists or not."""
        return HubRepository(self.api, self.patience, repo, repo_type)

    def address(self, repo: str, repo_type: str = "model") -> str:
        """The page of a repository."""
        return f"{self.api.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo}"

    def login(self) -> Login:
        """The account that is logged in, as the Hub tells it; asked once.

        Raises:
            UserError: If nobody is logged in, or the token is wrong.
            HubUnavailableError: If the Hub is down.
        """
        if self._login is None:
            self._login = self.patience.call("asking who is logged in", lambda: _login_of(self.api.whoami()))
        return self._login

    def ensure_repo(self, repo: str, repo_type: str = "model", private: bool | None = None) -> None:
        """Makes a repository if there is none.

        Args:
            repo: ``ORG/NAME``.
            repo_type: ``model`` or ``dataset``.
            private: Whether a new one is private; as its owner's settings say if None.

        Raises:
            UserError: As for :meth:`check_repo`, or if the login may not make one.
            HubUnavailableError: If the Hub is down.
        """
        if not self.check_repo(repo, repo_type, private):
            self.repository(repo, repo_type).create(private)
            logger.info("%s: made", self.address(repo, repo_type))

    def check_repo(self, repo: str, repo_type: str = "model", private: bool | None = None) -> bool:
        """Whether there is a repository; changes nothing.

        Raises:
            UserError: If only a repository of another kind has that name, or ``private`` is true and the repository is
                public already.
            HubUnavailableError: If the Hub is down.
        """
        self.login()
        repository = self.repository(repo, repo_type)
        info = repository.info()
        if info is not None:
            if private and not info.private:
                raise UserError(f"{repo}: is public on the Hub already; make it private there, or leave out --private")
            return True
        for other in _KINDS:
            if other != repo_type and self.repository(repo, other).info() is not None:
                raise UserError(
                    f"{repo}: is a {other} on the Hub, not a {repo_type}; give another repository, "
                    f"or make the {repo_type} on the Hub's site first if both are meant"
                )
        return False

    def publish(
        self,
        repo: str,
        files: Mapping[str, Path | bytes | Content],
        *,
        revision: str = "main",
        message: str,
        repo_type: str = "model",
        parent: str | None = None,
    ) -> str:
        """Makes a revision hold exactly these files, in one commit.

        Nothing is done if it holds them already. A revision (a branch) that is new appears whole or not at all: it is
        made on a branch of its name with :data:`SCRATCH` behind it, which is removed in the end, or by the next run if
        this one is interrupted.

        Args:
            repo: ``ORG/NAME``; it must exist.
            files: By path in the repository. Files of the revision that are not among them are removed. What is
                published is what was hashed: that of :class:`Content` before, other files now.
            revision: Name of the branch.
            message: Of the commit.
            repo_type: ``model`` or ``dataset``.
            parent: The commit that the revision must be at, for content that was made from what it held; any if None.

        Returns:
            The commit that the revision is at.

        Raises:
            WrittenMeanwhileError: If the revision is elsewhere.
            UserError: If the Hub refuses it, the revision is a tag, somebody else wrote to it meanwhile, or a file was
                changed meanwhile.
            HubUnavailableError: If the Hub is down; the revision is then as it was, or whole.
        """
        wanted = {path: Content.of(source) for path, source in files.items()}
        return write_revision(self.repository(repo, repo_type), wanted, revision, message, parent)

    def files(self, repo: str, revision: str = "main", repo_type: str = "model") -> dict[str, RemoteFile] | None:
        """The files of a branch, tag or commit by path; None if there is no such repository or revision."""
        return self.repository(repo, repo_type).files(revision)

    def read(self, repo: str, path: str, revision: str = "main", repo_type: str = "model") -> bytes | None:
        """The content of a small file; None if there is no such repository, revision or file."""
        return self.repository(repo, repo_type).read(path, revision)

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
        repository = self.repository(repo, repo_type)
        holder = repository.tagged(tag)
        if holder == commit:
            return
        if holder is not None:
            if not replace:
                raise UserError(f"{repo}: tag {tag} is on commit {holder[:12]} already; give another, or --replace")
            repository.delete_tag(tag)
        repository.create_tag(tag, commit)
