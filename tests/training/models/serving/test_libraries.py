"""The card's examples for LangChain, LlamaIndex and Haystack, in their environment: ``--rag-python``."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from hub_cards.snippets import snippets
from tests.training.models.serving.conftest import other_environment
from tests.training.publishing.releases import make_release, write_release
from training.publishing.card import model_card

_SCRIPT = Path(__file__).with_name("embed_libraries.py")


@pytest.mark.slow
@pytest.mark.parametrize("document_prompt", ["", "Title: "])
def test_the_examples_embed_as_sentence_transformers_does(
    document_prompt: str, served: Path, sentences: list[str], tmp_path: Path, other_python: Callable[[str], str]
) -> None:
    python = other_python("rag-python")
    model = SentenceTransformer(str(served), device="cpu")
    model.prompts = {"query": "Instruct: Find it.\nQuery: ", "document": document_prompt}
    model.save_pretrained(str(served), create_model_card=False)
    write_release(tmp_path / "release", make_release(prompts=model.prompts), losses=False)
    codes = snippets(model_card(tmp_path / "release", str(served)), "library")
    given = {"queries": sentences[:4], "documents": sentences, "codes": codes}
    (tmp_path / "given.json").write_text(json.dumps(given), encoding="utf-8")
    command = [python, "-I", str(_SCRIPT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=other_environment())
    assert done.returncode == 0, done.stderr[-2000:]
    expected = {"query": model.encode_query(sentences[:4]), "document": model.encode_document(sentences)}
    with np.load(tmp_path / "found.npz") as found:
        assert len(found) == 6
        for name, vectors in found.items():
            assert (vectors * expected[name.rsplit("-", 1)[1]]).sum(axis=1).min() > 0.999999, name
