"""Embeddings come back under their text's id, and under nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.data.mining.embedding_cache import EmbeddingCache
from training.data.mining.text_ids import distinct, find, text_ids
from training.data.mining.text_store import TextStore

WORDS = [f"word {number}" for number in range(100)]


def test_ids_are_stable_and_distinct() -> None:
    ids = text_ids([*WORDS, "word 3"])
    assert ids.tobytes()[:4].hex() == "9f2cd654"
    unique, numbers, first = distinct(ids)
    assert (unique == ids[:100]).all() and numbers.tolist() == [*range(100), 3] and first.tolist() == list(range(100))


def test_find() -> None:
    ids = np.sort(text_ids(WORDS))
    wanted = text_ids(["word 7", "no word", "word 9"])
    at = find(wanted, ids)
    assert at[1] == -1 and (ids[at[[0, 2]]] == wanted[[0, 2]]).all()
    assert find(wanted, ids[:0]).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("half", [False, True])
def test_round_trip_over_several_files(tmp_path: Path, half: bool) -> None:
    ids = text_ids(WORDS)
    vectors = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
    cache = EmbeddingCache(tmp_path, {"model": "a"}, half)
    for part in (slice(0, 40), slice(40, 41), slice(60, 100)):
        cache.add(ids[part], vectors[part])
    again = EmbeddingCache(tmp_path, {"model": "a"}, half)
    assert np.flatnonzero(again.locate(ids).file < 0).tolist() == list(range(41, 60))
    shuffled = np.random.default_rng(1).permutation(np.r_[0:41, 60:100])
    found = again.read(again.locate(ids[shuffled]))
    np.testing.assert_array_equal(found, vectors[shuffled].astype(np.float16 if half else np.float32))
    assert found.dtype == np.float32


def test_anything_else_that_made_them_is_another_cache(tmp_path: Path) -> None:
    ids = text_ids(WORDS)
    EmbeddingCache(tmp_path, {"model": "a", "prompt": None}).add(ids, np.ones((100, 2)))
    for made_by, half in [({"model": "b", "prompt": None}, False), ({"model": "a", "prompt": ""}, False)]:
        assert (EmbeddingCache(tmp_path, made_by, half).locate(ids).file < 0).all()
    assert (EmbeddingCache(tmp_path, {"model": "a", "prompt": None}, True).locate(ids).file < 0).all()
    assert (EmbeddingCache(tmp_path, {"prompt": None, "model": "a"}).locate(ids).file >= 0).all()


def test_partial_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, ids = EmbeddingCache(tmp_path, {}), text_ids(WORDS)

    def fail(handle, array) -> None:
        handle.write(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(np, "save", fail)
        cache.add(ids, np.ones((100, 2)))
    assert (cache.locate(ids).file < 0).all()
    assert [path.name for path in cache.folder.iterdir()] == ["embeddings.json"]


@pytest.mark.parametrize("end", [".vectors.npy", ".keys.npy", ".vectors.npy.xxh3"])
def test_flipped_bytes_are_noticed(tmp_path: Path, refuses, end: str) -> None:
    cache, ids = EmbeddingCache(tmp_path, {}), text_ids(WORDS)
    cache.add(ids, np.ones((100, 2)))
    (path,) = cache.folder.glob(f"*{end}")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with refuses(cache.folder, "is damaged", "delete it and its .keys.npy, and the texts are embedded again"):
        cache.read(cache.locate(ids))
    # As the message says.
    next(cache.folder.glob("*.vectors.npy")).unlink()
    next(cache.folder.glob("*.keys.npy")).unlink()
    assert (cache.locate(ids).file < 0).all()
    cache.add(ids, np.ones((100, 2)))
    assert (cache.read(cache.locate(ids)) == 1).all()


def test_files_without_checksums_are_written_again(tmp_path: Path) -> None:
    cache, ids = EmbeddingCache(tmp_path, {}), text_ids(WORDS)
    cache.add(ids, np.ones((100, 2)))
    next(cache.folder.glob("*.xxh3")).unlink()
    assert (cache.locate(ids).file < 0).all()


def test_what_a_killed_task_left_is_cleared(tmp_path: Path) -> None:
    cache, ids = EmbeddingCache(tmp_path, {}), text_ids(WORDS)
    cache.add(ids, np.ones((100, 2)))
    files = sorted(path.name for path in cache.folder.iterdir())
    for name in files[1:]:
        path = cache.folder / name
        path.rename(path.with_name(f".{name}.partial"))
    cache.add(ids, np.ones((100, 2)))
    assert sorted(path.name for path in cache.folder.iterdir() if path.name.endswith(".npy")) == [
        name for name in files if name.endswith(".npy")
    ]


def test_a_finished_cache_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = text_ids(WORDS)
    EmbeddingCache(tmp_path, {}).add(ids, np.ones((100, 2)))

    def fails(*_: object) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(EmbeddingCache, "_write", fails)
    again = EmbeddingCache(tmp_path, {})
    assert (again.read(again.locate(ids)) == 1).all()


def test_texts_that_changed_are_noticed(tmp_path: Path, refuses) -> None:
    path = tmp_path / "query.arrow"
    TextStore.write(path, WORDS)
    assert TextStore(path).take(np.array([3])).tolist() == ["word 3"]
    content = path.read_bytes()
    path.write_bytes(content.replace(b"word 3", b"word X"))
    with refuses(path, "is damaged", f"delete {tmp_path}, and it is mined again"):
        TextStore(path)


def test_folder_that_cannot_be_written(tmp_path: Path, refuses) -> None:
    (tmp_path / "file").touch()
    with refuses(tmp_path / "file", "--cache"):
        EmbeddingCache(tmp_path / "file", {})
