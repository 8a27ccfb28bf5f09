"""Checks of the card: header, links, numbers and prompts, and its examples, which are run.

The printed code must give the same embeddings in all its forms. It runs in a separate process without network, login,
this repository and its package, with the folder in the place of the model's name and more texts than are printed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard

from hub_cards.snippets import snippets
from training.common.errors import in_one_line
from training.common.outputs import temporary_folder
from training.publishing.checks.packed import CARD, FaultError, Finding, PackedFolder
from training.publishing.model_files import ADAPTER_CONFIG, CONFIG

_RENDER = "render the card again"
_LOOK = "compare the example with the model's files, or pack the run again"
_FIELDS = ("library_name", "pipeline_tag", "license", "tags")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(\s*<?([^)>\s]+)|\bsrc=[\"']([^\"']+)")
_LOADED = re.compile(r'(?:SentenceTransformer|from_pretrained)\((?:\w+, )?"([^"]+)"')
_ABSOLUTE = re.compile(r"[a-z][a-z0-9+.-]*:|//|#", re.IGNORECASE)
# Rows of the first table that are checked, and sections of which all rows are.
_ROWS = ("| parameters |", "| dimensions |", "| tokens of a text |")
_SECTIONS = ("Truncation\n", "Results\n")
# The examples that are run, with the class of the model that each must load.
_EXAMPLES = {"sentence-transformers": "Qwen3Model", "transformers": "Qwen3Model", "remote-code": "F2LLMModel"}
_EXAMPLES_OF_ADAPTERS = {**_EXAMPLES, "transformers": "PeftModelForFeatureExtraction"}
_REFERENCE = "transformers"
_WORKER = Path(__file__).with_name("examples_worker.py")
_SECONDS = 3600
# Least cosine of two embeddings of a text.
_TOLERANCE = 0.9999
# The same for models that compute in bfloat16, whose numbers have 8 significant bits: where padding changes the order
# of additions, results differ in the last bit, and the layers add that up. 28 layers of random weights differ by
# 0.9e-4, as much as bfloat16 itself differs from float32; the deepest published model has 40 layers. Such models are
# therefore compared in float32, too, with the other tolerance.
_COARSE_TOLERANCE = 0.9995
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


def _rendered(packed: PackedFolder, name: str | None = None) -> str:
    """The card that this checkout writes for the folder."""
    # It needs jinja2, which no other check does.
    from training.publishing.card import model_card

    return model_card(packed.path, name)


def check_card(packed: PackedFolder) -> Iterator[Finding]:
    """The header and the rows with numbers are those that record and evaluation give, and linked files exist."""
    text, expected = packed.text(CARD), _rendered(packed)
    try:
        header = ModelCard(text, ignore_metadata_errors=False).data
    # Errors of YAML and of huggingface_hub share no class.
    except Exception as error:
        raise FaultError(CARD, f"has a header that the Hub cannot read ({in_one_line(error)})") from None
    wanted = ModelCard(expected).data
    for field in _FIELDS:
        if header.get(field) != wanted.get(field):
            wrong = f"{field} of the header is {header.get(field)!r}, not {wanted.get(field)!r}"
            yield Finding(CARD, wrong, _RENDER)
    for found, right in zip_longest(_rows(text), _rows(expected), fillvalue="nothing"):
        if found != right:
            yield Finding(CARD, f"has {found} where the files give {right}", _RENDER)
            break
    outside = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))
    for target in sorted({first or second for first, second in _LINK.findall(outside)}):
        path = target.partition("#")[0].partition("?")[0]
        if not _ABSOLUTE.match(target) and not (packed.path / path).exists():
            yield Finding(CARD, f"links to {path}, which does not exist", "draw the figures and render the card again")


def _rows(text: str) -> list[str]:
    first, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    scores = (line for section in sections if section.startswith(_SECTIONS) for line in section.splitlines())
    return [
        *(line for line in first.splitlines() if line.startswith(_ROWS)),
        *(line for line in scores if line.startswith("|")),
    ]


def check_examples(packed: PackedFolder) -> Iterator[Finding]:
    """The examples exist, and load the model by one name."""
    found = snippets(packed.text(CARD))
    for name in _expected(packed).keys() - found.keys():
        yield Finding(CARD, f"has no example {name}", _RENDER)
    names = _loaded_names(packed, found)
    if len(names) > 1 or {name.rpartition("/")[2] for name in names} != {packed.release.name}:
        yield Finding(CARD, f"the examples load {', '.join(sorted(names))}, not {packed.release.name}", _RENDER)


def foreign_examples(packed: PackedFolder) -> list[str]:
    """Return the examples that this checkout would print differently, for the name that they load."""
    found = snippets(packed.text(CARD))
    names = _loaded_names(packed, found)
    wanted = snippets(_rendered(packed, names.pop() if len(names) == 1 else None))
    return [f"the example {name}" for name in _expected(packed) if found.get(name) != wanted.get(name)]


def _loaded_names(packed: PackedFolder, examples: Mapping[str, str]) -> set[str]:
    """The names by which examples load the model, and not an adapter's base."""
    return {name for code in examples.values() for name in _LOADED.findall(code)} - {_base_name(packed)}


def _base_name(packed: PackedFolder) -> str | None:
    adapter = packed.release.adapter if packed.is_adapter else None
    return adapter and adapter.base.name


def _expected(packed: PackedFolder) -> dict[str, str]:
    """The examples of a card with the class that each runs; the base of an adapter may have no remote code."""
    if not packed.is_adapter or packed.release.adapter is None:
        return dict(_EXAMPLES)
    has_code = packed.release.adapter.base_code
    return {name: kind for name, kind in _EXAMPLES_OF_ADAPTERS.items() if has_code or name != "remote-code"}


