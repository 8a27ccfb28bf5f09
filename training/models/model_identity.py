"""What a model is now: the commit of a repository on the Hub, or a digest of a folder's files; and its single files."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from training.common.errors import UserError, in_one_line

# Files that say that a folder or repository holds a model or an adapter, the surer one first.
MODEL_FILES = ("modules.json", "adapter_config.json", "config.json")
_WEIGHTS = "*.safetensors"


def model_revision(name: str, key: str, revision: str | None = None, weights_only: bool = False) -> str:
    """Finds what a model is now, without loading it.

    Args:
        name: Folder or Hub name.
        key: What the user has to correct if there is no such model, such as ``--model`` or ``key 'teacher'``.
        revision: Branch, tag or commit on the Hub; its main branch if None.
        weights_only: Whether a folder is told by its weights alone, whatever lies beside them.

    Returns:
        The commit on the Hub, or a digest of the folder's files: it changes with any of them, but not with the place.

    Raises:
        UserError: If there is no such model.
    """
    folder = Path(name)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in MODEL_FILES):
            raise UserError(
                f"{folder}: the folder holds no model; it lacks modules.json and config.json; correct {key}"
            )
        return _digest(folder, _WEIGHTS if weights_only else "*")
    reason = ""
    for file in MODEL_FILES:
        try:
            # The folder of a file in the Hub's cache is named after the commit, online and offline.
            return Path(hf_hub_download(name, file, revision=revision)).parent.name
        # What the Hub's client raises differs with the network, the name and the version.
        except Exception as error:
            reason = in_one_line(error)
    raise UserError(f"no model {name!r}: neither a folder nor to be had from the Hub ({reason}); correct {key}")


def _digest(folder: Path, pattern: str) -> str:
    """Changes with the name or content of any file of a pattern in a folder that is not hidden."""
    digest = blake2b(digest_size=16)
    for path in sorted(folder.rglob(pattern)):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as handle:
                while block := handle.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()


def model_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a model, in its folder or from the Hub; None if it has none."""
    if Path(name).is_dir():
        path = Path(name, file)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except EntryNotFoundError:
        return None
