"""What the examples for LangChain, LlamaIndex and Haystack pass on, read without these packages."""

from __future__ import annotations

import ast
from typing import Any

from hub_cards.snippets import snippets

Calls = dict[str, dict[str, Any]]


def library_calls(page):
    """Keyword arguments of the calls on a page, by the class that is called."""
    calls = {}
    for name, code in snippets(page, "library").items():
        for node in ast.walk(ast.parse(code, name)):
            if isinstance(node, ast.Call):
                assert not node.args
                calls[node.func.id] = {each.arg: ast.literal_eval(each.value) for each in node.keywords}
    return calls


def expected_calls(model, query, document):
    """The arguments by which the four classes embed as ``encode_query`` and ``encode_document`` do."""
    documents = {"encode_kwargs": {"prompt_name": "document"}} if document else {}
    instructions = {"query_instruction": query, "text_instruction": document}
    return {
        "HuggingFaceEmbeddings": {"model": model, **documents, "query_encode_kwargs": {"prompt_name": "query"}},
        "HuggingFaceEmbedding": {"model_name": model, **{name: text for name, text in instructions.items() if text}},
        "SentenceTransformersTextEmbedder": {"model": model, "encode_kwargs": {"prompt_name": "query"}},
        "SentenceTransformersDocumentEmbedder": {"model": model, **documents},
    }
