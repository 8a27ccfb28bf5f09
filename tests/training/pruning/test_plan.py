"""What each method keeps, and plans on disk with ranges that a person can read."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from training.pruning.importance import Importance, weight_importance
from training.pruning.plan import PruningPlan, as_ranges, from_ranges, make_plan, pruned_config

SMALLER = {"hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 2}


@pytest.fixture
def target(model):
    return pruned_config(model.config, SMALLER)


def _ranked(model, channels: list[int]) -> Importance:
    """An importance to which these channels matter most, the first of them most of all."""
    norms = torch.zeros(7, model.config.hidden_size)
    for rank, channel in enumerate(channels):
        norms[:, channel] = 100.0 - rank
    return replace(weight_importance(model), norms=norms, change=torch.tensor([0.1, 0.3, 0.2]))


def test_the_largest_norms_stay_in_their_own_order(model, target, importance):
    plan = make_plan(model.config, target, importance)
    assert plan.hidden == tuple(sorted(importance.norms[[0, 1, 2, 3, 6]].sqrt().sum(0).argsort()[-8:].tolist()))
    for layer, neurons in zip(plan.layers, plan.neurons, strict=True):
        assert neurons == tuple(sorted(importance.neurons[layer].argsort()[-20:].tolist()))
    assert plan.layers == (0, 1)
    assert plan.methods == {"hidden": "activation_norm", "layers": "first"}


def test_leading_channels_or_layers_of_most_change_stay(model, target, importance):
    assert make_plan(model.config, target, importance, hidden="leading").hidden == tuple(range(8))
    plan = make_plan(model.config, target, _ranked(model, []), layers="change")
    # Of equal channels the first stay; layers keep their own order.
    assert (plan.hidden, plan.layers) == (tuple(range(8)), (1, 2))


def test_reordered_channels_fill_the_gaps_among_the_leading_ones(model, target):
    importance = _ranked(model, [20, 3, 31, 0, 9, 5, 7, 6])
    plan = make_plan(model.config, target, importance, hidden="reordered")
    # 0, 3, 5, 6 and 7 keep their numbers; 20, 31 and 9 get 1, 2 and 4 in falling importance.
    assert plan.hidden == (0, 20, 31, 3, 9, 5, 6, 7)
    published = make_plan(model.config, target, importance)
    assert published.hidden == tuple(sorted(plan.hidden))


@pytest.mark.parametrize("hidden", ["activation_norm", "reordered"])
def test_a_plan_comes_back_from_its_file(model, target, importance, tmp_path, hidden):
    plan = make_plan(model.config, target, importance, hidden, "change")
    plan.save(tmp_path / "plan.yaml")
    assert PruningPlan.load(tmp_path / "plan.yaml") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def test_methods_and_shapes_are_checked(model, target, importance, refuses):
    with refuses("hidden", "'activation_norms'", "reordered"):
        make_plan(model.config, target, importance, hidden="activation_norms")
    with refuses("layers", "'last'", "first"):
        make_plan(model.config, target, importance, layers="last")
    with refuses("layers='change'", "calibrate"):
        make_plan(model.config, target, weight_importance(model), layers="change")
    with refuses("norms", "is of shape"):
        make_plan(model.config, target, replace(importance, norms=importance.norms[:, :16]))


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("layers: 0-1", "layer: 0-1", "'layers'"),
        ("layers: 0-1", "layers: 0-2", "2"),
        ("hidden_size: 32", "width: 32", "hidden_size"),
        ("hidden: 0-7", "hidden: first", "'first'"),
        ("  0:", "  x:", "0"),
    ],
)
def test_a_plan_changed_by_hand_is_read_strictly(model, target, importance, tmp_path, refuses, old, new, part):
    path = tmp_path / "plan.yaml"
    make_plan(model.config, target, importance, "leading").save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with refuses(path, "is not a plan", part, "make the plan again"):
        PruningPlan.load(path)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden": tuple(range(7))}, ["hidden keeps 7", "8"]),
        ({"hidden": (0, 1, 2, 3, 4, 5, 6, 6)}, ["hidden", "distinct numbers from 0 to 31"]),
        ({"hidden": (0, 1, 2, 3, 4, 5, 6, 32)}, ["hidden", "distinct numbers from 0 to 31"]),
        ({"layers": (0, 3)}, ["layers", "distinct numbers from 0 to 2"]),
        ({"neurons": (tuple(range(20)), tuple(range(19)))}, ["neurons of layer 1 keeps 19", "20"]),
        ({"source": {**SMALLER, "hidden_size": 64}}, ["for a model of hidden_size 64, not 32"]),
    ],
)
def test_a_plan_must_fit_the_model_and_the_shape(model, target, importance, refuses, changes, parts):
    plan = make_plan(model.config, target, importance)
    plan.check(model.config, target)
    with refuses("plan", *parts):
        replace(plan, **changes).check(model.config, target)


def test_ranges_keep_any_order():
    rng = random.Random(0)
    for size in (0, 1, 2, 9, 200):
        numbers = rng.sample(range(300), size)
        for each in (numbers, sorted(numbers)):
            assert from_ranges(as_ranges(each)) == tuple(each)
    assert as_ranges([0, 1, 2, 3, 5, *range(9, 21), 3, 2]) == "0-3 5 9-20 3 2"
    # YAML makes an integer of a single number.
    assert from_ranges(5) == (5,)


@pytest.mark.parametrize("text", ["0-3 x", "-1", "1.5", "1 - 2", None, [1, 2], True])
def test_other_texts_than_ranges_are_refused(text):
    with pytest.raises(ValueError):
        from_ranges(text)
