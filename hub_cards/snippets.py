"""Blocks of Python in Markdown that are marked with a name, to be run by a program."""

from __future__ import annotations

import re

# A block ends at the first line that is just the fence.
_BLOCK = r"^<!-- {mark}: (?P<name>[a-z-]+) -->\n```python\n(?P<code>.*?)^```$"


def snippets(page: str, mark: str = "verify") -> dict[str, str]:
    """Return the marked blocks of a page by name, in order.

    A model's card has ``sentence-transformers``, ``transformers`` and ``remote-code``. Each loads the model by the name
    that the card was made with and leaves ``query_embeddings`` and ``document_embeddings``, arrays or tensors of
    ``(texts, width)`` of unit length, of the same texts in all three.

    Args:
        page: Markdown.
        mark: ``verify``, or ``library``: how other libraries are given the model, by the library's name.
    """
    found = re.finditer(_BLOCK.format(mark=mark), page, flags=re.MULTILINE | re.DOTALL)
    return {block["name"]: block["code"] for block in found}
