"""Keyed draws: the published generator, broadcast, and without relation between neighbouring keys."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from training.common import keyed
from training.common.keyed import keyed_bits, keyed_uniform, text_key


def test_values_are_pinned():
    # The first output of the reference implementation of SplitMix64, seeded with the key.
    assert int(keyed_bits(0)) == 0xE220A8397B1DCDAF
    assert int(keyed_bits(1234567)) == 6457827717110365317
    assert int(keyed_bits(1, 2, 3)) == 15020427595393229491
    assert float(keyed_uniform(0)) == 0.8833108082136426
    assert text_key("a") == 3405396810240292928
    assert text_key("größer 東京") == 7071441964925215103
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert int(keyed_bits(-1)) == int(keyed_bits(2**64 - 1)) == 16490336266968443936


@pytest.mark.parametrize("other", [(1, 7), (0, 8), (7, 0), (0, 7, 0), (0,)])
def test_each_key_and_its_place_count(other):
    one, two = keyed_bits(0, 7, np.arange(1000)), keyed_bits(*other, np.arange(1000))
    # Half of the 64 bits differ if the two are unrelated.
    assert 31 < np.unpackbits((one ^ two).view(np.uint8)).sum() / 1000 < 33


def test_grid_of_keys_has_no_collision():
    draws = keyed_bits(np.arange(64)[:, None, None], np.arange(64)[:, None], np.arange(64))
    assert len(np.unique(draws)) == 64**3
    draws = keyed_uniform(3, np.arange(300)[:, None], np.arange(300))
    assert draws.dtype == np.float64 and draws.min() >= 0 and draws.max() < 1 and abs(draws.mean() - 0.5) < 0.01
    assert len({text_key(text) for text in ["", " ", "a", "A", "ä", "a\u0308", *map(str, range(1000))]}) == 1006


def test_arrays_broadcast_and_equal_single_draws():
    rows, columns = np.array([[5], [-6], [2**62]]), np.array([1, 2, 3, 4], dtype=np.int32)
    draws = keyed_bits(9, rows, columns)
    assert draws.dtype == np.uint64 and draws.shape == (3, 4)
    singly = [[keyed_bits(9, int(row), int(column)) for column in columns] for row in rows[:, 0]]
    assert draws.tolist() == np.array(singly).tolist()


@pytest.mark.parametrize("distinct", [2**64, 100, 1])
@pytest.mark.parametrize("rows", [0, 1, 5, 64, 300])
def test_order_is_a_stable_argsort_of_the_draws_also_of_equal_ones(rows, distinct, monkeypatch):
    # Blocks of 64 rows; draws that differ in low bits only, which the packed numbers replace.
    monkeypatch.setattr(keyed, "_BLOCK_ROWS", 64)
    monkeypatch.setattr(keyed, "keyed_bits", draw := lambda *keys: keyed_bits(*keys) % np.uint64(distinct - 1 or 1))
    order = keyed.keyed_order(rows, 7, 3)
    assert order.dtype == np.uint32
    assert order.tolist() == np.argsort(draw(7, 3, np.arange(rows)), kind="stable").tolist()
