"""A Hub on the loopback: the HTTP API that huggingface_hub, ``hf`` and the libraries above them use, without Xet."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_server.api import Call, find_route, json_answer
from tests.hub_server.store import Refused, Store

# TOKEN may write to its own name and to ORGANISATION.
TOKEN, ORGANISATION = "hf_" + "loopbackWriteToken", "org"


@dataclass
class Fault:
    """What happens to the next ``times`` requests of a ``method`` whose path and query match the pattern ``path``."""

    method: str  # GET, POST, …; empty for all
    path: str  # regular expression
    times: int | None = 1  # number of requests; None for all from now on
    skip: int = 0  # matching requests that are let through before
    status: int | None = None  # the answer; the request is not looked at
    retry_after: int | None = None  # seconds that the answer tells the client to wait
    cut_after: int | None = None  # bytes of the request's body after which the connection is cut
    delay: float = 0.0  # seconds before the request is looked at
    lose_answer: bool = False  # the request is carried out, but the connection is cut instead of an answer
    met: int = 0  # requests that met it


class Faults(list):
    """Faults by a script: a request meets the first that matches it, and is answered badly, late, or not at all."""

    _lock = threading.Lock()

    def add(self, method, path, **what):
        self.append(Fault(method, path, **what))
        return self[-1]

    def meet(self, method, target):
        """Return the fault of a request, which is used up by it."""
        with self._lock:
            for fault in self:
                if fault.method not in ("", method) or not re.search(fault.path, target):
                    continue
                if fault.skip:
                    fault.skip -= 1
                elif fault.times is None or fault.met < fault.times:
                    fault.met += 1
                    return fault
        return Fault("", "")


class Logged(NamedTuple):
    """A request, and the status of its answer (None if the connection was cut)."""

    method: str
    path: str
    token: str | None
    status: int | None


class HubServer(ThreadingHTTPServer):
    """A Hub that serves within its context; ``log`` has the requests in the order of their ends."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Connection)
        self.store, self.faults, self.log = Store({TOKEN: ("ada", ORGANISATION)}), Faults(), []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
        self._thread.join()

    def repository(self, name, kind="model"):
        return self.store.repositories[kind, name]

    def requests(self, method, part):
        return [each for each in self.log if each.method == method and part in each.path]


class _Connection(BaseHTTPRequestHandler):
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
        fault = self.server.faults.meet(self.command, self.path)
        time.sleep(fault.delay)
        if fault.cut_after is not None:
            self.rfile.read(min(fault.cut_after, int(self.headers.get("content-length", 0))))
            return self._cut()
        body = self._body()
        told = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
        failed = fault.status and json_answer({"error": "an injected fault"}, fault.status, **told)
        answer = failed or self._answer(body)
        return self._cut() if fault.lose_answer else self._send(answer)

    def _token(self):
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    def _answer(self, body):
        parts, token = urlsplit(self.path), self._token()
        owned = self.server.store.accounts.get(token or "", ())
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            if token and not owned:
                raise Refused(401, "Invalid credentials in Authorization header")
            function, names = find_route(self.command, parts.path)
            known = {name: unquote(part) for name, part in names.items()}
            known = [parse_qs(parts.query), headers, body, owned, known]
            return function(Call(self.server.store, self.server.address, *known))
        except Refused as refused:
            code = {"X-Error-Code": refused.code} if refused.code else {}
            return json_answer({"error": str(refused)}, refused.status, **{"X-Error-Message": str(refused)}, **code)

    def _body(self):
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _send(self, answer):
        self._log(answer.status)
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)
            self.wfile.flush()

    def _cut(self):
        self._log(None)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _log(self, status):
        self.server.log.append(Logged(self.command, self.path, self._token(), status))

    def log_message(self, *_):
        """Write nothing: requests are in the log."""

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve
