"""A Hub on the loopback: the HTTP API that huggingface_hub, ``hf`` and the libraries above them use, without Xet."""

from __future__ import annotations

import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_server import api  # noqa: F401  (its routes)
from tests.hub_server.faults import Fault, Faults
from tests.hub_server.routes import Answer, Call, find_route, json_answer
from tests.hub_server.store import Account, Refused, Repository, Store

# The account of TOKEN may write to its own name and to ORGANISATION.
TOKEN, ORGANISATION = "hf_" + "loopbackWriteToken", "org"


class Logged(NamedTuple):
    """A request, and the status of its answer (None if the connection was cut)."""

    method: str
    path: str
    token: str | None
    status: int | None


@dataclass
class HubServer:
    """A Hub that serves until it is closed; a context manager."""

    store: Store = field(default_factory=lambda: Store({TOKEN: Account("ada", (ORGANISATION,))}))
    faults: Faults = field(default_factory=Faults)
    log: list[Logged] = field(default_factory=list)  # all requests, in the order of their ends

    def __enter__(self) -> HubServer:
        self._http = _Server(("127.0.0.1", 0), _Connection)
        self._http.hub = self
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
        """Return the requests of a method whose path holds a part."""
        return [each for each in self.log if each.method == method and part in each.path]

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        """Carry out a request; names of headers are in lower case."""
        parts, token = urlsplit(target), _token(headers)
        account = self.store.accounts.get(token or "")
        try:
            if token and account is None:
                raise Refused(401, "Invalid credentials in Authorization header")
            function, names = find_route(method, parts.path)
            known = {name: unquote(part) for name, part in names.items()}
            return function(Call(self.store, self.address, parse_qs(parts.query), headers, body, account, known))
        except Refused as refused:
            code = {"X-Error-Code": refused.code} if refused.code else {}
            return json_answer({"error": str(refused)}, refused.status, **{"X-Error-Message": str(refused)}, **code)


def _token(headers: dict[str, str]) -> str | None:
    return headers.get("authorization", "").removeprefix("Bearer ") or None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer


class _Connection(BaseHTTPRequestHandler):
    """Reads requests, writes answers, and lets faults happen in between."""

    server: _Server
    protocol_version = "HTTP/1.1"
    # An answer is sent at once; otherwise the client waits 40 ms for its second half.
    wbufsize = -1
    disable_nagle_algorithm = True

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _serve(self) -> None:
        hub, headers = self.server.hub, {name.lower(): value for name, value in self.headers.items()}
        fault = hub.faults.meet(self.command, self.path) or Fault("", "")
        time.sleep(fault.delay)
        if fault.cut_after is not None:
            self.rfile.read(min(fault.cut_after, int(headers.get("content-length", 0))))
            self._cut(headers)
            return
        body = self._body(headers)
        if fault.status is not None or fault.body is not None:
            self._send(_bad_answer(fault), headers)
            return
        answer = hub.answer(self.command, self.path, headers, body)
        if fault.lose_answer:
            self._cut(headers)
        else:
            self._send(answer, headers)

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        size = int(headers.get("content-length", 0))
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError("the client went away in mid-request")
        return body

    def _send(self, answer: Answer, headers: dict[str, str]) -> None:
        self._log(headers, answer.status)
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)
            self.wfile.flush()

    def _cut(self, headers: dict[str, str]) -> None:
        """Reset the connection."""
        self._log(headers, None)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _log(self, headers: dict[str, str], status: int | None) -> None:
        self.server.hub.log.append(Logged(self.command, self.path, _token(headers), status))

    def log_message(self, *_: object) -> None:
        """Write nothing: requests are in the log."""

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve


def _bad_answer(fault: Fault) -> Answer:
    if fault.body is not None:
        kind = "text/html" if fault.body.startswith(b"<") else "application/json"
        return Answer(fault.status or 200, fault.body, {"Content-Type": kind})
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    return json_answer({"error": "an injected fault"}, fault.status or 500, **headers)
