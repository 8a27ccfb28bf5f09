"""Budgets as a person writes them, shapes that use them to the end, losses that do not depend on the computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch.nn.functional import normalize

from modeling_f2llm import F2LLMConfig
from tests.training.pruning.pruned_models import SHAPE, make_model
from training.models.loading import train_tokenizer
from training.models.model_folder import count_parameters
from training.pruning.plan import PRUNED_FIELDS, make_plan
from training.pruning.pruning import apply_plan
from training.pruning.search import (
    Budget,
    Search,
    Shape,
    header_bytes,
    possible_shapes,
    score_shapes,
    shapes_line,
    similarity_loss,
    vocabulary_sizes,
)
from training.pruning.vocabulary import rank_tokens, trim_vocabulary

CONFIG = F2LLMConfig(**SHAPE)
WHOLE = Shape(*(SHAPE[name] for name in ("vocab_size", *PRUNED_FIELDS)))


def budget(**given):
    return Budget.read(given, "prune_to")


@pytest.mark.parametrize(
    ("given", "count"),
    [
        *(("20M", 20_000_000), ("1.5M", 1_500_000), ("2_000_000", 2_000_000), (2_000_000, 2_000_000)),
        *(("80k", 80_000), ("0.6B", 600_000_000), (2e6, 2_000_000), (" 300 ", 300)),
    ],
)
def test_parameters_are_read(given, count):
    assert budget(max_parameters=given) == Budget(count, None, "float32", "prune_to")


def test_a_shape_is_no_budget_and_limits_are_named():
    assert budget(family="f2llm-v2-80m") is None and budget() is None
    both = budget(max_megabytes=1.5, max_parameters="1M", dtype="bfloat16")
    assert str(both) == "1,000,000 parameters and 1.5 MB in bfloat16"


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        *(
            ({"max_parameters": bad}, ["max_parameters", "such as 20M", repr(bad)])
            for bad in ("20X", "M", "-5", 0, 1.5)
        ),
        *(({"max_parameters": bad}, ["max_parameters", "such as 20M"]) for bad in (True, None, [5], "1.2345678M", "")),
        *(({"max_megabytes": bad}, ["max_megabytes", "above 0"]) for bad in (0, -1, "50", True, None, float("inf"))),
        ({"max_megabytes": 5, "dtype": "int8"}, ["dtype", "'int8'", "bfloat16"]),
        ({"max_parameters": 5, "dtype": "float16"}, ["dtype", "without max_megabytes", "take it out"]),
        ({"max_parameters": "1M", "hidden_size": 8}, ["a budget and hidden_size", "one of them"]),
        ({"max_parameters": "1M", "family": "f2llm-v2-80m"}, ["a budget and family"]),
        ({"max_parameters": "1M", "max_megabyte": 1}, ["did you mean 'max_megabytes'"]),
    ],
)
def test_bad_budgets_are_refused(given, parts, refuses):
    with refuses("prune_to", *parts):
        budget(**given)


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True}])
def test_the_formula_counts_what_the_model_has(fields):
    config = F2LLMConfig(**SHAPE | fields)
    assert WHOLE.parameters(config) == make_model(**fields).num_parameters()
    for shape in (Shape(300, 16, 24, 2), Shape(320, 4, 8, 1)):
        cut = shape.cut(config)
        cut.vocab_size = shape.vocab_size
        assert shape.parameters(config) == count_parameters(cut)


def test_shapes_use_the_budget_to_the_end():
    limit = budget(max_parameters=12_000)
    shapes = possible_shapes(CONFIG, limit, [320, 200])
    assert {shape.vocab_size for shape in shapes} == {320, 200} and len(
        {shape.num_hidden_layers for shape in shapes}
    ) > 1
    for shape in shapes:
        assert shape.parameters(CONFIG) <= 12_000 and shape.hidden_size % 4 == 0
        more = shape._replace(intermediate_size=shape.intermediate_size + 8)
        assert shape.intermediate_size == 48 or more.parameters(CONFIG) > 12_000
        assert not any(o != shape and all(a >= b for a, b in zip(o, shape, strict=True)) for o in shapes)
    assert shapes == possible_shapes(CONFIG, limit, [320, 200]) == sorted(shapes)
    # A budget for the whole model leaves nothing to choose.
    assert possible_shapes(CONFIG, budget(max_parameters="1M"), [320, 200]) == [WHOLE]
    assert shapes_line([WHOLE]) == "1 of 320 tokens (width 32, MLP 48, layers 3)"
    assert vocabulary_sizes(1000, 300) == [1000, 750, 500, 300]


def test_a_budget_below_the_smallest_shape_says_that(refuses):
    smallest = Shape(200, 4, 8, 1).parameters(CONFIG)
    assert possible_shapes(CONFIG, budget(max_parameters=smallest), [320, 200])
    with refuses("prune_to", "200 tokens, width 4, MLP 8, 1 layer", f"{smallest:,} parameters"):
        possible_shapes(CONFIG, budget(max_parameters=smallest - 1), [320, 200])
    with refuses("0.001 MB in float16", "smallest possible shape", "MB in float16)"):
        possible_shapes(CONFIG, budget(max_megabytes=0.001, dtype="float16"), [320])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_file_of_a_shape_is_within_the_megabytes(dtype, importance, model, tmp_path):
    limit = budget(max_megabytes=0.06, dtype=dtype)
    for shape in possible_shapes(CONFIG, limit, [320]):
        target = shape.cut(CONFIG)
        cut = apply_plan(model, target, make_plan(CONFIG, target, importance)).to(getattr(torch, dtype))
        save_file(dict(cut.named_parameters()), tmp_path / "model.safetensors", {"format": "pt"})
        size = (tmp_path / "model.safetensors").stat().st_size
        assert size <= 1e6 * limit.size(CONFIG, shape) <= 60_000
        # What the bound gives away are digits of the header.
        assert 1e6 * limit.size(CONFIG, shape) - size <= header_bytes(CONFIG, 3, dtype) // 10


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(("the red river runs by the green mountain" for _ in range(9)), 320)


TEXTS = [
    "the red river runs",
    "a green mountain, by the river",
    "runs",
    "red red red",
    "größer 東京",
    "the mountain runs by",
]


@pytest.fixture(scope="module")
def texts(tokenizer):
    """Token ids of the texts of two sources."""
    ids = [np.array(each) for each in tokenizer(TEXTS * 3)["input_ids"]]
    return [ids[:11], ids[11:]]


def _score(model, tokenizer, ranked, texts, shapes, max_tokens=1000, importance=None, **keys):
    def plan_of(target):
        return make_plan(model.config, target, importance, "leading")

    return score_shapes(model, tokenizer, ranked, shapes, plan_of, texts, 32, max_tokens, 0.05, **keys)


def test_losses_are_those_of_the_cut_models_in_any_chunks(model, importance, tokenizer, texts):
    counts = np.bincount(np.concatenate([ids for source in texts for ids in source]), minlength=320)
    ranked, fewest = rank_tokens(tokenizer, counts)
    shapes = [WHOLE, Shape(320, 16, 24, 2), Shape(fewest, 16, 24, 2), Shape(len(ranked), 32, 48, 3)]
    losses = _score(model, tokenizer, ranked, texts, shapes, importance=importance)
    # A vocabulary that has all tokens of the texts embeds them as before.
    assert losses[0] == pytest.approx(0, abs=1e-6) and losses[3] == pytest.approx(0, abs=1e-6)
    assert losses[1] > 0.01 and losses[1] != losses[2] > 0.01
    chunked = _score(model, tokenizer, ranked, texts, shapes[::-1], importance=importance, max_tokens=7)
    np.testing.assert_allclose(chunked[::-1], losses, atol=1e-5)
    assert all(len(source) for source in texts) and not model.training


def test_the_loss_compares_cosines_and_not_widths():
    generator = torch.Generator().manual_seed(0)
    expected, other = (normalize(torch.randn(5, width, generator=generator), dim=-1) for width in (6, 3))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    assert similarity_loss(torch.cat([expected @ rotation, torch.zeros(5, 2)], dim=1), expected, 0.1) < 1e-5
    total = 0.0
    for text in range(5):
        others = [each for each in range(5) if each != text]
        p, q = (((e @ e[text])[others] / 0.1).softmax(0) for e in (expected, other))
        total += (p * (p / q).log()).sum().item()
    assert similarity_loss(other, expected, 0.1) == pytest.approx(total / 5, rel=1e-4)
    # One text has nothing to be told apart from.
    assert similarity_loss(other[:1], expected[:1], 0.1) == 0


def test_the_most_frequent_tokens_stay_with_their_parts(model, tokenizer):
    counts = np.bincount(np.concatenate(tokenizer(TEXTS)["input_ids"]), minlength=len(tokenizer))
    ranked, fewest = rank_tokens(tokenizer, counts)
    assert len(set(ranked)) == len(ranked) > fewest >= 259
    for size in range(fewest, len(ranked) + 1, 3):
        smaller, trimmed, _ = trim_vocabulary(model, tokenizer, ranked[:size])
        assert smaller.config.vocab_size == len(trimmed) == size
        assert trimmed.decode(trimmed(TEXTS[4])["input_ids"][:-1]) == TEXTS[4]
    # Only what is used is ranked; of the texts' tokens none is missing.
    assert set(np.flatnonzero(counts)) <= set(ranked) and rank_tokens(tokenizer, np.zeros(1))[0] == ranked[:fewest]


def test_the_search_is_written_with_the_best_first(tmp_path):
    shapes = [Shape(320, 16, 24, 1), Shape(320, 8, 48, 2), WHOLE]
    search = Search.of(budget(max_megabytes=1, dtype="float16"), shapes, [0.5, 0.25, 0.25])
    assert search.shapes == (shapes[1], WHOLE, shapes[0])
    search.save(tmp_path / "search.yaml", CONFIG)
    content = yaml.safe_load((tmp_path / "search.yaml").read_text())
    assert content["budget"] == "1 MB in float16" and len(content["rejected"]) == 2
    assert content["chosen"] == {
        **{"vocab_size": 320, "hidden_size": 8, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"parameters": shapes[1].parameters(CONFIG), "megabytes": round(search.budget.size(CONFIG, shapes[1]), 3)},
        "loss": 0.25,
    }
    head, chosen, *rejected = search.table(CONFIG).splitlines()
    assert head.split()[:2] == ["vocab_size", "hidden_size"] and chosen.split()[:3] == ["chosen", "320", "8"]
    assert len(rejected) == 2
