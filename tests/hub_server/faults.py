"""Faults by a script: the next requests that match one are answered badly, late, or not at all."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field


@dataclass
class Fault:
    """What happens to the next ``times`` requests of a ``method`` whose path and query match the pattern ``path``.

    Attributes:
        method: ``GET``, ``POST``, …; empty for all.
        path: Regular expression.
        times: Number of requests; None for all from now on.
        skip: Matching requests that are let through before.
        status: The answer; the request is not looked at.
        body: Content of that answer, whose status is 200 by default.
        retry_after: Seconds that the answer tells the client to wait.
        cut_after: Bytes of the request's body after which the connection is cut.
        delay: Seconds before the request is looked at.
        lose_answer: The request is carried out, but the connection is cut instead of an answer.
        met: Requests that met it.
    """

    method: str
    path: str
    times: int | None = 1
    skip: int = 0
    status: int | None = None
    body: bytes | None = None
    retry_after: int | None = None
    cut_after: int | None = None
    delay: float = 0.0
    lose_answer: bool = False
    met: int = 0


@dataclass
class Faults:
    """The script; a request meets the first fault that matches it."""

    script: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, method: str, path: str, **what: object) -> Fault:
        fault = Fault(method, path, **what)  # type: ignore[arg-type]
        with self._lock:
            self.script.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self.script.clear()

    def meet(self, method: str, target: str) -> Fault | None:
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
