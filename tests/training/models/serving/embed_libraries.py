"""Runs a card's examples for LangChain, LlamaIndex and Haystack in their environment; imports nothing of ours."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

# Read when the libraries are imported.
os.environ.update(HF_HUB_OFFLINE="1", HAYSTACK_TELEMETRY_ENABLED="False")


def main(folder: Path) -> None:
    from haystack import Document

    given = json.loads((folder / "given.json").read_text(encoding="utf-8"))
    queries, documents, codes = given["queries"], given["documents"], given["codes"]
    found = {}
    names: dict = {}
    exec(codes["langchain"], names)
    langchain = names["embeddings"]
    found["langchain-query"] = [langchain.embed_query(each) for each in queries]
    found["langchain-document"] = langchain.embed_documents(documents)
    exec(codes["llama-index"], names)
    llama_index = names["embeddings"]
    found["llama-index-query"] = [llama_index.get_query_embedding(each) for each in queries]
    found["llama-index-document"] = llama_index.get_text_embedding_batch(documents)
    exec(codes["haystack"], names)
    found["haystack-query"] = [names["query_embedder"].run(each)["embedding"] for each in queries]
    answer = names["document_embedder"].run([Document(content=each) for each in documents])["documents"]
    found["haystack-document"] = [each.embedding for each in answer]
    np.savez(folder / "found.npz", **{name: np.array(rows) for name, rows in found.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
