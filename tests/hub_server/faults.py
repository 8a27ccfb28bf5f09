"""Faults by a script: the next requests that match one are answered badly, late, or not at all."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field

__all__ = ["Fault", "Faults"]


@dataclass
class Fault:
    """What happens to the next ``times`` requests of a ``method`` whose path and query contain the pattern ``path``.

    Attributes:
        method: ``GET``, ``POST``, … or empty for all.
        path: Regular expression.
        times: Number of requests; None for all from now on.
        skip: Requests that match and are let through before.
        status: The answer, without the request having been looked at.
        body: Content of that answer; its status is 200 unless told.
        retry_after: Seconds that the answer tells the client to wait.
        cut_after: Bytes of the request's body after which the connection is cut.
        cut_answer_after: Bytes of the answer's body after which the connection is cut.
        delay: Seconds before the request is looked at.
        lose_answer: The request is carried out, but the connection is cut instead of an answer.
    """

    method: str
    path: str
    times: int | None = 1
    skip: int = 0
    status: int | None = None
    body: bytes | None = None
    retry_after: int | None = None
    cut_after: int | None = None
    cut_answer_after: int | None = None
    delay: float = 0.0
    lose_answer: bool = False
    met: int = 0

    def matches(self, method: str, target: str) -> bool:
        return self.method in ("", method) and re.search(self.path, target) is not None


@dataclass
class Faults:
    """The script; the first fault that matches a request is the one that it meets."""

    script: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, method: str, path: str, **what: object) -> Fault:
        fault = Fault(method, path, **what)  # type: ignore[arg-type]
        with self._lock:
            self.script.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self.script.clear()

    def meet(self, method: str, target: str) -> Fault | None:
        """The fault of a request, which is used up by it."""
        with self._lock:
            for fault in self.script:
                if not fault.matches(method, target):
                    continue
                if fault.skip:
                    fault.skip -= 1
                elif fault.times is None or fault.met < fault.times:
                    fault.met += 1
                    return fault
        return None
