"""What the tests of publishing share: a Hub on the loopback."""

from __future__ import annotations

from tests.hub_server.fixtures import client_waits, hub_server

__all__ = ["client_waits", "hub_server"]
