"""How a client finds a loopback Hub: fixtures for this process, and the environment of a subprocess."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.hub_server.server import TOKEN, HubServer

_ROOT = Path(__file__).resolve().parents[2]
_FOREIGN = ("HF_", "HUGGING", "TRANSFORMERS_", "DATASETS_")


@pytest.fixture
def hub_server():
    with HubServer() as hub:
        yield hub


@pytest.fixture
def client_waits(hub_server, tmp_path):
    """This process's client is logged in to ``hub_server``; the seconds it would have slept between tries."""
    with connected(hub_server, tmp_path / "hf-home") as waits:
        yield waits


def environment(hub, home, token=TOKEN):
    """Return the environment of a subprocess that knows only this Hub, with its cache and login in ``home``."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    disabled = {f"HF_HUB_DISABLE_{what}": "1" for what in ("XET", "UPDATE_CHECK", "TELEMETRY", "PROGRESS_BARS")}
    known = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_TOKEN": token}
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(_ROOT)}
    return {**inherited, **disabled, **known, **threads}


@contextmanager
def connected(hub, home, token=TOKEN):
    """Point this process's client, which is offline in other tests, at the Hub; the seconds it would have slept."""
    # It reads its environment when it is imported, so its constants are changed.
    waits = []
    changed = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "ENDPOINT": hub.address}
    changed["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    changed |= {"HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changed.items():
            patch.setattr(constants, name, value)
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
