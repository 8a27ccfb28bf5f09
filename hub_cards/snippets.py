"""The code of a page that a program can run: fenced blocks of Python under a comment that names them."""

from __future__ import annotations

import re

__all__ = ["snippets"]

# A fence of code ends at the first line that is nothing but the fence.
_BLOCK = r"^<!-- {mark}: (?P<name>[a-z-]+) -->\n```python\n(?P<code>.*?)^```$"


def snippets(page: str, mark: str = "verify") -> dict[str, str]:
    """The marked blocks of a page by name, in order.

    A model's card has ``sentence-transformers``, ``transformers`` and ``remote-code``. Each loads the model by the name
    that the card was made with and leaves ``query_embeddings`` and ``document_embeddings``, arrays or tensors of
    ``(texts, width)`` of unit length, of the same texts in all three.

    Args:
        page: Markdown.
        mark: ``verify``, or ``library``: how other libraries are given the model, by the library's name.
    """
    found = re.finditer(_BLOCK.format(mark=mark), page, flags=re.MULTILINE | re.DOTALL)
    return {block["name"]: block["code"] for block in found}
