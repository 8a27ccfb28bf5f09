"""Checks of the card: its header, and its examples, which are run and must give the same embeddings.

They run in a separate process without network, login and this repository, on more texts than are printed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard

from hub_cards.snippets import snippets
from training.common.errors import UserError
from training.common.outputs import temporary_folder
from training.models.model_folder import load_json, user_error
from training.publishing.card import CARD, model_card
from training.publishing.checks.files import REPACK, Finding, PackedFolder
from training.publishing.model_files import ADAPTER_CONFIG, CONFIG

_FIELDS = ("library_name", "pipeline_tag", "license", "tags")
_LOADED = re.compile(r'(?:SentenceTransformer|from_pretrained)\((?:\w+, )?"([^"]+)"')
# The examples that are run, with the class of the model that each must load.
_EXAMPLES = {"sentence-transformers": "Qwen3Model", "transformers": "Qwen3Model", "remote-code": "F2LLMModel"}
_REFERENCE = "transformers"
_WORKER = Path(__file__).with_name("examples_worker.py")
# Least cosine of two embeddings of a text. All models are compared in float32: in bfloat16, whose numbers have 8
# significant bits, padding changes the order of additions, and many layers add up what that changes.
_TOLERANCE = 0.9999
_QUERIES = [
    "panda",
    "How many bamboo shoots does a grown animal eat on a day in winter, and where does it find them in deep snow?",
    "बाघ कहाँ रहते हैं?",
]
_DOCUMENTS = [
    "竹",
    "Панды живут в бамбуковых лесах, высоко в горах.",
    "تعيش الباندا في غابات الخيزران.",
    "def add(a: int, b: int) -> int:\n    return a + b",
    " ".join(f"{number} pandas ate {2 * number} kg of bamboo." for number in range(20)),
]


def check_card(packed: PackedFolder) -> Iterator[Finding]:
    """The header can be read, and is as this checkout writes it."""
    with user_error(f"{CARD}: has a header that the Hub cannot read", REPACK):
        header = ModelCard(packed.card, ignore_metadata_errors=False).data
    wanted = ModelCard(model_card(packed.path)).data
    for field in _FIELDS:
        if header.get(field) != wanted.get(field):
            yield Finding(CARD, f"{field} of the header is {header.get(field)!r}, not {wanted.get(field)!r}")


def foreign_examples(packed: PackedFolder) -> list[str]:
    """Return the examples that this checkout would print differently, for the name that they load."""
    found = snippets(packed.card)
    base = {packed.release.adapter.base.name} if packed.is_adapter and packed.release.adapter else set()
    names = {name for code in found.values() for name in _LOADED.findall(code)} - base
    wanted = snippets(model_card(packed.path, names.pop() if len(names) == 1 else None))
    return [f"the example {name}" for name in _expected(packed) if found.get(name) != wanted.get(name)]


def _expected(packed: PackedFolder) -> dict[str, str]:
    """The examples of a card with the class that each runs; the base of an adapter may have no remote code."""
    adapter = packed.release.adapter
    if adapter is None or not packed.is_adapter:
        return dict(_EXAMPLES)
    expected = {**_EXAMPLES, "transformers": "PeftModelForFeatureExtraction"}
    return expected if adapter.base_code else {name: expected[name] for name in expected if name != "remote-code"}


def check_embeddings(packed: PackedFolder) -> Iterator[Finding]:
    """Plain transformers, sentence-transformers and the remote code agree, in every batch."""
    base, release, examples = packed.base, packed.release, _expected(packed)
    if packed.is_adapter and base is None:
        # `check_base` says so.
        return
    if base is not None and "remote-code" in examples and not all((base.folder / file).is_file() for file in base.code):
        # The Hub's client downloads code on demand only.
        wrong = "the example remote-code was not run: the code of the base is not on this machine"
        yield Finding(CARD, wrong, "give a whole copy of it as --base FOLDER", fault=False)
        del examples["remote-code"]
    # One text is longer than the maximum, unless that takes long.
    documents = [*_DOCUMENTS, *(["panda " * (release.max_length + 8)] if release.max_length <= 1024 else [])]
    more = f"\nqueries += {_QUERIES}\ndocuments += {documents}\nquery_embeddings"
    places: dict[str, Path] = {}
    with temporary_folder() as temporary:
        folder = _linked_copy(base.folder if base else packed.path, Path(temporary) / "whole", CONFIG, dtype="float32")
        if base is not None:
            places[release.adapter.base.name] = folder
            named = {"base_model_name_or_path": str(folder)}
            folder = _linked_copy(packed.path, Path(temporary) / "adapter", ADAPTER_CONFIG, **named)

        def placed(call: re.Match[str]) -> str:
            return call[0].replace(f'"{call[1]}"', repr(str(places.get(call[1], folder))))

        found = {name: code for name, code in snippets(packed.card).items() if name in examples}
        codes = {name: _LOADED.sub(placed, code).replace("\nquery_embeddings", more, 1) for name, code in found.items()}
        report = _run({"codes": codes, "dimensions": list(release.dimensions)})
    yield from _faults(report, examples)
    if _REFERENCE not in report["errors"]:
        embeddings = {key: np.asarray(rows, np.float32) for key, rows in report["embeddings"].items()}
        yield from _differences(embeddings, release.dimensions)


def _linked_copy(folder: Path, output: Path, name: str, **fields: str) -> Path:
    output.mkdir()
    for path in folder.iterdir():
        (output / path.name).symlink_to(path.absolute())
    (output / name).unlink()
    (output / name).write_text(json.dumps({**load_json(folder / name), **fields}), encoding="utf-8")
    return output


def _run(task: Mapping[str, Any]) -> dict[str, Any]:
    """Run the worker; return its report, with embeddings, ``(texts, width)`` each, by ``EXAMPLE/VARIANT``."""
    with temporary_folder() as folder:
        (Path(folder) / "task.json").write_text(json.dumps(task), encoding="utf-8")
        # Of the environment only what finds programs and libraries: no token, no cache, no other folder of code.
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS") if name in os.environ}
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": folder, "HOME": folder, "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-I", str(_WORKER), folder]
        ended = subprocess.run(
            command, cwd=folder, env={**kept, **offline}, input="", capture_output=True, text=True, timeout=3600
        )
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{CARD}: its examples ended their process ({last[:300]})", REPACK)
        return load_json(Path(folder) / "report.json")


def _faults(report: Mapping[str, Any], expected: Mapping[str, str]) -> Iterator[Finding]:
    if report["network"]:
        wrong = f"its examples ran without a network namespace ({report['network']}): what they start has a network"
        yield Finding(CARD, wrong, "verify what you do not trust where user namespaces are allowed", fault=False)
    for name, error in report["errors"].items():
        yield Finding(CARD, f"the example {name} fails ({error})")
    for name, kind in report["classes"].items():
        if kind != expected[name]:
            yield Finding(CARD, f"the example {name} runs a {kind}, not a {expected[name]}")


def _differences(embeddings: Mapping[str, np.ndarray], dimensions: tuple[int, ...]) -> Iterator[Finding]:
    for key, given in embeddings.items():
        name, variant = key.split("/")
        kind, _, dimension = variant.partition("@")
        width = int(dimension or dimensions[0])
        expected = embeddings[f"{_REFERENCE}/{'queries' if kind == 'queries' else 'documents'}"][:, :width]
        if given.shape != expected.shape:
            yield Finding(CARD, f"the example {name} gives {given.shape} {variant}, not {expected.shape}")
            continue
        length = np.linalg.norm(given, axis=1)
        if not np.allclose(length, 1, atol=5e-3):
            yield Finding(CARD, f"the example {name} gives {variant} that are not of unit length")
            continue
        cosine = ((given * expected).sum(axis=1) / (length * np.linalg.norm(expected, axis=1))).min()
        # The comparison is false for NaN, too.
        if not cosine >= _TOLERANCE:
            wrong = f"differs from {_REFERENCE} on {variant} (cosine {cosine:.5f} < {_TOLERANCE})"
            yield Finding(CARD, f"the example {name} {wrong}")
