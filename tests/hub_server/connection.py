"""The wire: reads requests, writes answers, and lets faults happen in between."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.hub_server.faults import Fault, Faults
from tests.hub_server.messages import Answer, Logged, json_answer, token_of

__all__ = ["LoopbackServer"]

# Carries out a request: method, path with query, headers (names in lower case), body.
Work = Callable[[str, str, dict[str, str], bytes], Answer]


class LoopbackServer(ThreadingHTTPServer):
    """A server on a free port of 127.0.0.1."""

    daemon_threads = True

    def __init__(self, work: Work, faults: Faults, log: list[Logged]) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.work, self.faults, self.log = work, faults, log


class _Connection(BaseHTTPRequestHandler):
    server: LoopbackServer
    protocol_version = "HTTP/1.1"
    # An answer goes out at once; the client would wait 40 ms for its second half otherwise.
    wbufsize = -1
    disable_nagle_algorithm = True

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _serve(self) -> None:
        fault = self.server.faults.meet(self.command, self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        if fault and fault.delay:
            time.sleep(fault.delay)
        if fault and fault.cut_after is not None:
            self.rfile.read(min(fault.cut_after, int(headers.get("content-length", 0))))
            self._cut(headers)
            return
        body = self._body(headers)
        if fault and (fault.status is not None or fault.body is not None):
            self._send(_bad_answer(fault), headers)
            return
        answer = self.server.work(self.command, self.path, headers, body)
        if fault and fault.lose_answer:
            self._cut(headers)
        else:
            self._send(answer, headers, fault.cut_answer_after if fault else None)

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return self._chunks()
        size = int(headers.get("content-length", 0))
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError("the client went away in mid-request")
        return body

    def _chunks(self) -> bytes:
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, answer: Answer, headers: dict[str, str], cut_after: int | None = None) -> None:
        self._log(headers, answer.status)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(answer.body[:cut_after])
        self.wfile.flush()
        if cut_after is not None:
            self.close_connection = True

    def _cut(self, headers: dict[str, str]) -> None:
        """Resets the connection."""
        self._log(headers, None)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _log(self, headers: dict[str, str], status: int | None) -> None:
        self.server.log.append(Logged(self.command, self.path, token_of(headers), status))

    def log_message(self, *_: object) -> None:
        """Nothing is written: what was asked is in the log."""

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve


def _bad_answer(fault: Fault) -> Answer:
    if fault.body is not None:
        kind = "text/html" if fault.body.startswith(b"<") else "application/json"
        return Answer(fault.status or 200, fault.body, {"Content-Type": kind})
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    return json_answer({"error": "an injected fault"}, fault.status or 500, **headers)
