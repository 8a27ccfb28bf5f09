"""The remote code: ``auto_map`` and its files go together, import nothing unusual, and are this checkout's."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator

from training.models.remote_code import foreign_files
from training.publishing.checks.packed import CONFIG, Finding, PackedFolder, UnreadableError

# transformers itself is built on huggingface_hub.
_ALLOWED = {"torch", "transformers", "huggingface_hub"}
_CLASSES = {"AutoConfig": "F2LLMConfig", "AutoModel": "F2LLMModel"}
_REPACK = "pack the run again"


def check_auto_map(packed: PackedFolder) -> Iterator[Finding]:
    """Every class of ``auto_map`` is defined in a file of the folder, and no file of code is left over."""
    entries = packed.table(CONFIG).get("auto_map")
    code = [file for file in packed.files if file.endswith(".py")]
    if not entries:
        for file in code:
            yield Finding(file, "is code that no auto_map names", "delete it, or pack the run again")
        if not code:
            yield Finding(CONFIG, "has no auto_map: trust_remote_code=True would change nothing", _REPACK)
        return
    if not isinstance(entries, dict) or any(
        entries.get(name, "").rpartition(".")[2] != _CLASSES[name] for name in _CLASSES
    ):
        yield Finding(CONFIG, f"auto_map is {entries!r}: it must name {' and '.join(_CLASSES.values())}", _REPACK)
        return
    for entry in entries.values():
        module, _, name = str(entry).rpartition(".")
        file = f"{module}.py"
        if file not in packed.files:
            yield Finding(CONFIG, f"auto_map names {file}, which is not there", _REPACK)
        elif name not in {node.name for node in _tree(packed, file).body if isinstance(node, ast.ClassDef)}:
            yield Finding(file, f"does not define {name}, which auto_map names", _REPACK)


def check_imports(packed: PackedFolder) -> Iterator[Finding]:
    """Neighbours that code imports are there; beyond them only torch, transformers and the standard library."""
    from transformers.dynamic_module_utils import get_imports

    entries = packed.table(CONFIG).get("auto_map")
    if not isinstance(entries, dict):
        return
    reached, waiting = set(), [f"{str(entry).rpartition('.')[0]}.py" for entry in entries.values()]
    while waiting:
        file = waiting.pop()
        if file in reached or file not in packed.files:
            continue
        reached.add(file)
        for neighbour in sorted(_neighbours(_tree(packed, file))):
            if neighbour not in packed.files:
                yield Finding(file, f"imports {neighbour}, which is not there", _REPACK)
            waiting.append(neighbour)
        # The rule by which transformers refuses files from the Hub (of a folder it looks at the first file only):
        # whatever is imported anywhere must be installed, unless it is tried.
        for package in sorted(set(get_imports(packed.path / file)) - _ALLOWED - sys.stdlib_module_names):
            wrong = f"imports {package}: who loads the model need not have it"
            yield Finding(file, wrong, "keep remote code to torch and transformers")
    for file in packed.files:
        if file.endswith(".py") and file not in reached:
            yield Finding(file, "is code that nothing imports", "delete it")


def check_version(packed: PackedFolder) -> Iterator[Finding]:
    """Whether the code is that of this checkout; older code may be right, but is not what is tested here."""
    for file in foreign_files(packed.path):
        wrong = "differs from modeling_f2llm of this checkout"
        yield Finding(file, wrong, "pack the run again for the newer code", fault=False)


def foreign_code(packed: PackedFolder) -> list[str]:
    """The files of code that loading the model may run, and that are not byte for byte this checkout's."""
    folders = [packed.path] if packed.base is None else [packed.path, packed.base.folder]
    return [file for folder in folders for file in foreign_files(folder)]


def _tree(packed: PackedFolder, file: str) -> ast.Module:
    try:
        return ast.parse(packed.text(file))
    except (SyntaxError, ValueError) as error:
        raise UnreadableError(file, f"is no Python ({error})") from None


def _neighbours(tree: ast.Module) -> set[str]:
    """The files beside it that a module imports from, anywhere in it."""
    neighbours = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            modules = [node.module] if node.module else [name.name for name in node.names]
            neighbours |= {f"{module.replace('.', '/')}.py" for module in modules}
    return neighbours
