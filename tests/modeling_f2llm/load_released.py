"""Loads a released folder with stock libraries only and writes down what they computed.

Usage: ``python load_released.py RELEASED_FOLDER OUTPUT_FOLDER`` with ``texts.json`` in the output folder.
"""

# ruff: noqa: E402

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.modules["modeling_f2llm"] = None  # from here on, importing the package is an ImportError

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

released, output = map(Path, sys.argv[1:])
texts = json.loads((output / "texts.json").read_text())
arrays, facts = {}, {}
torch.set_num_threads(1)

for name, arguments in {
    "st": {},
    "st_truncated": {"truncate_dim": 8},
    "st_remote": {"trust_remote_code": True},
}.items():
    model = SentenceTransformer(str(released), device="cpu", **arguments)
    facts[f"{name}_class"] = type(model[0].auto_model).__name__
    facts[f"{name}_modules"] = [type(module).__module__.split(".")[0] for module in model]
    arrays[f"{name}_query"] = model.encode_query(texts)
    arrays[f"{name}_document"] = model.encode_document(texts)

batch = AutoTokenizer.from_pretrained(released)(texts, padding=True, return_tensors="pt")
resaved = output / "resaved"


@torch.no_grad()
def keep(name, model):
    hidden = model.eval()(**batch).last_hidden_state
    arrays[f"{name}_hidden"] = (hidden * batch.attention_mask[..., None]).numpy()
    facts[f"{name}_class"] = type(model).__name__
    facts[f"{name}_is_padding_zero"] = not hidden[batch.attention_mask == 0].any().item()
    facts[f"{name}_package"] = type(model).__module__.split(".")[0]


keep("stock", AutoModel.from_pretrained(released))
remote = AutoModel.from_pretrained(released, trust_remote_code=True)
keep("remote", remote)
remote.save_pretrained(resaved)
keep("resaved_stock", AutoModel.from_pretrained(resaved))
keep("resaved_remote", AutoModel.from_pretrained(resaved, trust_remote_code=True))

facts["resaved_files"] = sorted(path.name for path in resaved.iterdir())
facts["config_class"] = type(remote.config).__name__
assert sys.modules["modeling_f2llm"] is None
np.savez(output / "arrays.npz", **arrays)
(output / "facts.json").write_text(json.dumps(facts))
