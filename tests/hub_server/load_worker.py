"""Loads a model, and a dataset if one is named, from the Hub of the environment, and saves what they say.

``load_worker.py OUTPUT MODEL REVISION [DATASET CONFIGURATION]`` writes ``OUTPUT`` (npz): ``sentences`` (embeddings by
sentence-transformers), ``transformers`` (last hidden states of the first text with the remote code), ``rows``.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

TEXTS = ["Where do giant pandas live?", "Панды живут в бамбуковых лесах."]

if __name__ == "__main__":
    output, model, revision, *dataset = sys.argv[1:]
    saved = {"sentences": SentenceTransformer(model, revision=revision, device="cpu").encode(TEXTS)}
    remote = AutoModel.from_pretrained(model, revision=revision, trust_remote_code=True, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(model, revision=revision)(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        saved["transformers"] = remote(**tokens).last_hidden_state.numpy()
    saved["code"] = np.array(type(remote).__module__)
    if dataset:
        from datasets import load_dataset

        rows = list(load_dataset(*dataset, split="train"))
        assert list(load_dataset(*dataset, split="train", streaming=True)) == rows
        saved["rows"] = np.array(json.dumps(rows, ensure_ascii=False))
    np.savez(output, **saved)
