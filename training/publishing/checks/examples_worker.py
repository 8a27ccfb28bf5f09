"""Runs the examples of a card: a separate program that ``card.py`` starts.

Neither it nor an example imports anything of this repository. Where the system allows it, it has no network.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

# Packages of this repository: a released folder must work without them.
_OWN = ("modeling_f2llm", "training", "hub_cards")
# linux/sched.h
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000


class _Hidden(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] in _OWN:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def _refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise OSError(f"no network: {event}{arguments[1:]!r}")


def _leave_network() -> str | None:
    """Move this process into a network namespace without devices; return why the system does not allow it."""
    if sys.platform != "linux":
        return "Linux alone has them"
    # An unprivileged process needs a user namespace for that. It keeps its user there: some libraries ask for it.
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_USER | _NEW_NETWORK):
        return os.strerror(ctypes.get_errno())
    with contextlib.suppress(OSError):
        for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path("/proc/self", name).write_text(line)
    return None


def _run(code: str, widths: list[int]) -> tuple[str, dict[str, Any]]:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "example", "exec"), names)
    documents, model = names["documents"], names["model"]
    found = {"queries": names["query_embeddings"], "documents": names["document_embeddings"]}
    is_plain = "embed" in names
    embed = names["embed"] if is_plain else model.encode_document
    if is_plain:
        # The example itself puts the prompt before documents.
        documents = [names.get("document_prompt", "") + document for document in documents]
    tokenizer = names["tokenizer"] if is_plain else model.tokenizer
    found["one by one"] = [row for text in documents for row in embed([text])]
    tokenizer.padding_side = "left"
    found["padded on the left"] = embed(documents)
    tokenizer.padding_side = "right"
    if not is_plain:
        for width in widths:
            cut = model.encode_document(documents, truncate_dim=width, normalize_embeddings=True)
            found[f"documents@{width}"] = cut
    kind = type(model if is_plain else model.transformers_model).__name__
    return kind, {
        variant: [(row.float() if hasattr(row, "float") else row).tolist() for row in rows]
        for variant, rows in found.items()
    }


def main(folder: Path, network: str | None) -> None:
    """Run the task of a folder; write a report there. ``network`` says why there is one, if so."""
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    report: dict[str, Any] = {"errors": {}, "classes": {}, "embeddings": {}, "network": network}
    for name, code in task["codes"].items():
        try:
            # Examples print, and libraries draw bars.
            with contextlib.redirect_stdout(sys.stderr):
                report["classes"][name], found = _run(code, task["dimensions"])
        # The reader of the card would see any exception.
        except Exception as error:
            report["errors"][name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        else:
            report["embeddings"] |= {f"{name}/{variant}": rows for variant, rows in found.items()}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    # Before any import that starts threads, which would prevent it.
    kept = _leave_network()
    sys.meta_path.insert(0, _Hidden())
    sys.addaudithook(_refuse_network)
    main(Path(sys.argv[1]), kept)
