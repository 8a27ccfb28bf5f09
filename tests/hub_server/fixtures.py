"""Fixtures for a ``conftest.py``: a Hub on the loopback, and this process's client pointed at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server.client import connected
from tests.hub_server.server import HubServer

__all__ = ["client_waits", "hub_server"]


@pytest.fixture
def hub_server() -> Iterator[HubServer]:
    """An empty Hub."""
    with HubServer() as hub:
        yield hub


@pytest.fixture
def client_waits(hub_server: HubServer, tmp_path: Path) -> Iterator[list[float]]:
    """This process's client is logged in to ``hub_server``; the seconds it would have slept between tries."""
    with connected(hub_server, tmp_path / "hf-home") as waits:
        yield waits
