"""A model that a run made, where the paths of its recipe lead, and what of its files may be published."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

from huggingface_hub import get_token

from training.common.errors import UserError
from training.common.hub import check_repository
from training.common.run_folder import FINAL_MODEL, RECIPE, holds_model, numbered_checkpoints, place_of
from training.common.yaml_file import load_yaml
from training.config.arguments import LEARNT, MACHINE, PATHS, REFUSED, RUNNING
from training.models.merging import MERGE
from training.models.model_folder import ADAPTER, load_json
from training.models.model_ref import MERGED_ADAPTER
from training.publishing.record import RECORD

# The identity of a model on the Hub; the digest of a folder is shorter.
COMMIT = re.compile("[0-9a-f]{40}")
PUBLIC_KEYS = LEARNT | RUNNING
# Every other key: it names a path, an account or a machine, or has no effect here.
WITHHELD_KEYS = PATHS | MACHINE | frozenset(REFUSED)
# Vocabulary files of a tokenizer.
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")
# Keys whose value is a mapping, which a command line gives as JSON.
_MAPPINGS = ("builder_options", "source_caps", "model_config", "prune_to", "quantized")
# Keys of configurations that say where a model was loaded from.
_ORIGINS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "cache_dir", "_commit_hash")
_SECRET = re.compile(r"token|secret|passw|api_?key|access_?key|credential", re.IGNORECASE)

# Return the content of a JSON file of a run.
read_json = partial(load_json, remedy="the run is damaged")


@dataclass(frozen=True)
class ModelState:
    """A model made by a run or a merge, or one without a known run."""

    run: Path  # folder of the run; of a merged model, or one without a run, its own
    folder: Path  # folder of the model: RUN/model or RUN/checkpoint-N
    keys: Mapping[str, Any]  # the run's recipe.yaml; empty without a run

    @property
    def name(self) -> str:
        """The stage's name, followed by the checkpoint if it is one: ``stage2@checkpoint-500``."""
        stage = self.run.resolve().name
        return stage if self.folder.name == FINAL_MODEL or self.run == self.folder else f"{stage}@{self.folder.name}"

    @property
    def kind(self) -> str:
        """How the model was made, as :class:`StageRecord` says it."""
        if (self.folder / MERGE).is_file():
            return "merging"
        if not self.keys:
            return "unknown"
        if self.keys.get("prune_to") is not None or self.keys.get("trim_vocabulary"):
            return "pruning"
        if (self.folder / ADAPTER).is_file():
            return "adapter"
        return "merged_adapter" if (self.folder / MERGED_ADAPTER).is_file() else "training"

    def resolve(self, path: str) -> Path:
        """Return where a path of the recipe leads now."""
        return place_of(self.run, self.keys, path)

    def path_of(self, key: str) -> Path | None:
        """Return where the path under a key of the recipe leads now; None if the key is not given."""
        return self.resolve(str(self.keys[key])) if self.keys.get(key) else None

    def is_hub_name(self, name: str) -> bool:
        """Whether a name in the recipe is a Hub repository rather than a folder of the machine that trained."""
        parts = Path(name).parts
        if os.path.isabs(name) or self.resolve(name).exists() or not is_hub_name(name):
            return False
        # `runs/old` that was deleted since looks like a Hub repository, too.
        folders = {Path(str(self.keys[key])).parts[0] for key in ("output_dir", "manifest") if self.keys.get(key)}
        return parts[0] not in folders and parts[1] != FINAL_MODEL and not parts[1].startswith("checkpoint-")


def is_hub_name(name: str) -> bool:
    """Whether a name is one on the Hub, ``ORG/NAME``, and not that of a folder here."""
    try:
        return bool(check_repository(name)) and len(Path(name).parts) == 2 and not Path(name).is_dir()
    except UserError:
        return False


