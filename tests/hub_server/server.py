"""A Hub on the loopback: the HTTP API that the real client, ``hf`` and the libraries above them speak.

No Xet (``HF_HUB_DISABLE_XET=1``), no pull requests, no storage service apart.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_server.connection import LoopbackServer
from tests.hub_server.faults import Faults
from tests.hub_server.messages import Answer, Call, Logged, Router, json_answer, token_of
from tests.hub_server.repositories import add_repository_routes
from tests.hub_server.shelves import Shelves
from tests.hub_server.store import Account, Missing, Refused, Repository, Store
from tests.hub_server.uploads import add_content_routes

__all__ = ["ORGANISATION", "READ_TOKEN", "TOKEN", "HubServer"]

# The account of TOKEN may write to its own name and to ORGANISATION; READ_TOKEN may not write.
TOKEN, READ_TOKEN, ORGANISATION = "hf_" + "loopbackWriteToken", "hf_" + "loopbackReadToken", "org"
_ACCOUNTS = {
    TOKEN: Account("ada", (ORGANISATION,)),
    READ_TOKEN: Account("grace", (ORGANISATION,), may_write=False),
}


@dataclass
class HubServer:
    """A Hub that serves until it is closed; a context manager.

    Attributes:
        store: Accounts and repositories.
        faults: What goes wrong next.
        log: All requests, in the order of their ends.
        page_size: Entries of a tree in one answer.
    """

    store: Store = field(default_factory=lambda: Store(_ACCOUNTS))
    faults: Faults = field(default_factory=Faults)
    shelves: Shelves = field(default_factory=Shelves)
    log: list[Logged] = field(default_factory=list)
    page_size: int = 1000

    def __enter__(self) -> HubServer:
        self.router = Router()
        self.shelves.add_routes(self.router)
        add_content_routes(self.router)
        add_repository_routes(self.router, self.page_size)
        self._http = LoopbackServer(self.answer, self.faults, self.log)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def repository(self, name: str, kind: str = "model") -> Repository:
        return self.store.repository(name, kind)

    def requests(self, method: str, part: str = "") -> list[Logged]:
        """The requests of a method so far whose path holds a part."""
        return [each for each in self.log if each.method == method and part in each.path]

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        """Carries a request out."""
        parts = urlsplit(target)
        token = token_of(headers)
        account = self.store.accounts.get(token) if token else None
        if token and account is None:
            return _error(401, "Invalid credentials in Authorization header")
        found = self.router.find(method, parts.path)
        if found is None:
            return _error(404, f"Sorry, there is nothing at {method} {parts.path}")
        route, names = found
        call = Call(self.store, self.address, method, parts.path, parse_qs(parts.query), headers, body, account)
        call.parts = {name: unquote(part) for name, part in names.items()}
        try:
            return route(call)
        except Missing as missing:
            # A repository that is not there and a private one look the same to a stranger.
            status = 401 if missing.code == "RepoNotFound" and account is None else 404
            return _error(status, str(missing), missing.code)
        except Refused as refused:
            return _error(refused.status, str(refused))


def _error(status: int, message: str, code: str | None = None) -> Answer:
    return json_answer(
        {"error": message}, status, **{"X-Error-Message": message}, **({"X-Error-Code": code} if code else {})
    )
