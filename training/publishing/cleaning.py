"""What of a run may be told: hyper-parameters and public names, but no places, hosts, users or secrets."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

from huggingface_hub import get_token

from training.common.errors import UserError
from training.config.stage_keys import LEARNT, MACHINE, PLACES, REFUSED, RUNNING
from training.publishing.states import ModelState

TOLD = LEARNT | RUNNING
# Every other key: it names a place, an account, a machine or what a machine was told, or has no effect here.
WITHHELD = PLACES | MACHINE | frozenset(REFUSED)
# Keys that hold a mapping written as JSON.
_MAPPINGS = ("builder_options", "source_caps", "model_config", "prune_to")
# Keys of configurations that tell where a model was loaded from.
_ORIGINS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "cache_dir", "_commit_hash")
_SECRET = re.compile(r"token|secret|passw|api_?key|access_?key|credential", re.IGNORECASE)
# Shorter ones stand in texts by chance.
_SHORTEST = 8
# Files of a tokenizer that list its tokens.
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")


def clean_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a stage that may be told, with mappings as such.

    Args:
        arguments: The stage's keys, as written in a recipe or as ``training_arguments.json`` has them.
    """
    told = {}
    for key, value in arguments.items():
        if key not in TOLD:
            continue
        if key in _MAPPINGS and isinstance(value, str):
            value = json.loads(value)
        if key == "builder_options" and isinstance(value, Mapping):
            # A builder's texts may be folders.
            value = {name: option for name, option in value.items() if isinstance(option, int | float | None)}
        told[key] = value
    return told


def clean_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's or tokenizer's configuration without what tells where it came from."""
    return {key: value for key, value in config.items() if key not in _ORIGINS}


def private_texts(states: Iterable[ModelState]) -> dict[str, str]:
    """Texts that no packed file may hold, and what each of them is.

    These are the places of the runs, the paths that their recipes name, the home folder, and secrets of the environment
    and of the Hub's client. What they are is told, they themselves are not: a secret belongs into no message.

    Args:
        states: The stages of the lineage.
    """
    texts = _places(Path.home(), "the home folder") | _places(Path.cwd(), "the working folder")
    for state in states:
        for run in (state.run.absolute(), state.run.resolve()):
            texts |= _places(run, f"the place of run {state.name}")
        for key in (WITHHELD | {"builder_options"}) & state.keys.keys():
            for text in _texts(state.keys[key]):
                if "/" in text and not state.is_hub_name(text):
                    texts[text] = f"what key {key!r} of {state.name} says"
    texts |= {value: f"the variable {name}" for name, value in os.environ.items() if _SECRET.search(name)}
    texts |= {token: "the Hub's token" for token in [get_token()] if token}
    return {text: what for text, what in texts.items() if len(text) >= _SHORTEST}


def _places(folder: Path, what: str) -> dict[str, str]:
    """A folder and those that it lies in, but for what is found on any machine: ``/home``, ``/workspace``."""
    return {str(each): what for each in (folder, *folder.parents) if len(each.parts) > 2}


def _texts(value: Any) -> list[str]:
    """All texts in a value of a recipe; a mapping may be written as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = json.loads(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    return [value] if isinstance(value, str) else []


def check_nothing_private(folder: Path, texts: Mapping[str, str]) -> None:
    """Looks for texts in the files of a folder.

    Args:
        folder: The folder.
        texts: As :func:`private_texts` gives them.

    Raises:
        UserError: If one is found; the message says in which file, and what it is.
    """
    wanted = {written.encode(): what for text, what in texts.items() for written in (text, json.dumps(text)[1:-1])}
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        # Numbers under checked names, and a vocabulary that holds `/usr/local` by itself.
        if path.suffix == ".safetensors" or path.name in VOCABULARIES:
            continue
        content = _readable(path)
        for text, what in wanted.items():
            if text in content:
                raise UserError(f"{path.name} would tell {what}; take it out of the run's files and pack again")


def _readable(path: Path) -> bytes:
    """The bytes of a file; of an archive the names and bytes of its members, which may be compressed."""
    if not is_zipfile(path):
        return path.read_bytes()
    with ZipFile(path) as archive:
        return b"\0".join(each for name in archive.namelist() for each in (name.encode(), archive.read(name)))
