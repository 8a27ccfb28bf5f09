"""Faults by a script: the next requests that match one are answered badly, late, or not at all."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field


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
    """The script; a request meets the first fault that matches it."""

    script: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, method: str, path: str, **what: object) -> Fault:
        self.script.append(Fault(method, path, **what))  # type: ignore[arg-type]
        return self.script[-1]

    def clear(self) -> None:
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
