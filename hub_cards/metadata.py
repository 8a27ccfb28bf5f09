"""The YAML header of a card, with the same content in YAML 1.1 and 1.2."""

from __future__ import annotations

import re
from typing import Any

import yaml
from huggingface_hub import CardData

from hub_cards.markdown import one_line

# Numbers in YAML 1.2, which the Hub's own parser reads, that are texts in YAML 1.1: 1e3, 0o17.
_NUMBER = re.compile(r"[-+]?(?:\.\d+|\d+(?:\.\d*)?)(?:[eE][-+]?\d+)?|0o[0-7]+|0x[0-9a-fA-F]+")


class _Dumper(yaml.SafeDumper):
    """Quotes texts that either version of YAML would read as another type."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_NUMBER.pattern})$"), list("-+.0123456789"))


def header(metadata: CardData) -> str:
    """Return metadata as YAML without the lines of dashes; each text is on one line."""
    content = _cleaned(metadata.to_dict())
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(each) for each in value]
    return one_line(value) if isinstance(value, str) else value
