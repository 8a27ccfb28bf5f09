from __future__ import annotations

import numpy as np
import pytest

from modeling_f2llm import build_sentence_transformer
from training.examples.two_step_search import compare, main, read_texts

pytest.importorskip("faiss")


def _embeddings(rows, width=32, seed=0, offset=0.0):
    """Unit vectors whose leading dimensions carry most, as in a matryoshka model."""
    drawn = np.random.default_rng(seed).normal(size=(rows, width)) / np.arange(1, width + 1)
    drawn = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    drawn += offset * np.random.default_rng(1).normal(size=width)
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def test_ways_to_search_are_measured_by_the_exact_one(refuses):
    texts, queries = _embeddings(400), _embeddings(50, seed=1)
    ways = {way.name: way for way in compare(texts, queries, short=8, shortlist=400)}
    assert ways["32 × float32, exact"].recall == 1
    sizes = {"32 × float32, exact": 32 * 4, "8 × float32": 8 * 4, "32 × int8": 32, "8 × int8": 8, "32 × binary": 4}
    assert {name: ways[name].index_bytes for name in sizes} == {name: size * 400 for name, size in sizes.items()}
    # A shortlist of all texts, ranked by the full vectors, is exact search.
    assert all(way.recall == 1 for name, way in ways.items() if name.endswith("then full"))
    assert ways["8 × binary"].recall < ways["8 × float32"].recall < 1 and 0.9 < ways["32 × int8"].recall
    # Far from the origin, as embeddings are, int8 would find 0.95 by the inner product.
    far = _embeddings(2000, offset=0.2), _embeddings(100, seed=2, offset=0.2)
    assert {way.name: way.recall for way in compare(*far, short=8, shortlist=100)}["32 × int8"] > 0.975
    shortened = {way.name: way for way in compare(texts, queries, short=8, shortlist=40)}
    assert ways["8 × binary"].recall < shortened["8 × binary, then full"].recall < 1
    for short, shortlist, part in ((12, 100, "--short 12"), (64, 100, "--short 64"), (8, 9, "--shortlist 9")):
        with refuses(part):
            list(compare(texts, queries, short, shortlist))


def test_texts_are_distinct_and_too_many_or_a_missing_package_are_refused(refuses, monkeypatch):
    texts, queries = read_texts(300, 20)
    assert (len(texts), len(queries), len({*texts, *queries})) == (300, 20, 320)
    with refuses("--texts", "1000000"):
        read_texts(1_000_000, 1)
    monkeypatch.setattr("training.examples.two_step_search.find_spec", lambda name: None)
    with refuses("pip install 'f2llm[mine]'"):
        list(compare(_embeddings(200), _embeddings(5), 8, 100))


def test_the_command_prints_a_table(tmp_path, capsys, tiny_model, tiny_tokenizer):
    build_sentence_transformer(tiny_model, tiny_tokenizer).save_pretrained(str(tmp_path / "model"))
    words = ["--texts", "200", "--queries", "10", "--shortlist", "50"]
    assert main([str(tmp_path / "model"), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| search |") and len(lines) == 2 + 11
    # The model is narrower than the usual short vectors.
    assert any(line.startswith("| 32 × binary, then full |") for line in lines)
    assert main([str(tmp_path / "model"), *words, "--short", "64"]) == 2
    assert "--short 64: give a multiple of 8 up to the model's width, 32" in capsys.readouterr().err
