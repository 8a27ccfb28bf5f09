"""The code that the card prints gives the same embeddings in all its forms.

It is run as it is printed, in a separate process that has neither network nor login, this repository nor its package,
with the model's name replaced by the folder and more texts beside the printed ones.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hub_cards.snippets import snippets
from training.common.outputs import temporary_folder
from training.publishing.checks.card import examples_of, loaded_names
from training.publishing.checks.packed import ADAPTER_CONFIG, CARD, CONFIG, Finding, PackedFolder, UnreadableError

_WORKER = Path(__file__).with_name("embeddings_worker.py")
_SECONDS = 3600
# Least cosine of two embeddings of a text.
_TOLERANCE = 0.9999
# The same where models compute in bfloat16, whose numbers have 8 significant bits: where padding changes the order of
# additions, results differ in the last of them, and the layers add that up. 28 layers of random weights differ by
# 0.9e-4 so, as much as bfloat16 itself differs from float32; the deepest published model has 40. Such models are
# therefore compared in float32, too, by the other measure.
_COARSE_TOLERANCE = 0.9995
_REFERENCE = "transformers"
# The class of each example's model.
_EXPECTED = {"sentence-transformers": "Qwen3Model", "transformers": "Qwen3Model", "remote-code": "F2LLMModel"}
_EXPECTED_OF_ADAPTERS = {**_EXPECTED, "transformers": "PeftModelForFeatureExtraction"}
_LOOK = "compare the example with the model's files, or pack the run again"
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


def check_embeddings(packed: PackedFolder) -> Iterator[Finding]:
    """Plain transformers, sentence-transformers and the remote code agree, whatever a text is batched with."""
    if packed.is_adapter and packed.base is None:
        # `check_base` says so.
        return
    examples = examples_of(packed)
    if packed.base is not None and "remote-code" in examples and not packed.base.has_code:
        wrong = f"the example remote-code was not run: the code of {packed.release.adapter.base.name} is not at hand"
        yield Finding(CARD, wrong, "give a whole copy of it as --base FOLDER", fault=False)
        examples = tuple(name for name in examples if name != "remote-code")
    codes = {name: code for name, code in snippets(packed.text(CARD)).items() if name in examples}
    if set(codes) != set(examples):
        raise UnreadableError(CARD, "lacks an example that is to be run")
    for code in codes.values():
        try:
            loaded_names(ast.parse(code))
        except (SyntaxError, ValueError) as error:
            raise UnreadableError(CARD, f"has an example that is no Python ({error})") from None
    release = packed.release
    task = {
        "codes": codes,
        "queries": _QUERIES,
        # Longer than a text may be, where that takes no time.
        "documents": [*_DOCUMENTS, *(["panda " * (release.max_length + 8)] if release.max_length <= 1024 else [])],
        "dimensions": list(release.dimensions),
    }
    expected = _EXPECTED_OF_ADAPTERS if packed.is_adapter else _EXPECTED
    coarse = (packed.model_config() or {}).get("dtype") == "bfloat16"
    with _runnable(packed) as places:
        found = list(
            _compare({**task, **places}, release.dimensions, _COARSE_TOLERANCE if coarse else _TOLERANCE, expected)
        )
    yield from found
    if coarse and not any(finding.fault for finding in found):
        with _runnable(packed, in_float32=True) as places:
            yield from _compare({**task, **places}, release.dimensions, _TOLERANCE, expected)


def _compare(
    task: Mapping[str, Any], dimensions: tuple[int, ...], tolerance: float, expected: Mapping[str, str]
) -> Iterator[Finding]:
    """Runs the examples, and holds what they give against what plain transformers gives."""
    report, embeddings = _run(task)
    if report["network"]:
        wrong = f"its examples ran without a network namespace ({report['network']}): what they start has a network"
        yield Finding(CARD, wrong, "verify what you do not trust where user namespaces are allowed", fault=False)
    yield from _faults(report, expected)
    if _REFERENCE not in report["errors"]:
        yield from _differences(embeddings, dimensions, tolerance)


@contextmanager
def _runnable(packed: PackedFolder, in_float32: bool = False) -> Iterator[dict[str, Any]]:
    """Where the examples find the model, without a network.

    An adapter is found in a copy that names the folder of its base.

    Args:
        packed: The packed folder.
        in_float32: Whether weights are loaded as float32; of an adapter those of its base.

    Yields:
        ``folder`` and ``places`` of the worker's task.
    """
    whole = packed.path if packed.base is None else packed.base.folder
    with temporary_folder() as place:
        if in_float32:
            whole = _linked(whole, Path(place) / "float32", CONFIG, dtype="float32")
        if packed.base is None:
            yield {"folder": str(whole), "places": {}}
            return
        named = {"base_model_name_or_path": str(whole)}
        adapter = _linked(packed.path, Path(place) / "adapter", ADAPTER_CONFIG, **named)
        yield {"folder": str(adapter), "places": {packed.release.adapter.base.name: str(whole)}}


def _linked(folder: Path, output: Path, name: str, **fields: str) -> Path:
    """A folder of links to the files of another, but for a JSON file in which fields are replaced."""
    output.mkdir()
    for path in folder.iterdir():
        (output / path.name).symlink_to(path.absolute())
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    (output / name).unlink()
    (output / name).write_text(json.dumps({**content, **fields}), encoding="utf-8")
    return output


def _run(task: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Runs the worker; returns its report and the embeddings, ``(texts, width)`` each, by ``EXAMPLE/VARIANT``.

    Raises:
        UnreadableError: If it ends without a report.
    """
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
            raise UnreadableError(CARD, f"its examples took more than {_SECONDS} seconds") from None
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            raise UnreadableError(CARD, f"its examples ended their process (status {ended.returncode}: {last[:300]})")
        report = json.loads((place / "report.json").read_text(encoding="utf-8"))
        with np.load(place / "embeddings.npz", allow_pickle=False) as stored:
            return report, dict(stored)


def _faults(report: Mapping[str, Any], expected: Mapping[str, str]) -> Iterator[Finding]:
    for name, error in report["errors"].items():
        yield Finding(CARD, f"the example {name} fails ({error})", _LOOK)
    for name, kind in report["classes"].items():
        if kind != expected[name]:
            yield Finding(CARD, f"the example {name} runs a {kind}, not a {expected[name]}", _LOOK)


def _differences(
    embeddings: Mapping[str, np.ndarray], dimensions: tuple[int, ...], tolerance: float
) -> Iterator[Finding]:
    for key, given in embeddings.items():
        name, variant = key.split("/")
        kind, _, dimension = variant.partition("@")
        expected = embeddings[f"{_REFERENCE}/{'queries' if kind == 'queries' else 'documents'}"]
        width = int(dimension) if dimension else dimensions[0]
        if given.shape != (len(expected), width):
            yield Finding(
                CARD, f"the example {name} gives {given.shape} {variant}, not {(len(expected), width)}", _LOOK
            )
            continue
        if not np.allclose(np.linalg.norm(given, axis=1), 1, atol=5e-3):
            yield Finding(CARD, f"the example {name} gives {variant} that are not of unit length", _LOOK)
            continue
        cosine = (_unit(given) * _unit(expected[:, :width])).sum(axis=1).min()
        if not cosine >= tolerance:
            wrong = f"the example {name} differs from {_REFERENCE} on {variant} (cosine {cosine:.5f} < {tolerance})"
            yield Finding(CARD, wrong, _LOOK)


def _unit(embeddings: np.ndarray) -> np.ndarray:
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