def check_embeddings(packed: PackedFolder) -> Iterator[Finding]:
    """Plain transformers, sentence-transformers and the remote code agree, in every batch."""
    base, release = packed.base, packed.release
    if packed.is_adapter and base is None:
        # `check_base` says so.
        return
    examples = _expected(packed)
    if base is not None and "remote-code" in examples and not base.has_code:
        wrong = f"the example remote-code was not run: the code of {_base_name(packed)} is not on this machine"
        yield Finding(CARD, wrong, "give a whole copy of it as --base FOLDER", fault=False)
        del examples["remote-code"]
    found = snippets(packed.text(CARD))
    task = {
        "codes": {name: found[name] for name in examples},
        "queries": _QUERIES,
        # One text is longer than the maximum, unless that takes long.
        "documents": [*_DOCUMENTS, *(["panda " * (release.max_length + 8)] if release.max_length <= 1024 else [])],
        "dimensions": list(release.dimensions),
    }
    coarse = (packed.config or {}).get("dtype") == "bfloat16"
    for in_float32, tolerance in ((False, _COARSE_TOLERANCE), (True, _TOLERANCE)) if coarse else ((False, _TOLERANCE),):
        with _runnable(packed, in_float32) as folders:
            report, embeddings = _run({**task, **folders})
        found = [*_faults(report, examples)]
        if _REFERENCE not in report["errors"]:
            found += _differences(embeddings, release.dimensions, tolerance)
        yield from found
        if any(finding.fault for finding in found):
            return


@contextmanager
def _runnable(packed: PackedFolder, in_float32: bool) -> Iterator[dict[str, Any]]:
    """Yield ``folder`` and ``places`` of the worker's task: where the examples find the model without a network.

    Args:
        packed: The packed folder. An adapter is copied, to name the folder of its base.
        in_float32: Whether the weights (of an adapter, those of its base) are loaded as float32.
    """
    whole = packed.path if packed.base is None else packed.base.folder
    with temporary_folder() as temporary:
        if in_float32:
            whole = _linked(whole, Path(temporary) / "float32", CONFIG, dtype="float32")
        if packed.base is None:
            yield {"folder": str(whole), "places": {}}
            return
        named = {"base_model_name_or_path": str(whole)}
        adapter = _linked(packed.path, Path(temporary) / "adapter", ADAPTER_CONFIG, **named)
        yield {"folder": str(adapter), "places": {_base_name(packed): str(whole)}}


def _linked(folder: Path, output: Path, name: str, **fields: str) -> Path:
    """A folder of links to the files of another, except a JSON file in which fields are replaced."""
    output.mkdir()
    for path in folder.iterdir():
        (output / path.name).symlink_to(path.absolute())
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    (output / name).unlink()
    (output / name).write_text(json.dumps({**content, **fields}), encoding="utf-8")
    return output


def _run(task: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run the worker; return its report and the embeddings, ``(texts, width)`` each, by ``EXAMPLE/VARIANT``."""
    with temporary_folder() as folder:
        place = Path(folder)
        (place / "task.json").write_text(json.dumps(task), encoding="utf-8")
        # Of the environment only what finds programs and libraries: no token, no cache, no other folder of code.
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS") if name in os.environ}
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": folder, "HOME": folder, "TOKENIZERS_PARALLELISM": "false"}
        try:
            ended = subprocess.run(
                [sys.executable, "-I", str(_WORKER), folder],
                cwd=folder,
                env={**kept, **offline},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise FaultError(CARD, f"its examples took more than {_SECONDS} seconds") from None
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            raise FaultError(CARD, f"its examples ended their process (status {ended.returncode}: {last[:300]})")
        report = json.loads((place / "report.json").read_text(encoding="utf-8"))
        with np.load(place / "embeddings.npz", allow_pickle=False) as stored:
            return report, dict(stored)


def _faults(report: Mapping[str, Any], expected: Mapping[str, str]) -> Iterator[Finding]:
    if report["network"]:
        wrong = f"its examples ran without a network namespace ({report['network']}): what they start has a network"
        yield Finding(CARD, wrong, "verify what you do not trust where user namespaces are allowed", fault=False)
    for name, error in report["errors"].items():
        yield Finding(CARD, f"the example {name} fails ({error})", _LOOK)
    for name, kind in report["classes"].items():
        if kind != expected[name]:
            yield Finding(CARD, f"the example {name} runs a {kind}, not a {expected[name]}", _LOOK)


def _differences(
    embeddings: Mapping[str, np.ndarray], dimensions: tuple[int, ...], tolerance: float
) -> Iterator[Finding]:
    """Compare all embeddings with those of plain transformers."""
    for key, given in embeddings.items():
        name, variant = key.split("/")
        kind, _, dimension = variant.partition("@")
        width = int(dimension or dimensions[0])
        expected = embeddings[f"{_REFERENCE}/{'queries' if kind == 'queries' else 'documents'}"][:, :width]
        wrong = None
        if given.shape != expected.shape:
            wrong = f"gives {given.shape} {variant}, not {expected.shape}"
        elif not np.allclose(np.linalg.norm(given, axis=1), 1, atol=5e-3):
            wrong = f"gives {variant} that are not of unit length"
        else:
            lengths = np.linalg.norm(given, axis=1) * np.linalg.norm(expected, axis=1)
            cosine = ((given * expected).sum(axis=1) / lengths).min()
            # The comparison is false for NaN, too.
            if not cosine >= tolerance:
                wrong = f"differs from {_REFERENCE} on {variant} (cosine {cosine:.5f} < {tolerance})"
        if wrong:
            yield Finding(CARD, f"the example {name} {wrong}", _LOOK)
