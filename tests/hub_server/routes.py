"""A request that was read, the answer to it, and the table of routes that :mod:`.api` fills."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.hub_server.store import Account, Refused, Repository, Store


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def json_answer(content: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json", **headers})


@dataclass
class Call:
    """A request, with the parts of its path that the route names (unquoted), and who makes it."""

    store: Store
    address: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    account: Account | None
    parts: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    @property
    def kind(self) -> str:
        """Of the repository: ``models`` of an API path, or the prefix of a page."""
        return (self.parts.get("kinds") or self.parts.get("prefix", "").rstrip("/") or "models").removesuffix("s")

    def readable(self) -> Repository:
        return self.store.readable(self.kind, self.parts["repo"], self.account)

    def writable(self) -> Repository:
        return self.store.writable(self.kind, self.parts["repo"], self.account)


Route = Callable[[Call], Answer]

_PARTS = {"kinds": "models|datasets", "prefix": "(?:datasets/)?", "repo": "[^/]+/[^/]+?", "path": ".*"}
_ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(methods: str, pattern: str) -> Callable[[Route], Route]:
    """Register a function for a path; ``{kinds}``, ``{repo}``, … name its parts, and ``{path}`` may hold slashes."""
    regex = re.compile(re.sub(r"{(\w+)}", lambda m: f"(?P<{m[1]}>{_PARTS.get(m[1], '[^/]+')})", pattern))

    def register(function: Route) -> Route:
        _ROUTES.extend((method, regex, function) for method in methods.split())
        return function

    return register


def find_route(method: str, path: str) -> tuple[Route, dict[str, str]]:
    """Return the first route of a path (still quoted), and the path's parts."""
    for known, pattern, function in _ROUTES:
        match = pattern.fullmatch(path) if known == method else None
        if match:
            return function, match.groupdict("")
    raise Refused(404, f"there is nothing at {method} {path}")
