"""Exports a model for ONNX Runtime or OpenVINO, in fp32 or with 8-bit weights.

Runs in an environment of its own, because the optimum libraries hold transformers back; see "Export" in README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

# Run as a script from a checkout: the recipe is not an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training.common.command import run_command
from training.common.errors import StoppedError, UserError, in_one_line
from training.common.outputs import check_output, locked, new_folder, temporary_folder
from training.common.run_folder import write_whole
from training.models.exporting import BACKENDS, LEAST_COSINE, check_same_embeddings, check_whole, write_graph
from training.models.older_readers import write_for_older_readers

# What says which model was exported, and how.
_RECORD = "export.json"
_NEEDED = (
    *("config.json", "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    *("1_Pooling/config.json", "tokenizer.json", "tokenizer_config.json"),
)
_OPTIONAL = (
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    *("README.md", "LICENSE"),
)


def export(folder: Path, output: Path, backend: str, precision: str = "fp32") -> str:
    """Writes a folder that ``SentenceTransformer(output, backend=…)`` loads; it is there whole or not at all.

    Args:
        folder: Of the model, as a stage or a release leaves it.
        output: The new folder. If it holds this very export already, nothing is done.
        backend: ``onnx`` or ``openvino``.
        precision: ``fp32`` or ``int8``.

    Returns:
        Path of the graph in the new folder, which sentence-transformers takes as ``file_name``.

    Raises:
        UserError: If the backend, precision or folder is no good, a package is missing, or the output is in use.
        StoppedError: If the libraries cannot export the model, or its embeddings come out differently.
    """
    _check_choice("backend", backend, BACKENDS)
    _check_choice("precision", precision, LEAST_COSINE)
    weights = _weights(folder)
    check_output(output, [folder])
    record = {"backend": backend, "precision": precision, "weights": _digest(weights)}
    with locked(output):
        if output.exists():
            return _already_there(output, record)
        _require(backend)
        with new_folder(output) as partial:
            _copy_small_files(folder, partial)
            check_whole(folder, partial)
            with temporary_folder() as source:
                shutil.copytree(partial, source, dirs_exist_ok=True)
                for path in weights:
                    (Path(source) / path.name).symlink_to(path.resolve())
                record["file_name"] = _export(Path(source), partial, backend, precision)
            record["versions"] = {name: version(name) for name in ("sentence-transformers", "transformers", "torch")}
            write_whole(partial / _RECORD, json.dumps(record, indent=2) + "\n")
    return record["file_name"]


def _export(source: Path, folder: Path, backend: str, precision: str) -> str:
    try:
        file_name = write_graph(source, folder, backend, precision)
        check_same_embeddings(source, folder, backend, precision, file_name)
    except (StoppedError, OSError):
        raise
    # Each of the libraries has errors of its own.
    except Exception as error:
        raise StoppedError(
            f"{backend} export failed ({type(error).__name__}: {in_one_line(error)}); pyproject.toml names the "
            f"versions that work, in the group {backend}"
        ) from error
    return file_name


def _check_choice(what: str, given: str, known: object) -> None:
    if given not in known:
        raise UserError(f"unknown {what} {given!r}; choose one of {', '.join(known)}")


def _require(backend: str) -> None:
    try:
        import_module(BACKENDS[backend])
    # A package that is there in a version that does not fit fails in other ways.
    except Exception as error:
        raise UserError(
            f"the {backend} backend cannot be used here ({in_one_line(error)}); it needs an environment of its own: "
            f"pip install --group {backend}, with pip 25.1 or newer, in this checkout"
        ) from None


def _weights(folder: Path) -> list[Path]:
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    paths = sorted(folder.glob("model*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if missing or not (paths or index.is_file()):
        raise UserError(
            f"{folder}: holds no model, it lacks {missing[0] if missing else 'model.safetensors'}; name the folder of "
            "a stage's model or of a release"
        )
    return [*paths, index] if index.is_file() else paths


def _digest(paths: list[Path]) -> str:
    whole = sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                whole.update(block)
    return whole.hexdigest()


def _already_there(output: Path, record: dict[str, str]) -> str:
    try:
        found = json.loads((output / _RECORD).read_text(encoding="utf-8"))
        if all(found[key] == value for key, value in record.items()):
            return found["file_name"]
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise UserError(f"{output}: is there already and holds something else; name another --output")


def _copy_small_files(folder: Path, target: Path) -> None:
    try:
        modules = [module["path"] for module in json.loads((folder / "modules.json").read_text(encoding="utf-8"))]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for name in (*_NEEDED, *_OPTIONAL):
            if (folder / name).is_file():
                (target / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / name, target / name)
        # A module after pooling may have weights; one without any file has no folder on the Hub.
        for module in modules:
            if module and (folder / module).is_dir():
                shutil.copytree(folder / module, target / module, dirs_exist_ok=True)
        # The graph is stock Qwen3: remote code stays behind.
        config.pop("auto_map", None)
        (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        write_for_older_readers(target)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: its settings are damaged ({in_one_line(error)}); name a whole model") from None
    if config.get("model_type") != "qwen3":
        raise UserError(f"{folder}: model_type is {config.get('model_type')!r}; only 'qwen3' is exported")


def main(words: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status, as :func:`~training.common.command.run_command` has it."""
    parser = argparse.ArgumentParser(prog="export.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="folder of the model")
    parser.add_argument("--output", type=Path, required=True, help="folder to be written")
    parser.add_argument("--backend", required=True, help="onnx or openvino")
    parser.add_argument("--precision", default="fp32", help="fp32 or int8 (%(default)s)")
    arguments = parser.parse_args(words)

    def work() -> None:
        name = export(arguments.folder, arguments.output, arguments.backend, arguments.precision)
        sys.stdout.write(
            f"{arguments.output}: SentenceTransformer({str(arguments.output)!r}, backend={arguments.backend!r}, "
            f'model_kwargs={{"file_name": {name!r}}})\n'
        )

    return run_command(work)


if __name__ == "__main__":
    raise SystemExit(main())
