"""A copy of a packed folder that a test breaks, and what the checks say of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from training.common.hub import Content
from training.publishing.record import RECORD
from training.publishing.verify import ADAPTER_CHECKS, CHECKS, Examination, examine

# The embeddings take a separate process and ten seconds: they have their own tests.
QUICK = {name: checks for name, checks in CHECKS.items() if name != "embeddings"}
QUICK_FOR_ADAPTERS = {name: checks for name, checks in ADAPTER_CHECKS.items() if name != "embeddings"}


class BrokenRelease:
    """A copy of a packed folder, whose files are links to the original; ``base`` is that of an adapter."""

    def __init__(self, release: Path, folder: Path) -> None:
        self.folder = folder
        self.base: Path | None = None
        self._checks = QUICK_FOR_ADAPTERS if (release / "adapter_config.json").is_file() else QUICK
        shutil.copytree(release, folder, copy_function=os.link)

    def write(self, name: str, content: str | bytes, listed: bool = True) -> None:
        """Replace a file or add one; with ``listed``, the record gives its size."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        if listed and name != RECORD:
            self.list_sizes()

    def delete(self, name: str) -> None:
        (self.folder / name).unlink()
        self.list_sizes()

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def edit(self, name: str, change: Callable[[Any], Any] | None = None, **keys: Any) -> None:
        """Change a JSON file: by a function in place, or its keys, of which ``...`` deletes one."""
        content = self.read(name)
        if change is not None:
            change(content)
        if keys:
            content = {key: value for key, value in {**content, **keys}.items() if value is not ...}
        self.write(name, json.dumps(content))

    def replace(self, name: str, old: str, new: str) -> None:
        text = (self.folder / name).read_text()
        assert old in text
        self.write(name, text.replace(old, new))

    def edit_weights(self, change: Callable[[dict[str, Tensor]], Any], file: str = "model.safetensors") -> None:
        tensors = load_file(self.folder / file)
        change(tensors)
        (self.folder / file).unlink()
        save_file(tensors, self.folder / file, metadata={"format": "pt"})
        self.list_sizes()

    def list_sizes(self) -> None:
        paths = [path for path in self.folder.rglob("*") if path.is_file() and path.name != RECORD]
        sizes = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}
        hashes = {name: Content(self.folder / name).sha256 for name in sizes}
        self.write(RECORD, json.dumps({**self.read(RECORD), "files": sizes, "sha256": hashes}))

    def examine(self) -> Examination:
        return examine(self.folder, self._checks, self.base)

    def faults(self) -> list[str]:
        return [str(fault) for fault in self.examine().faults]

    def expect(self, *expected: tuple[str, ...]) -> None:
        """Assert that the faults are these and no others: of each a file and parts of what is said."""
        faults = self.faults()
        assert len(faults) == len(expected), faults
        for fault, (file, *parts) in zip(sorted(faults), sorted(expected), strict=True):
            assert fault.startswith(f"{file}: ") and len(fault.splitlines()) == 1, fault
            for part in parts:
                assert part in fault
