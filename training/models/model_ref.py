"""Resolve what a user names (folder, run, Hub repository, adapter), and read what its files say, without loading it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from transformers.utils.peft_utils import find_adapter_config_file

from training.common.errors import UserError, in_one_line
from training.common.outputs import write_whole
from training.common.run_folder import FINAL_MODEL, numbered_checkpoints
from training.models.model_folder import ADAPTER, load_json, read_json, update_digest, user_error

# Files that say that a folder or repository holds a model or an adapter, the surest one first.
MODEL_FILES = ("modules.json", ADAPTER, "config.json")
# In the folder of an adapter that was trained here: its base, and the weights that the base had then.
BASE_RECORD = "base_model.json"
# In the folder of an adapter merged into its base: names and revisions of both.
MERGED_ADAPTER = "adapter.json"


class AdapterFolder(NamedTuple):
    """A saved adapter and the model that it adapts, each a folder or a Hub name."""

    name: str
    base: str
    base_revision: str | None = None  # the base in training, if recorded: a commit, or a digest of its weights
    revision: str | None = None


@dataclass(frozen=True)
class ModelRef:
    """A model that was found under the user's name for it: a folder, or a Hub name with branch, tag or commit."""

    name: str
    place: str
    revision: str | None = None
    identity: str = ""  # what the model is now: a commit on the Hub, or a digest of the folder's files

    @cached_property
    def adapter(self) -> AdapterFolder | None:
        """The adapter that this is; None for any other model."""
        return find_adapter(self.place, self.revision)

    @cached_property
    def base(self) -> ModelRef:
        """The model that an adapter adapts; any other model itself."""
        return ModelRef(self.adapter.base, self.adapter.base) if self.adapter else self

    @cached_property
    def described_by(self) -> ModelRef:
        """The model whose files say how this one is read: the base of an adapter without ``modules.json``."""
        return self if self.adapter is None or self.file("modules.json") else self.base

    def file(self, name: str) -> Path | None:
        """Return the path of one of its files; None if it has none of that name."""
        return model_file(self.place, name, self.revision)

    def read(self, name: str) -> Any:
        """Return the content of one of its JSON files; None if it has none of that name."""
        path = self.file(name)
        return None if path is None else load_json(path)


def resolve(name: str, key: str, revision: str | None = None) -> ModelRef:
    """Find a model or adapter and what it is now, without loading it; see :func:`find_model`."""
    place, at = find_model(name, revision, key)
    identity = model_revision(place, key, at)
    return ModelRef(name, place, None if Path(place).is_dir() else identity, identity)


def find_model(name: str, revision: str | None, key: str | None = None) -> tuple[str, str | None]:
    """Return what to load: folder and None, or Hub name and revision; ``key`` is what the user has to correct.

    A run's folder stands for its finished model, or its newest checkpoint; its revisions are its checkpoints.
    """
    folder = Path(name)
    if not folder.is_dir():
        return name, revision
    of_run = (folder, folder / FINAL_MODEL, *reversed(numbered_checkpoints(folder)))
    for path in of_run if revision is None else [folder / revision]:
        if any((path / name).is_file() for name in MODEL_FILES):
            return str(path), None
    if revision is not None:
        raise UserError(f"{folder}: no checkpoint {revision!r} in it; there are {', '.join(revisions_in(folder))}")
    stages = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{FINAL_MODEL}")))
    hint = f"name one of its stages: {stages}" if stages else "name the folder of a model or of a run"
    raise UserError(f"{folder}: the folder holds no model; {hint}{f' as {key}' if key else ''}")


def revisions_in(run: Path) -> list[str]:
    """Return the names of a run's checkpoints, oldest first."""
    return [path.name for path in numbered_checkpoints(run)]


def model_revision(name: str, key: str, revision: str | None = None, weights_only: bool = False) -> str:
    """Return the commit on the Hub, or a digest of a folder's files or weights, wherever the folder lies."""
    folder, digest = Path(name), blake2b(digest_size=16)
    if folder.is_dir():
        for path in sorted(folder.rglob("*.safetensors" if weights_only else "*")):
            file = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in file.parts):
                digest.update(f"{file.as_posix()}\0{path.stat().st_size}\0".encode())
                update_digest(digest, path)
        return digest.hexdigest()
    for file in MODEL_FILES:
        try:
            # The folder of a file in the Hub's cache is named after the commit, online and offline.
            return Path(hf_hub_download(name, file, revision=revision)).parent.name
        # What the Hub's client raises differs with the network, the name and the version.
        except Exception as error:
            reason = in_one_line(error)
    raise UserError(f"no model {name!r}: neither a folder nor to be had from the Hub ({reason}); correct {key}")


