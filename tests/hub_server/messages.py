"""A request that was read, and the answer to it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from tests.hub_server.store import Account, Repository, Store

__all__ = ["Answer", "Call", "Logged", "Route", "Router", "json_answer", "token_of"]

# The prefix of a kind in the addresses of pages and files.
_PREFIXES = {"": "model", "datasets/": "dataset", "spaces/": "space"}


@dataclass(frozen=True)
class Logged:
    """A request as it came, and the status of its answer (None if the connection was cut)."""

    method: str
    path: str
    token: str | None
    status: int | None


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def json_answer(content: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json", **headers})


def token_of(headers: Mapping[str, str]) -> str | None:
    return headers.get("authorization", "").removeprefix("Bearer ") or None


@dataclass
class Call:
    """A request, with the parts of its path that the route names (unquoted), and who makes it."""

    store: Store
    address: str
    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    account: Account | None
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    @property
    def form(self) -> dict[str, list[str]]:
        return parse_qs(self.body.decode())

    @property
    def kind(self) -> str:
        """Of the repository: ``models`` of an API path, or the prefix of a page's."""
        if "kinds" in self.parts:
            return self.parts["kinds"].removesuffix("s")
        return _PREFIXES[self.parts.get("prefix") or ""]

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("true", "1")

    def readable(self) -> Repository:
        return self.store.readable(self.kind, self.parts["repo"], self.account)

    def writable(self) -> Repository:
        return self.store.writable(self.kind, self.parts["repo"], self.account)


Route = Callable[[Call], Answer]


class Router:
    """Routes by method and pattern; the first that matches a path is taken."""

    def __init__(self) -> None:
        self.routes: list[tuple[str, re.Pattern[str], Route]] = []

    def add(self, method: str, pattern: str) -> Callable[[Route], Route]:
        """``{kinds}``, ``{repo}``, … name parts of the path; ``{path}`` may hold slashes."""
        expressions = {
            "kinds": "models|datasets|spaces",
            "prefix": "(?:datasets/|spaces/)?",
            "repo": "[^/]+/[^/]+?",
            "path": ".*",
        }
        regex = re.sub(r"{(\w+)}", lambda m: f"(?P<{m[1]}>{expressions.get(m[1], '[^/]+')})", pattern)

        def register(route: Route) -> Route:
            self.routes.append((method, re.compile(regex), route))
            return route

        return register

    def find(self, method: str, path: str) -> tuple[Route, dict[str, str]] | None:
        """The route of a path (still quoted) and its parts."""
        for known, pattern, route in self.routes:
            match = pattern.fullmatch(path) if known == method else None
            if match:
                return route, {name: part or "" for name, part in match.groupdict().items()}
        return None