def state_of(folder: Path) -> ModelState | None:
    """Return the state in the folder of a run, model, checkpoint or merged model; None for any other model."""
    if (folder / MERGE).is_file():
        return ModelState(folder, folder, {})
    if (folder / RECIPE).is_file() and (folder / FINAL_MODEL).is_dir():
        folder = folder / FINAL_MODEL
    recipe = folder.absolute().parent / RECIPE
    if not holds_model(folder) or not recipe.is_file():
        return None
    return ModelState(recipe.parent, folder, load_yaml(recipe))


def find_state(folder: Path, checkpoint: str | None = None) -> ModelState:
    """Return the model of :func:`state_of` (of a run, its checkpoint if one is named), or a model without a run."""
    state = state_of(folder / (checkpoint or ""))
    if state is not None:
        return state
    if (folder / RECORD).is_file():
        raise UserError(f"{folder}: is packed already; upload it with `publish.py push`, or give its run")
    if checkpoint is None and all((folder / name).is_file() for name in ("config.json", "modules.json")):
        return ModelState(folder, folder, {})
    checkpoints = [path.name for path in numbered_checkpoints(folder)]
    stages = [path.parent.name for path in sorted(folder.glob(f"*/{RECIPE}"))]
    raise UserError(
        f"{folder}: holds no {checkpoint or 'finished model'}; finish the run with run_stage.py --resume, or name a "
        f"stage ({', '.join(stages) or 'none'}) or --checkpoint ({', '.join(checkpoints) or 'none'})"
    )


def write_json(path: Path, content: object) -> None:
    """Write a JSON file as packed folders have them."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def clean_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a stage that may be published, of a recipe or a ``training_arguments.json``."""
    public = {}
    for key, value in arguments.items():
        if key not in PUBLIC_KEYS:
            continue
        if key in _MAPPINGS and isinstance(value, str):
            value = json.loads(value)
        if key == "builder_options" and isinstance(value, Mapping):
            # Texts among a builder's options may be folders.
            value = {name: option for name, option in value.items() if isinstance(option, int | float | None)}
        public[key] = value
    return public


def clean_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a model or tokenizer without the fields that say where it was loaded from."""
    return {key: value for key, value in config.items() if key not in _ORIGINS}


def private_texts(states: Iterable[ModelState]) -> dict[str, str]:
    """Return texts that no packed file may hold, each with a description that does not repeat it.

    These are the folders of the runs, paths in their recipes, the home folder, and secrets of environment and Hub.
    """
    states = list(states)
    folders = [(Path.home(), "the home folder"), (Path.cwd(), "the working folder")]
    for state in states:
        folders += [(run, f"the place of run {state.name}") for run in (state.run.absolute(), state.run.resolve())]
    # Not folders that exist on any machine: `/home`, `/workspace`.
    parts = ((each, what) for folder, what in folders for each in (folder, *folder.parents))
    texts = {str(each): what for each, what in parts if len(each.parts) > 2}
    for state in states:
        for key in (WITHHELD_KEYS | {"builder_options"}) & state.keys.keys():
            for text in _texts(state.keys[key]):
                if "/" in text and not state.is_hub_name(text):
                    texts[text] = f"what key {key!r} of {state.name} says"
    texts |= {value: f"the variable {name}" for name, value in os.environ.items() if _SECRET.search(name)}
    texts |= {token: "the Hub's token" for token in [get_token()] if token}
    # Shorter texts occur in files by chance.
    return {text: what for text, what in texts.items() if len(text) >= 8}


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
    """Refuse a folder in which a file holds one of the ``texts`` of :func:`private_texts`."""
    wanted = {written.encode(): what for text, what in texts.items() for written in (text, json.dumps(text)[1:-1])}
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        # Weights are numbers under checked names, and a vocabulary may well hold `/usr/local`.
        if path.suffix == ".safetensors" or path.name in VOCABULARIES:
            continue
        content = path.read_bytes()
        if is_zipfile(path):
            with ZipFile(path) as archive:
                content = b"\0".join(name.encode() + b"\0" + archive.read(name) for name in archive.namelist())
        for text, what in wanted.items():
            if text in content:
                raise UserError(f"{path.name} would tell {what}; take it out of the run's files and pack again")
