"""The teacher's cache: its embeddings in float16, whole or absent, never another teacher's or another text's."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from torch import Tensor

from training.data.prepared import PreparedSource
from training.distillation import teacher_cache
from training.distillation.teacher_cache import Embed, TeacherCache

WIDTH = 6
MADE_BY = {"teacher": "abc", "precision": "fp32", "reads": "tokens"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(teacher_cache, "_SHARD_TEXTS", 20)


def expected(source: PreparedSource, positions: np.ndarray) -> Tensor:
    """Return numbers that identify source and text."""
    first = torch.from_numpy(np.asarray(positions, dtype=np.float32))[:, None]
    return first + torch.arange(WIDTH) / 8 + len(source.name) * 100


@pytest.fixture
def cache(tmp_path, prepared_sources):
    filled = TeacherCache(tmp_path, prepared_sources, MADE_BY, WIDTH)
    filled.fill(expected)
    return filled


def test_it_gives_the_teachers_embeddings(cache, prepared_sources):
    assert cache.whole
    for source in prepared_sources:
        positions = np.arange(source.description["texts"])[::-3]
        found = cache.read(source.name, positions, 4)
        assert found.dtype == np.float16
        torch.testing.assert_close(
            torch.from_numpy(found).float(), expected(source, positions)[:, :4], rtol=1e-3, atol=0
        )


def test_it_is_found_again_without_the_teacher(cache, tmp_path, prepared_sources):
    found = TeacherCache(tmp_path, prepared_sources, MADE_BY)
    assert found.whole and found.width == WIDTH
    some = [TeacherCache(tmp_path, prepared_sources[:1], MADE_BY), pickle.loads(pickle.dumps(found))]
    for each in some:
        np.testing.assert_array_equal(each.read("qa", np.arange(9), 6), cache.read("qa", np.arange(9), 6))


@pytest.mark.parametrize("changed", [{"teacher": "other"}, {"precision": "bf16"}, {"reads": {"query_template": "q"}}])
def test_another_teacher_or_source_shares_the_folder_but_no_embedding(
    cache, tmp_path, prepared_sources, monkeypatch, changed
):
    other = TeacherCache(tmp_path, prepared_sources, {**MADE_BY, **changed}, WIDTH)
    assert not other.whole
    other.fill(lambda source, positions: expected(source, positions) + 1)
    assert cache.read("qa", np.arange(1), 1)[0] + 1 == other.read("qa", np.arange(1), 1)[0]
    monkeypatch.setitem(prepared_sources[0].description, "fingerprint", "of other data")
    assert not TeacherCache(tmp_path, prepared_sources[:1], MADE_BY, WIDTH).whole


def test_a_killed_pass_continues_with_the_missing_shards(tmp_path, prepared_sources):
    cache = TeacherCache(tmp_path, prepared_sources, MADE_BY, WIDTH)
    asked = []

    def embed(source: PreparedSource, positions: np.ndarray) -> Tensor:
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


@pytest.mark.parametrize("value", [1e5, float("nan"), float("inf")])
def test_embeddings_that_do_not_fit_are_refused(tmp_path, prepared_sources, refuses, value):
    cache = TeacherCache(tmp_path, prepared_sources, MADE_BY, WIDTH)
    with refuses("'qa'", "do not fit float16", "teacher_cache_dir"):
        cache.fill(lambda source, positions: torch.full((len(positions), WIDTH), value))


def test_a_cut_shard_is_noticed(cache, tmp_path, prepared_sources, refuses):
    shard = next(tmp_path.glob("qa-*/00001.float16"))
    shard.write_bytes(shard.read_bytes()[:-2])
    with refuses(shard, "is damaged", "delete it"):
        _ = TeacherCache(tmp_path, prepared_sources, MADE_BY).whole


@pytest.mark.parametrize("name", ["00001.float16", "00001.float16.xxh3"])
def test_flipped_bytes_are_noticed(cache, tmp_path, prepared_sources, refuses, name):
    cache.check()
    path = next(tmp_path.glob(f"qa-*/{name}"))
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    shard = path.with_name("00001.float16")
    with refuses(shard, "is damaged", "delete it, and it is computed again"):
        TeacherCache(tmp_path, prepared_sources, MADE_BY).check()
    # As the message says.
    shard.unlink()
    again = TeacherCache(tmp_path, prepared_sources, MADE_BY)
    again.fill(expected)
    again.check()


def test_a_check_reads_a_bounded_amount(cache, prepared_sources, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(teacher_cache, "check_file", lambda path, remedy, most_blocks: asked.append(most_blocks))
    shards = len(list(cache._shards()))
    for limit, most in ((64, 64 * len(prepared_sources)), (1, shards)):
        asked.clear()
        monkeypatch.setattr(teacher_cache, "_CHECKED_BLOCKS", limit)
        cache.check()
        assert len(asked) == shards and sum(asked) <= most and min(asked) >= 1


@pytest.mark.parametrize("content", ["{", "{}", json.dumps({**MADE_BY, "width": 6}), "another teacher"])
def test_a_damaged_description_is_noticed(cache, tmp_path, prepared_sources, refuses, content):
    path = next(tmp_path.glob("qa-*/cache.json"))
    with refuses(tmp_path, "of 6 dimensions, not 7"):
        TeacherCache(tmp_path, prepared_sources, MADE_BY, 7)
    if content == "another teacher":
        content = json.dumps({**json.loads(path.read_text()), "teacher": content})
    path.write_text(content)
    for width in (None, WIDTH):
        with refuses(path, "is damaged"):
            TeacherCache(tmp_path, prepared_sources, MADE_BY, width)


def test_runs_may_fill_one_folder_at_once(tmp_path, prepared_sources):
    for number in range(20):
        folder, start = tmp_path / str(number), Barrier(4)
        asked: list[tuple[str, int]] = []

        def embed(source: PreparedSource, positions: np.ndarray, asked: list[tuple[str, int]] = asked) -> Tensor:
            asked.append((source.name, int(positions[0])))
            return expected(source, positions)

        def fill(rank: int, folder: Path = folder, start: Barrier = start, embed: Embed = embed) -> None:
            cache = TeacherCache(folder, prepared_sources, MADE_BY, WIDTH)
            start.wait()
            # Two runs of two processes each.
            cache.fill(embed, rank % 2, 2)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(fill, range(4)))
        assert TeacherCache(folder, prepared_sources, MADE_BY).whole
        # One waits for the other instead of repeating its work.
        assert len(asked) == len(set(asked))
        assert not list(folder.rglob("*.partial"))
