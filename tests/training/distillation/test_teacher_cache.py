"""The teacher's cache: its embeddings in float16, whole or absent, never another teacher's or another text's."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

from training.distillation import teacher_cache
from training.distillation.teacher_cache import TeacherCache

WIDTH = 6
MADE_BY = {"teacher": "abc", "precision": "fp32", "reads": "tokens"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(teacher_cache, "_SHARD_TEXTS", 20)


@pytest.fixture
def opened(tmp_path, prepared_sources):
    def make(folder=tmp_path, sources=prepared_sources, **changed):
        return TeacherCache(folder, sources, {**MADE_BY, **changed}, WIDTH)

    return make


@pytest.fixture
def cache(opened):
    filled = opened()
    filled.fill(expected)
    return filled


def expected(source, positions):
    """Numbers that identify source and text."""
    first = torch.from_numpy(np.asarray(positions, dtype=np.float32))[:, None]
    return first + torch.arange(WIDTH) / 8 + len(source.name) * 100


@pytest.mark.parametrize("share", [0.5, 0])
def test_it_gives_the_teachers_embeddings_and_is_found_again(cache, opened, prepared_sources, monkeypatch, share):
    # Also page by page, as if it were larger than the memory.
    monkeypatch.setattr(teacher_cache, "_MEMORY_SHARE", share)
    cache = opened()
    some = [cache, opened(), opened(sources=prepared_sources[:1]), pickle.loads(pickle.dumps(opened()))]
    assert all(each.whole for each in some)
    for source in prepared_sources:
        positions = np.arange(source.description["texts"])[::-3]
        found = cache.read(source.name, positions, 4)
        assert found.dtype == np.float16
        wanted = expected(source, positions)[:, :4].numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-3)
    for each in some:
        np.testing.assert_array_equal(each.read("qa", np.arange(9), 6), cache.read("qa", np.arange(9), 6))


@pytest.mark.parametrize("changed", [{"teacher": "other"}, {"precision": "bf16"}, {"reads": {"query_template": "q"}}])
def test_another_teacher_or_source_shares_no_embedding(cache, opened, prepared_sources, monkeypatch, changed):
    other = opened(**changed)
    assert not other.whole
    other.fill(lambda source, positions: expected(source, positions) + 1)
    assert cache.read("qa", np.arange(1), 1)[0] + 1 == other.read("qa", np.arange(1), 1)[0]
    monkeypatch.setitem(prepared_sources[0].description, "fingerprint", "of other data")
    assert not opened(sources=prepared_sources[:1]).whole


def test_a_killed_pass_continues_with_the_missing_shards(opened, tmp_path):
    cache, asked = opened(), []

    def embed(source, positions):
        asked.append((source.name, int(positions[0])))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return expected(source, positions)

    with pytest.raises(KeyboardInterrupt):
        cache.fill(embed)
    assert not cache.whole
    cache.fill(embed)
    assert cache.whole
    # Only the interrupted shard was embedded twice.
    assert len(asked) == len(set(asked)) + 1
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("value", [1e5, float("nan")])
def test_embeddings_that_do_not_fit_are_refused(opened, refuses, value):
    with refuses("'qa'", "do not fit float16", "teacher_cache_dir"):
        opened().fill(lambda source, positions: torch.full((len(positions), WIDTH), value))


@pytest.mark.parametrize("name", ["00001.float16", "00001.float16.xxh3", "cut"])
def test_damaged_shards_are_noticed(cache, opened, tmp_path, refuses, name):
    cache.check()
    shard = next(tmp_path.glob("qa-*/00001.float16"))
    path = shard if name == "cut" else shard.with_name(name)
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content[:-2] if name == "cut" else content)
    with refuses(shard, "is damaged", "delete it, and it is computed again"):
        opened().check()
    # As the message says.
    shard.unlink()
    again = opened()
    again.fill(expected)
    again.check()


@pytest.mark.parametrize("limit", [64, 1])
def test_a_check_reads_a_bounded_amount(cache, prepared_sources, monkeypatch, limit):
    asked = []
    monkeypatch.setattr(teacher_cache, "check_file", lambda path, remedy, most_blocks: asked.append(most_blocks))
    monkeypatch.setattr(teacher_cache, "_CHECKED_BLOCKS", limit)
    cache.check()
    shards = len(asked)
    assert min(asked) >= 1 and sum(asked) <= max(limit * len(prepared_sources), len(asked)) and max(asked) <= limit
    for rank in range(3):
        cache.check(rank, 3)
    assert len(asked) == 2 * shards and sum(asked[:shards]) == sum(asked[shards:])


@pytest.mark.parametrize("attempt", range(20))
def test_runs_may_fill_one_folder_at_once(opened, tmp_path, attempt):
    start, asked = Barrier(4), []

    def embed(source, positions):
        asked.append((source.name, int(positions[0])))
        return expected(source, positions)

    def fill(rank):
        cache = opened()
        start.wait()
        # Two runs of two processes each.
        cache.fill(embed, rank % 2, 2)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, range(4)))
    # One waits for the other instead of repeating its work.
    assert opened().whole and len(asked) == len(set(asked))
    assert not list(tmp_path.rglob("*.partial"))
