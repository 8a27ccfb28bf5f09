"""Texts and embeddings on disk come back under their ids, and damaged files are noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.data.mining.corpus import EmbeddingCache, TextStore, find, numbered, text_ids

WORDS = [f"word {number}" for number in range(100)]
IDS = text_ids(WORDS)


@pytest.fixture
def cache(tmp_path):
    cache = EmbeddingCache(tmp_path, {})
    cache.add(IDS, np.ones((100, 2)))
    return cache


def test_ids_are_stable_and_changed_texts_are_noticed(tmp_path, refuses):
    ids = text_ids([*WORDS, "word 3"])
    assert ids.tobytes()[:4].hex() == "9f2cd654"
    unique, numbers, first = numbered(ids)
    assert (unique == ids[:100]).all() and numbers.tolist() == [*range(100), 3] and first.tolist() == list(range(100))
    known, wanted = np.sort(IDS), text_ids(["word 7", "no word", "word 9"])
    at = find(wanted, known)
    assert at[1] == -1 and (known[at[[0, 2]]] == wanted[[0, 2]]).all()
    assert find(wanted, known[:0]).tolist() == [-1, -1, -1]
    path = tmp_path / "query.arrow"
    TextStore.write(path, iter(WORDS))
    assert TextStore(path).take(np.array([[3, -1], [99, 3]])).tolist() == [["word 3", None], ["word 99", "word 3"]]
    path.write_bytes(path.read_bytes().replace(b"word 3", b"word X"))
    with refuses(path, "is damaged", f"delete {tmp_path}, and it is mined again"):
        TextStore(path)


def test_round_trip_over_several_files(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
    cache = EmbeddingCache(tmp_path, {"model": "a"})
    for part in (slice(0, 40), slice(40, 41), slice(60, 100)):
        cache.add(IDS[part], vectors[part])
    again = EmbeddingCache(tmp_path, {"model": "a"})
    assert np.flatnonzero(again.locate(IDS).file < 0).tolist() == list(range(41, 60))
    shuffled = np.random.default_rng(1).permutation(np.r_[0:41, 60:100])
    found = again.locate(IDS[shuffled])
    np.testing.assert_array_equal(found.read(), vectors[shuffled])
    np.testing.assert_array_equal(found.read(5, 30), found.read()[5:30])
    assert found.read().dtype == np.float32


@pytest.mark.parametrize("part", [IDS[50], np.ones(3, dtype=np.float32)])
def test_flipped_bytes_are_noticed(cache, refuses, part):
    (path,) = cache.folder.glob("*.npz")
    content = bytearray(path.read_bytes())
    content[content.index(part.tobytes())] ^= 1
    path.write_bytes(content)
    with refuses(path, "is damaged", "delete it"):
        cache.locate(IDS).read()
    # As the message says.
    path.unlink()
    assert (cache.locate(IDS).file < 0).all()


def test_a_finished_cache_is_not_written(cache, monkeypatch):
    def fails(*_, **__):
        raise OSError("read-only")

    monkeypatch.setattr(Path, "mkdir", fails)
    monkeypatch.setattr("training.data.mining.corpus.locked", fails)
    assert (EmbeddingCache(cache.folder.parent, {}).locate(IDS).read() == 1).all()
