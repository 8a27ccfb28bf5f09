"""YAML files that people write: read strictly, with errors that name the file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from training.errors import UserError
from training.recipe_paths import RULE

__all__ = ["load_yaml", "unknown_key"]


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
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path{told}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a YAML file") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path}: not valid YAML ({problem}); correct that line") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(content).__name__}")
    return content


def unknown_key(where: str, key: Any, known: Sequence[str]) -> UserError:
    """The error for a key that nobody reads, with the nearest known one."""
    near = difflib.get_close_matches(str(key), known, n=1)
    listed = f"known keys are {', '.join(sorted(known))}" if len(known) < 20 else "--help lists the known ones"
    remedy = f"did you mean {near[0]!r}?" if near else listed
    return UserError(f"{where}: unknown key {key!r}; {remedy}")
