"""Weights of sources and ``source_temperature``: what an epoch takes of each, without state, exact on resume."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict

import numpy as np
import pytest
import yaml

from tests.training.recipes import error_of, killed, last_checkpoint, state_of, write_single_stage
from training.common.keyed import keyed_bits
from training.config.recipe import load_recipe
from training.planning.batches import SourceSizes, estimate_batches
from training.planning.plan import make_plan
from training.run_stage import main
from training.trainer.batches import (
    _BATCH_ORDER,
    _ROW_ORDER,
    GlobalBatchSampler,
    RowKey,
    epoch_batches,
    epoch_line,
)

ROWS = [400, 70, 0, 1, 33]
WEIGHTS = {"tiny_retrieval": 0.6, "tiny_clustering": 2}


def batches(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return list(map(list, sampler))


def epoch_today(rows, size, seed, epoch):
    """The order of an epoch before sources had weights."""
    counts = [-(-each // size) for each in rows]
    cut = [(source, each) for source, count in enumerate(counts) for each in range(count)]
    orders = [np.argsort(keyed_bits(seed, _ROW_ORDER, epoch, n, np.arange(each))) for n, each in enumerate(rows)]
    for index in np.argsort(keyed_bits(seed, _BATCH_ORDER, epoch, np.arange(len(cut)))):
        (source, number), count = cut[index], counts[cut[index][0]]
        start, end = (each * rows[source] // count for each in (number, number + 1))
        yield [RowKey(epoch, source, int(row)) for row in orders[source][start:end]]


@pytest.mark.parametrize("weights", [None, [3] * 5, [0.1] * 5])
@pytest.mark.parametrize("epoch", [0, 2])
def test_equal_weights_and_a_temperature_of_1_change_nothing(weights, epoch):
    sampler = GlobalBatchSampler(ROWS, 8, 5, weights)
    assert batches(sampler, epoch) == list(epoch_today(ROWS, 8, 5, epoch))
    assert epoch_line(sampler, "abcde") is None


@pytest.mark.parametrize(
    ("weights", "temperature"), [([1, 2.5, 1, 9, 1], 1), (None, 3.3), (None, 0.7), ([0.01, 1, 1, 1, 30], 2)]
)
def test_shares_are_as_asked_and_every_pass_visits_every_row_once(weights, temperature):
    sampler, epochs = GlobalBatchSampler(ROWS, 8, 5, weights, temperature), 60
    visits, sizes, drawn = defaultdict(Counter), defaultdict(set), Counter()
    for epoch in range(epochs):
        order = batches(sampler, epoch)
        assert len(order) == len(sampler)
        for batch in order:
            assert len({key[:2] for key in batch}) == 1
            sizes[batch[0].source].add(len(batch))
            drawn[batch[0].source] += 1
            visits[batch[0][:2][::-1]].update(key.row for key in batch)
    assert {source for source, _ in visits} == {0, 1, 3, 4}
    for source in (0, 1, 3, 4):
        assert max(sizes[source]) <= min(8, min(sizes[source]) + 1)
        turns = sorted(turn for each, turn in visits if each == source)
        assert turns == list(range(len(turns)))
        # All but the last pass are whole, and no row is visited twice in one.
        assert all(len(visits[source, turn]) == ROWS[source] for turn in turns[:-1])
        assert all(set(visits[source, turn].values()) == {1} for turn in turns)
    # At least one batch; what is above is exact over epochs, not rounded in each.
    _, shares = epoch_batches(ROWS, 8, weights, temperature)
    assert all(abs(drawn[source] - epochs * share) <= 3 for source, share in enumerate(shares))
    asked = np.array(weights or [1] * 5) * np.array(ROWS) ** (1 / temperature)
    batches_asked = asked / asked.sum() * sum(ROWS) / np.maximum(ROWS, 1) * np.ceil(np.array(ROWS) / 8)
    more = batches_asked > 1
    assert np.allclose(shares[more] / shares[0], batches_asked[more] / batches_asked[0], rtol=1e-5) or not more[0]
    assert (shares[~more] <= 1.1).all() and len(sampler) == round(shares.sum())


def test_an_epoch_is_a_function_of_its_number_and_passes_differ():
    weights = [1, 7, 1, 1, 0.1]
    used, fresh = (GlobalBatchSampler(ROWS, 8, 5, weights) for _ in range(2))
    for epoch in (2, 0, 1):
        batches(used, epoch)
    assert batches(used, 3) == batches(fresh, 3)
    small = [[key.row for key in batch] for batch in batches(fresh, 3) if batch[0].source == 1]
    assert len(set(map(tuple, small))) == len(small) > 9
    # A source that gives few batches an epoch goes on where the last epoch ended.
    few = [key for epoch in range(9) for batch in batches(fresh, epoch) for key in batch if key.source == 4]
    assert sorted(key.row for key in few if key.epoch == 0) == list(range(33)) and few[-1].epoch == 1


@pytest.mark.parametrize("temperature", [0.001, 1, 5, 1e9])
@pytest.mark.parametrize("weights", [[1e-300, 1, 1], [1e300, 1, 1e-9]])
def test_extreme_weights_leave_every_source_in_and_the_epoch_bounded(temperature, weights):
    counts, shares = epoch_batches([10**7, 5, 0], 512, weights, temperature)
    assert counts.tolist() == [19532, 1, 0] and shares[2] == 0
    assert (shares[:2] >= 1).all() and shares[0] <= 19533 and shares[1] <= 10**7


def test_many_sources_are_summed_up():
    few = epoch_line(GlobalBatchSampler([64, 8], 8, 0, [1, 16]), ["a", "b"])
    assert few == "an epoch is 9 batches of 2 sources: b 6 (6 passes over its rows), a 3 (0.375 passes over its rows)"
    many = epoch_line(GlobalBatchSampler([64, *[8] * 9], 8, 0, [8, *[1] * 9]), "abcdefghij")
    assert "of 10 sources: from a 15 (1.87 passes over its rows) down to b 1" in many and len(many) < 150


def _stage(folder, weights=None, **keys):
    """A stage of all three sources, some of them weighted."""
    recipe = write_single_stage(folder, task_types=None, save_steps=2, **{"num_train_epochs": 2, **keys})
    manifest = folder / "data/manifest.yaml"
    content = yaml.safe_load(manifest.read_text())
    for source in content["sources"]:
        source.update({"weight": weights[source["name"]]} if source["name"] in (weights or {}) else {})
    manifest.write_text(yaml.safe_dump(content))
    return recipe


def test_a_run_resumed_in_an_epoch_is_the_uninterrupted_one_and_its_plan(tmp_path, caplog, check_same_weights, capsys):
    caplog.set_level(logging.INFO)
    recipe = _stage(tmp_path / "a", WEIGHTS, source_temperature=2)
    plan = make_plan(load_recipe(recipe).stages[0], {})
    assert main([str(recipe)]) == 0
    steps = state_of(tmp_path / "a/run")["global_step"]
    # 72 rows of each: shares of 0.6, 2 and 1 of 216 rows.
    line = "an epoch is 15 batches of 3 sources: tiny_clustering 8.3 (1.67 passes over its rows), tiny_classification"
    assert line in caplog.text and caplog.text.count("an epoch is") == 1
    assert (plan.steps, plan.training.count) == (steps, steps // 2) == (30, 15)
    again = _stage(tmp_path / "b", WEIGHTS, source_temperature=2)
    # In the second epoch.
    killed(again, 21)
    assert "checkpoint-20" in str(last_checkpoint(tmp_path / "b/run"))
    words = [again, "--resume"]
    assert "(source_temperature: 2 → '3')" in error_of([*words, "--source_temperature", "3"], capsys)
    _stage(tmp_path / "b", {**WEIGHTS, "tiny_retrieval": 1}, source_temperature=2)
    assert "the data changed since the run started (the weights)" in error_of(words, capsys)
    _stage(tmp_path / "b", WEIGHTS, source_temperature=2)
    assert main([str(again), "--resume"]) == 0
    check_same_weights(tmp_path / "b/run", tmp_path / "a/run")


def test_prepared_data_do_not_depend_on_weights(tmp_path):
    # Found, not prepared again: the folders are named after the fingerprint.
    names = []
    for weights in (None, WEIGHTS):
        make_plan(load_recipe(_stage(tmp_path, weights)).stages[0], {})
        names.append(sorted(path.name for path in (tmp_path / "run/prepared").iterdir() if path.name[0] != "."))
    assert names[0] == names[1]


def test_an_estimate_counts_the_epoch(tmp_path):
    keys = {"source_temperature": 2, "validation_share": 0.0}
    args = load_recipe(_stage(tmp_path, **keys)).stages[0].arguments
    sizes = [SourceSizes("a", "retrieval", [320.0, 80.0]), SourceSizes("b", "classification", [16.0], 3)]
    shares = epoch_batches([320, 80, 16], 16, [1, 1, 3], 2)[1]
    estimate = estimate_batches(args, sizes, "train")
    assert shares == pytest.approx([11.98, 5.99, 8.03], abs=0.01) and estimate.count == 26
    assert estimate.texts == np.average([80, 80, 48], weights=shares)
