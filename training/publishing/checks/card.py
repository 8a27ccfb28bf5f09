"""The card: a header that the Hub can read, links that lead somewhere; numbers and prompts as the files have them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from hub_cards.snippets import snippets
from training.common.errors import in_one_line
from training.publishing.checks.packed import CARD, SENTENCE_TRANSFORMERS, Finding, PackedFolder, UnreadableError

# The examples that are run, by the names that the card gives them; the last one where there is remote code.
SNIPPETS = ("sentence-transformers", "transformers", "remote-code")
_RENDER = "render the card again"
# What the Hub reads beside the fields of ModelCardData (hub-docs, modelcard.md).
_MORE_FIELDS = {
    "base_model_relation",
    "new_version",
    "model-index",
    "widget",
    "inference",
    "thumbnail",
    "co2_eq_emissions",
}
_RELATIONS = {None, "adapter", "finetune", "merge", "quantized"}
_TASKS = {"feature-extraction", "sentence-similarity"}
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(\s*<?([^)>\s]+)|\bsrc=[\"']([^\"']+)")
_ABSOLUTE = re.compile(r"[a-z][a-z0-9+.-]*:|//|#", re.IGNORECASE)
_ROWS = {
    "parameters": re.compile(r"^\| parameters \| (\d[\d,]*\d|\d)", re.MULTILINE),
    "dtype": re.compile(r"^\| parameters \| [^|]*stored as `(\w+)`", re.MULTILINE),
    "dimensions": re.compile(r"^\| dimensions \| ([^|]+) \|", re.MULTILINE),
    "tokens of a text": re.compile(r"^\| tokens of a text \| (\d[\d,]*\d|\d)", re.MULTILINE),
}


def check_metadata(packed: PackedFolder) -> Iterator[Finding]:
    """The header is YAML with the fields that the Hub knows, and says what this folder is."""
    from huggingface_hub import ModelCardData

    data = _metadata(packed)
    unknown = sorted(data.to_dict().keys() - vars(ModelCardData()).keys() - _MORE_FIELDS)
    if unknown:
        yield Finding(CARD, f"the header has fields that the Hub does not know: {', '.join(unknown)}", _RENDER)
    wanted = {
        "library_name": (data.library_name == "sentence-transformers", "not 'sentence-transformers'"),
        "pipeline_tag": (data.pipeline_tag in _TASKS, f"not one of {', '.join(sorted(_TASKS))}"),
        "license": (
            str(data.license or "").lower() in (packed.release.licence.lower(), "other"),
            "not that of the record",
        ),
        "base_model_relation": (data.get("base_model_relation") in _RELATIONS, "no relation that the Hub knows"),
        "tags": (_texts(data.tags) and "sentence-transformers" in data.tags, "no list with 'sentence-transformers'"),
        "language": (data.language is None or _texts(data.language), "no list of codes"),
        "datasets": (data.datasets is None or _texts(data.datasets), "no list of names"),
    }
    for name, (right, wrong) in wanted.items():
        if not right:
            yield Finding(CARD, f"{name} of the header is {data.get(name)!r}, {wrong}", _RENDER)


def check_links(packed: PackedFolder) -> Iterator[Finding]:
    """Images and files that the card links to are there."""
    text = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", packed.text(CARD)))
    targets = {first or second for first, second in _LINK.findall(text)}
    for target in sorted(targets):
        path = target.partition("#")[0].partition("?")[0]
        if not _ABSOLUTE.match(target) and not (packed.path / path).exists():
            yield Finding(CARD, f"links to {path}, which is not there", "draw the figures and render the card again")


def check_facts(packed: PackedFolder) -> Iterator[Finding]:
    """Parameters, dtype, dimensions and length are those of the record, which is checked against the files."""
    text, release = packed.text(CARD), packed.release
    told = {
        "parameters": f"{release.parameters:,}",
        "dtype": release.dtype,
        "dimensions": ", ".join(map(str, release.dimensions)),
        "tokens of a text": f"{release.max_length:,}",
    }
    for name, row in _ROWS.items():
        found = row.search(text)
        if found is None:
            yield Finding(CARD, f"does not say the {name}", _RENDER)
        elif found[1].strip() != told[name]:
            yield Finding(CARD, f"{name}: {found[1].strip()} on the card, {told[name]} in the record", _RENDER)


def check_results(packed: PackedFolder) -> Iterator[Finding]:
    """Every row of results is that of the folder's own scores."""
    from training.publishing.card import model_card

    told, expected = (_result_rows(text) for text in (packed.text(CARD), model_card(packed.path)))
    for found, wanted in zip_longest(told, expected):
        if found != wanted:
            yield Finding(
                CARD, f"results: {found or 'nothing'} on the card, {wanted or 'nothing'} in the files", _RENDER
            )
            return