def model_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """Return the path of a model's file, in its folder or from the Hub; None if it has none of that name."""
    if Path(name).is_dir():
        path = Path(name, file)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    # No such file, or no name of a model; loading that says so.
    except (EntryNotFoundError, HFValidationError):
        return None


def find_adapter(name: str, revision: str | None = None) -> AdapterFolder | None:
    """Return the adapter in a folder or on the Hub; None if that is no adapter."""
    try:
        path = find_adapter_config_file(name, revision=revision)
    # No such model, or no name of one; loading it says so.
    except (OSError, HFValidationError):
        return None
    if path is None:
        return None
    with user_error(f"{path}: cannot be read", "save the adapter again"):
        base = json.loads(Path(path).read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not isinstance(base, str):
        raise UserError(f"{path}: does not say what it adapts; write its name as 'base_model_name_or_path'")
    noted = read_json(Path(path).with_name(BASE_RECORD))
    # The adapter may have been given another base since.
    return AdapterFolder(name, base, noted.get("revision") if noted.get("name") == base else None, revision)


def base_of(name: str) -> str:
    """Return the model that an adapter adapts; any other model itself."""
    return _ref(name).base.place


def note_base(folder: Path, name: str, revision: str) -> None:
    """Write into an adapter's folder which model it adapts."""
    write_whole(folder / BASE_RECORD, json.dumps({"name": name, "revision": revision}, indent=2) + "\n")


def base_revision(name: str, key: str) -> str:
    """Return what a base is now: its commit on the Hub, or a digest of the weights in its folder."""
    return model_revision(name, key, weights_only=True)


def _ref(model: ModelRef | str, revision: str | None = None) -> ModelRef:
    return model if isinstance(model, ModelRef) else ModelRef(model, model, revision)


def is_plain(model: ModelRef | str) -> bool:
    """Return whether neither a model nor an adapter's base has ``modules.json``, so that no file says its pooling."""
    return _ref(model).described_by.file("modules.json") is None


def model_type(model: ModelRef | str) -> str | None:
    """Return ``model_type`` in the ``config.json`` of a model, or of an adapter's base."""
    return (_ref(model).base.read("config.json") or {}).get("model_type")


def reads_as_ours(model: ModelRef | str, revision: str | None = None) -> bool:
    """Return whether a model is a plain Qwen3, which is read as this repository trains one: at the last token."""
    model = _ref(model, revision)
    return is_plain(model) and model_type(model) == "qwen3"


def why_not_last_token(model: ModelRef | str) -> str | None:
    """Return why a model does not use last-token pooling, such as ``is pooled by mean``; None if it does."""
    model = _ref(model).described_by
    modules = model.read("modules.json")
    if modules is None:
        return None
    with user_error(f"{model.place}: its modules.json or pooling is damaged", "fetch or save the model again"):
        kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
        if kinds[:2] != ["Transformer", "Pooling"]:
            return f"has the modules {', '.join(kinds)}"
        if after := [kind for kind in kinds[2:] if kind != "Normalize"]:
            return f"has the module {after[0]} after pooling"
        pooled = _pooling(model.read(f"{modules[1]['path']}/config.json"))
    return None if pooled == ["lasttoken"] else f"is pooled by {' and '.join(pooled) or 'nothing'}"


def _pooling(config: dict[str, Any]) -> list[str]:
    """Return the pooling modes, as sentence-transformers 5.4 and later, or earlier ones, write them."""
    if "pooling_mode" in config:
        chosen = config["pooling_mode"]
        return [chosen] if isinstance(chosen, str) else list(chosen)
    prefix = "pooling_mode_"
    return sorted(key.removeprefix(prefix) for key, on in config.items() if key.startswith(prefix) and on is True)


def prompts_of(model: ModelRef | str) -> dict[str, str] | None:
    """Return what a model puts before texts, by the name of the prompt; None if neither it nor its base says."""
    model = _ref(model)
    prompts = (model.read("config_sentence_transformers.json") or {}).get("prompts")
    if prompts is None:
        return None if model.base is model else prompts_of(model.base)
    return {key: text or "" for key, text in prompts.items()}


def default_prompt_name(model: ModelRef | str) -> str | None:
    """Return which of its prompts a model puts before texts that are encoded without naming one."""
    return (_ref(model).read("config_sentence_transformers.json") or {}).get("default_prompt_name")
