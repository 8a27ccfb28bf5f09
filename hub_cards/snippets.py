"""The code of a card that a program can run: fenced blocks of Python under a comment that names them."""

from __future__ import annotations

import re

__all__ = ["snippets"]

# A fence of code ends at the first line that is nothing but the fence.
_BLOCK = re.compile(r"^<!-- verify: (?P<name>[a-z-]+) -->\n```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(card: str) -> dict[str, str]:
    """The marked blocks of a card by name, in order.

    A model's card has ``sentence-transformers``, ``transformers`` and ``remote-code``. Each loads the model by the name
    that the card was made with and leaves ``query_embeddings`` and ``document_embeddings``, arrays or tensors of
    ``(texts, width)`` of unit length, of the same texts in all three.
    """
    return {found["name"]: found["code"] for found in _BLOCK.finditer(card)}