def _result_rows(text: str) -> list[str]:
    """The rows of tables in the sections that hold scores."""
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    scores = [section for section in sections if section.startswith(("Truncation\n", "Results\n"))]
    return [line for section in scores for line in section.splitlines() if line.startswith("|")]


def check_snippets(packed: PackedFolder) -> Iterator[Finding]:
    """The three examples are there, load one name, and print the prompt for queries as the files have it."""
    found = snippets(packed.text(CARD))
    examples, adapter = examples_of(packed), packed.release.adapter
    for name in examples:
        if name not in found:
            yield Finding(CARD, f"has no example {name}", _RENDER)
    trees = {name: _tree(name, found[name]) for name in examples if name in found}
    names = {loaded for tree in trees.values() for loaded in loaded_names(tree)}
    if packed.is_adapter and adapter is not None:
        if "transformers" in trees and adapter.base.name not in names:
            yield Finding(CARD, f"the example transformers does not load {adapter.base.name}", _RENDER)
        names.discard(adapter.base.name)
    if len(names) > 1 or any(name.rpartition("/")[2] != packed.release.name for name in names):
        wrong = f"the examples load {', '.join(sorted(names))}, not {packed.release.name}"
        yield Finding(CARD, wrong, _RENDER)
    prompt = (packed.table(SENTENCE_TRANSFORMERS).get("prompts") or {}).get("query")
    if prompt and "transformers" in trees:
        texts = {node.value for node in ast.walk(trees["transformers"]) if isinstance(node, ast.Constant)}
        if prompt not in texts:
            yield Finding(CARD, f"the example transformers has another prompt than {prompt!r}", _RENDER)


def foreign_examples(packed: PackedFolder) -> list[str]:
    """The examples that are not printed as this checkout prints them, for the name that they load."""
    from training.publishing.card import model_card

    found, examples = snippets(packed.text(CARD)), examples_of(packed)
    trees = [_tree(name, found[name]) for name in examples if name in found]
    base = {packed.release.adapter.base.name} if packed.is_adapter and packed.release.adapter else set()
    names = {loaded for tree in trees for loaded in loaded_names(tree)} - base
    expected = snippets(model_card(packed.path, names.pop() if len(names) == 1 else None))
    return [f"the example {name}" for name in examples if found.get(name) != expected.get(name)]


def examples_of(packed: PackedFolder) -> tuple[str, ...]:
    """Names of the examples that a card has; an adapter's base need not bring remote code."""
    adapter = packed.release.adapter if packed.is_adapter else None
    return SNIPPETS if adapter is None or adapter.base_code else SNIPPETS[:-1]


def loaded_names(tree: ast.Module) -> list[str]:
    """The names that code loads models by."""
    return [name.value for call in ast.walk(tree) if isinstance(call, ast.Call) for name in _names(call)]


def _names(call: ast.Call) -> list[ast.Constant]:
    """The names, written out, that a call loads something by: the first argument, or that after a base model."""
    function = getattr(call.func, "id", getattr(call.func, "attr", None))
    if function not in ("SentenceTransformer", "from_pretrained"):
        return []
    given = [each for each in call.args[:2] if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return given[:1]


def _tree(name: str, code: str) -> ast.Module:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError) as error:
        raise UnreadableError(CARD, f"the example {name} is no Python ({error})") from None


def _metadata(packed: PackedFolder) -> Any:
    from huggingface_hub import ModelCard

    text = packed.text(CARD)
    if not text.startswith("---\n"):
        raise UnreadableError(CARD, "has no header of YAML")
    try:
        return ModelCard(text, ignore_metadata_errors=False).data
    # YAML's errors and huggingface_hub's own share no class.
    except Exception as error:
        raise UnreadableError(CARD, f"has a header that the Hub cannot read ({in_one_line(error)})") from None


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)
