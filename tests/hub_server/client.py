"""How a client finds a loopback Hub: the environment of a subprocess, or this process's own client, pointed at it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.hub_server.server import TOKEN, HubServer

__all__ = ["connected", "environment"]

_ROOT = Path(__file__).resolve().parents[2]
_FOREIGN = ("HF_", "HUGGING", "TRANSFORMERS_", "DATASETS_")


def environment(hub: HubServer, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """The environment of a subprocess that knows this Hub alone, with a home (cache, login) of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return {
        **inherited,
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(_ROOT),
        **({} if token is None else {"HF_TOKEN": token}),
    }


@contextmanager
def connected(hub: HubServer, home: Path, token: str | None = TOKEN) -> Iterator[list[float]]:
    """This process's client speaks to the Hub, with a home of its own; the other tests' is offline.

    The client's constants come from the environment when it is imported, so they are what is changed. It does not
    sleep between its tries.

    Yields:
        The seconds that the client would have slept, in order.
    """
    waits: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        patch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=waits.append))
        huggingface_hub.close_session()
        try:
            yield waits
        finally:
            huggingface_hub.close_session()
