"""YAML files that people write: read strictly, with errors that name the file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from training.common.errors import UserError
from training.common.paths import RULE

# A manifest of the largest collection has some ten thousand.
_MOST_VALUES = 1_000_000
_MOST_LEVELS = 100
# Letters of a short key, and the share of them that it has in common with the right one if it is misspelt.
_SHORT, _NEAR = 3, 0.75
_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge", "value")
}


# libyaml reads a manifest of thousands of lines ten times as fast; not every build of PyYAML has it.
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML 1.2 in two points where 1.1 loses what was written: `1e-5` is a number, and no key may stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in written:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                written.add(key.value)
        return super().construct_mapping(node, deep)


# A date is text, as YAML 1.2 has it.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_yaml(path: Path, named_in_file: bool = False) -> dict[str, Any]:
    """Reads a YAML mapping.

    Args:
        path: The file.
        named_in_file: Whether its path may stand in another file, so that an error has to tell where it starts.

    Raises:
        UserError: If the file is missing, is no YAML, gives a key twice or holds something other than a mapping.
    """
    told = f" ({RULE})" if named_in_file else ""
    try:
        content = _construct(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path{told}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a YAML file") from None
    # Numbers and dates under a tag of their own come out of PyYAML as errors of Python.
    except (yaml.YAMLError, ValueError) as error:
        problem = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: not valid YAML ({problem}); correct that line") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(content).__name__}")
    return content


def _construct(text: str) -> Any:
    _check_depth(text)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        # Before anything is made of it: a few lines of aliases may stand for more than a machine can hold.
        _check(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_depth(text: str) -> None:
    """Refuses what is nested so deep that libyaml would crash.

    Raises:
        yaml.YAMLError: If it is, or is not YAML.
    """
    depth = 0
    for event in yaml.parse(text, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_LEVELS:
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: nested more than {_MOST_LEVELS} levels deep")


def _check(root: yaml.Node) -> None:
    """Refuses what no file that people write holds.

    Raises:
        yaml.YAMLError: If a text holds NUL, a value holds itself, or aliases stand for too many values.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting[-1]
        if id(node) in sizes:
            waiting.pop()
            continue
        children = _children(node)
        if id(node) in open_nodes:
            # All children are counted.
            waiting.pop()
            open_nodes.remove(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in children)
            if sizes[id(node)] > _MOST_VALUES:
                raise _fault(node, f"aliases stand for more than {_MOST_VALUES:,} values; write fewer")
            continue
        if isinstance(node, yaml.ScalarNode) and "\0" in node.value:
            raise _fault(node, "the character NUL stands in no name, path or text; take it out")
        if node.tag not in _TAGS:
            raise _fault(
                node, f"values of the tag {node.tag!r} mean nothing here; write text, a number or true or false"
            )
        open_nodes.add(id(node))
        for child in children:
            if id(child) in open_nodes:
                raise _fault(child, "the value holds itself; take out one alias")
            waiting.append(child)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [each for pair in node.value for each in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _fault(node: yaml.Node, what: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def unknown_key(where: str, key: Any, known: Sequence[str], meant: Mapping[str, str] | None = None) -> UserError:
    """The error for a key that nobody reads, with the known one that is meant.

    Args:
        where: What the error names.
        key: The key.
        known: All keys that are read.
        meant: Known keys by what other programs call them.
    """
    other = (meant or {}).get(str(key).lower())
    near = [other] if other in known else difflib.get_close_matches(str(key), known, n=1)
    # Of short words, half the letters are the same by chance: "lr" is near "lora".
    if len(str(key)) <= _SHORT and other not in known:
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=_NEAR)
        near += [name for name in known if name.startswith(str(key))][: not near]
    listed = f"known keys are {', '.join(sorted(known))}" if len(known) < 20 else "--help lists the known ones"
    remedy = f"did you mean {near[0]!r}?" if near else listed
    return UserError(f"{where}: unknown key {key!r}; {remedy}")
