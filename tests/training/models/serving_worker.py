"""Embed texts in another environment; imports nothing of this repository.

``serving_worker.py backend TEXTS ANSWER KIND MODEL [FILE_NAME]`` with sentence-transformers or llama.cpp,
``serving_worker.py server URL FOLDER`` with the openai client, ``serving_worker.py libraries FOLDER`` with a card's
examples for LangChain, LlamaIndex and Haystack.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np


def with_sentence_transformers(folder, kind, file_name, texts):
    from sentence_transformers import SentenceTransformer

    backend, remote_code = kind.replace("remote-code", "torch"), kind == "remote-code"
    choice = {"file_name": file_name}
    if backend == "openvino":
        choice["ov_config"] = {"INFERENCE_PRECISION_HINT": "f32"}
    options = {} if backend == "torch" else {"model_kwargs": choice}
    model = SentenceTransformer(folder, device="cpu", backend=backend, trust_remote_code=remote_code, **options)
    if remote_code:
        assert type(model[0].auto_model).__name__ == "F2LLMModel"
    # In the given order, so that short texts are padded to long ones.
    return np.concatenate([model.encode(texts[start : start + 4]) for start in range(0, len(texts), 4)])


def with_llama_cpp(file, texts):
    from llama_cpp import Llama

    model = Llama(file, embedding=True, n_ctx=512, n_batch=512, n_ubatch=512, n_threads=1, verbose=False)
    vectors = np.array([model.embed(text) for text in texts])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def backend(texts, answer, kind, model, file_name=""):
    content = json.loads(Path(texts).read_text(encoding="utf-8"))
    if kind == "llama":
        np.save(answer, with_llama_cpp(model, content))
    else:
        np.save(answer, with_sentence_transformers(model, kind, file_name, content))


def server(url, folder):
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", timeout=60, max_retries=0)
    answers = {}
    for name, request in json.loads(Path(folder, "requests.json").read_text(encoding="utf-8")).items():
        answer = client.embeddings.create(model="f2llm", **request)
        answers[name] = [each.embedding for each in answer.data]
    Path(folder, "answers.json").write_text(json.dumps(answers), encoding="utf-8")


def libraries(folder):
    # Read when the libraries are imported.
    os.environ.update(HF_HUB_OFFLINE="1", HAYSTACK_TELEMETRY_ENABLED="False")
    from haystack import Document

    given = json.loads(Path(folder, "given.json").read_text(encoding="utf-8"))
    queries, documents, codes = given["queries"], given["documents"], given["codes"]
    names = {}
    exec(codes["langchain"], names)
    langchain = names["embeddings"]
    exec(codes["llama-index"], names)
    llama_index = names["embeddings"]
    exec(codes["haystack"], names)
    answer = names["document_embedder"].run([Document(content=each) for each in documents])["documents"]
    found = {
        "langchain-query": [langchain.embed_query(each) for each in queries],
        "langchain-document": langchain.embed_documents(documents),
        "llama-index-query": [llama_index.get_query_embedding(each) for each in queries],
        "llama-index-document": llama_index.get_text_embedding_batch(documents),
        "haystack-query": [names["query_embedder"].run(each)["embedding"] for each in queries],
        "haystack-document": [each.embedding for each in answer],
    }
    np.savez(Path(folder, "found.npz"), **{name: np.array(rows) for name, rows in found.items()})


if __name__ == "__main__":
    {"backend": backend, "server": server, "libraries": libraries}[sys.argv[1]](*sys.argv[2:])
