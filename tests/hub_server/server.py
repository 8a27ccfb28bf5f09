"""A Hub on the loopback: the HTTP API that huggingface_hub, ``hf`` and the libraries above them use, without Xet."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_server.api import Answer, Call, find_route, json_answer
from tests.hub_server.store import Refused, Store

# The account of TOKEN may write to its own name and to ORGANISATION.
TOKEN, ORGANISATION = "hf_" + "loopbackWriteToken", "org"


@dataclass
class Fault:
    """What happens to the next ``times`` requests of a ``method`` whose path and query match the pattern ``path``."""

    method: str  # GET, POST, …; empty for all
    path: str  # regular expression
    times: int | None = 1  # number of requests; None for all from now on
    skip: int = 0  # matching requests that are let through before
    status: int | None = None  # the answer; the request is not looked at
    body: bytes | None = None  # content of that answer, whose status is 200 by default
    retry_after: int | None = None  # seconds that the answer tells the client to wait
    cut_after: int | None = None  # bytes of the request's body after which the connection is cut
    delay: float = 0.0  # seconds before the request is looked at
    lose_answer: bool = False  # the request is carried out, but the connection is cut instead of an answer
    met: int = 0  # requests that met it


@dataclass
class Faults:
    """Faults by a script: a request meets the first that matches it, and is answered badly, late, or not at all."""

    script: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, method, path, **what):
        self.script.append(Fault(method, path, **what))
        return self.script[-1]

    def clear(self):
        self.script.clear()

    def meet(self, method, target):
        """Return the fault of a request, which is used up by it."""
        with self._lock:
            for fault in self.script:
                if fault.method not in ("", method) or not re.search(fault.path, target):
                    continue
                if fault.skip:
                    fault.skip -= 1
                elif fault.times is None or fault.met < fault.times:
                    fault.met += 1
                    return fault
        return None


class Logged(NamedTuple):
    """A request, and the status of its answer (None if the connection was cut)."""

    method: str
    path: str
    token: str | None
    status: int | None


@dataclass
class HubServer:
    """A Hub that serves until it is closed; a context manager."""

    store: Store = field(default_factory=lambda: Store({TOKEN: ("ada", ORGANISATION)}))
    faults: Faults = field(default_factory=Faults)
    log: list[Logged] = field(default_factory=list)  # all requests, in the order of their ends

    def __enter__(self):
        self._http = _Server(("127.0.0.1", 0), _Connection)
        self._http.hub = self
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def address(self):
        return f"http://127.0.0.1:{self._http.server_port}"

    def repository(self, name, kind="model"):
        return self.store.repositories[kind, name]

    def requests(self, method, part=""):
        """Return the requests of a method whose path holds a part."""
        return [each for each in self.log if each.method == method and part in each.path]

    def answer(self, method, target, headers, body):
        """Carry out a request; names of headers are in lower case."""
        parts, token = urlsplit(target), _token(headers)
        owned = self.store.accounts.get(token or "", ())
        try:
            if token and not owned:
                raise Refused(401, "Invalid credentials in Authorization header")
            function, names = find_route(method, parts.path)
            known = {name: unquote(part) for name, part in names.items()}
            return function(Call(self.store, self.address, parse_qs(parts.query), headers, body, owned, known))
        except Refused as refused:
            code = {"X-Error-Code": refused.code} if refused.code else {}
            return json_answer({"error": str(refused)}, refused.status, **{"X-Error-Message": str(refused)}, **code)


def _token(headers):
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

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _serve(self):
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

    def _body(self, headers):
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

    def _send(self, answer, headers):
        self._log(headers, answer.status)
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)
            self.wfile.flush()

    def _cut(self, headers):
        """Reset the connection."""
        self._log(headers, None)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _log(self, headers, status):
        self.server.hub.log.append(Logged(self.command, self.path, _token(headers), status))

    def log_message(self, *_):
        """Write nothing: requests are in the log."""

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve


def _bad_answer(fault):
    if fault.body is not None:
        kind = "text/html" if fault.body.startswith(b"<") else "application/json"
        return Answer(fault.status or 200, fault.body, {"Content-Type": kind})
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    return json_answer({"error": "an injected fault"}, fault.status or 500, **headers)
