"""A step in chunks: the loss and every gradient are those of the whole batch encoded at once."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from modeling_f2llm import F2LLMModel
from training.data.manifest import TASK_TYPES
from training.models.encoding import embed_batch, embed_chunk, lay_out
from training.trainer.step import CachedStep, Objective, draw_rank

TEXTS, ROWS, WIDTH = 26, 7, 32
# One chunk; several; one text in each.
BUDGETS = [None, 200, 60, 1]
OBJECTIVES = {
    "plain": Objective(),
    "matryoshka": Objective(dims=[32, 16, 8]),
    "distillation": Objective(dims=[32, 16, 8], distillation_weight=0.3, score_distillation_weight=2.0),
    "published": Objective(dims=[32, 16, 8], gather_gradients=False),
    "masked": Objective(0.1, mask_duplicates=True, mask_false_negatives=0.0),
    "compressed": Objective(0.5, [32, 16, 8], spread_weight=0.3, quantized={"int8": 0.5, "binary": 0.2}),
}


def batch_of(max_tokens=None, task_type="retrieval", negatives=3):
    """Seven rows over 26 texts; two rows share their positive, two their query, and negatives repeat."""
    rng = np.random.default_rng(0)
    lengths = np.sort(rng.integers(2, 40, TEXTS))
    texts = [rng.integers(2, 320, length) for length in lengths]
    layout = lay_out(lengths, max_tokens=max_tokens)
    index = rng.integers(0, TEXTS, (ROWS, negatives))
    return {
        "input_ids": torch.from_numpy(np.concatenate([texts[text] for chunk in layout.chunks for text in chunk]))[None],
        **layout.of_batch(lengths),
        "query": torch.tensor([0, 5, 5, 11, 13, 20, 25]),
        "positive": torch.tensor([1, 6, 7, 12, 12, 3, 24]),
        "negatives": torch.from_numpy(index),
        "task_type": task_type,
        "scores": torch.tensor([0.1, 2.0, 0.5, 0.5, -1.0, 0.7, 3.0]),
    }


def loss_of_exits(objective, batch, teacher):
    """As the trainer averages it."""
    loss = loss_function(objective, batch, teacher)
    return lambda embeddings: torch.stack([loss(each) for each in embeddings.chunk(2, dim=1)]).mean()


def loss_function(objective, batch, teacher):
    return lambda embeddings: torch.stack(list(objective.terms(embeddings, batch, teacher).values())).sum()


def cached_step(model, key=(), context=nullcontext, exits=None):
    return CachedStep(Accelerator(cpu=True), model, context, key, exits)


def gradients(model):
    """The gradients of the last step, which are taken away."""
    found = {name: weights.grad.clone() for name, weights in model.named_parameters()}
    model.zero_grad()
    return found


def at_once(model, loss_of, exits=None):
    """Loss, gradient of the embeddings and of the weights by plain autograd over one forward pass."""
    batch = batch_of()
    embeddings = embed_chunk(model, batch["input_ids"], batch["chunk_lengths"][0], exits)
    embeddings.retain_grad()
    loss = loss_of(embeddings)
    loss.backward()
    return loss.detach(), embeddings.grad, gradients(model)


def assert_equal(value, wanted, name=""):
    assert (value - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max()), name


@pytest.fixture
def dropping_model(tiny_config):
    torch.manual_seed(0)
    config = deepcopy(tiny_config)
    config.attention_dropout = 0.3
    return F2LLMModel(config).train()


@pytest.mark.parametrize("max_tokens", BUDGETS)
@pytest.mark.parametrize("task_type", TASK_TYPES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradients_are_those_of_the_whole_batch(tiny_model, objective, task_type, max_tokens):
    batch = batch_of(max_tokens, task_type)
    # The teacher is wider than the student.
    wide = torch.randn(TEXTS, 2 * WIDTH, generator=torch.Generator().manual_seed(1))
    loss_of = loss_function(OBJECTIVES[objective], batch, wide if objective == "distillation" else None)
    wanted_loss, wanted_gradient, wanted = at_once(tiny_model, loss_of)
    passes = []
    tiny_model.register_forward_hook(lambda *_: passes.append(None))
    step = cached_step(tiny_model)
    loss, lengths = step.run(batch, loss_of)
    # All chunks but the last are encoded twice.
    assert len(passes) == 2 * len(batch["chunk_lengths"]) - 1
    assert_equal(loss, wanted_loss)
    assert_equal(lengths, wanted_gradient.norm(dim=1))
    # Without gradient, the embeddings are the same.
    wanted_embeddings = embed_batch(tiny_model, batch_of())
    assert_equal(embed_batch(tiny_model, batch, width=8), wanted_embeddings[:, :8])
    # Gradients add up.
    step.run(batch, loss_of)
    found = gradients(tiny_model)
    for name, weights in wanted.items():
        assert_equal(found[name], 2 * weights, name)


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("max_tokens", [None, 60])
def test_all_exits_of_a_chunked_pass_are_those_of_shorter_models(tiny_model, max_tokens, checkpoints):
    batch, teacher = batch_of(max_tokens), torch.randn(TEXTS, WIDTH, generator=torch.Generator().manual_seed(1))
    loss_of = loss_of_exits(OBJECTIVES["distillation"], batch, teacher)
    whole = embed_chunk(tiny_model, batch_of()["input_ids"], batch_of()["chunk_lengths"][0])
    short = F2LLMModel(tiny_model.config, num_hidden_layers=1)
    short.load_state_dict(tiny_model.state_dict(), strict=False)
    first = embed_chunk(short, batch_of()["input_ids"], batch_of()["chunk_lengths"][0])
    wanted_loss, wanted_gradient, wanted = at_once(tiny_model, loss_of, [1, 2])
    assert_equal(wanted_loss, loss_of(torch.cat([first, whole], dim=1)).detach())
    if checkpoints:
        tiny_model.train().gradient_checkpointing_enable({"use_reentrant": False})
    loss, lengths = cached_step(tiny_model, exits=[1, 2]).run(batch, loss_of)
    assert_equal(loss, wanted_loss)
    assert_equal(lengths, wanted_gradient.norm(dim=1))
    for name, gradient in gradients(tiny_model).items():
        assert_equal(gradient, wanted[name], name)


def test_ranks_are_drawn_in_proportion_by_the_step():
    drawn = [draw_rank([8, 24, 32], 0, step) for step in range(2000)]
    assert drawn == [draw_rank([8, 24, 32], 0, step) for step in range(2000)]
    for rank in (8, 24, 32):
        assert drawn.count(rank) / 2000 == pytest.approx(rank / 64, abs=0.04)


def test_missing_negatives_are_in_no_term():
    embeddings = torch.randn(TEXTS, WIDTH, generator=torch.Generator().manual_seed(0), requires_grad=True)
    teacher = torch.randn(TEXTS, WIDTH, generator=torch.Generator().manual_seed(1))
    whole, few = batch_of(task_type="clustering"), batch_of(task_type="clustering")
    # The last text is some row's alone.
    whole["negatives"][whole["negatives"] == TEXTS - 1] = 0
    whole["query"] = whole["query"].clamp_max(TEXTS - 2)
    few = {**whole, "negatives": torch.cat([whole["negatives"], torch.full((ROWS, 1), -1)], dim=1)}
    terms = [Objective().terms(embeddings, batch, teacher) for batch in (whole, few)]
    for name, value in terms[0].items():
        torch.testing.assert_close(terms[1][name], value)
    (gradient,) = torch.autograd.grad(sum(terms[1].values()), embeddings)
    assert gradient[-1].count_nonzero() == 0


def test_an_error_of_the_loss_stops_the_step_before_any_gradient(tiny_model):
    def refuse(embeddings):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        cached_step(tiny_model).run(batch_of(60), refuse)
    assert all(weights.grad is None for weights in tiny_model.parameters())


@pytest.mark.parametrize("max_tokens", [None, 60])
def test_bf16_stays_close(tiny_model, max_tokens):
    batch = batch_of(max_tokens)
    loss_of = loss_function(Objective(0.5, [32, 16, 8]), batch, None)
    wanted_loss, _, wanted = at_once(tiny_model, loss_of)
    step = cached_step(tiny_model, context=lambda: torch.autocast("cpu", torch.bfloat16))
    loss, lengths = step.run(batch, loss_of)
    assert loss.dtype == lengths.dtype == torch.float32
    assert abs(loss - wanted_loss) < 0.02 * wanted_loss
    found, wanted = (
        torch.cat([weights.flatten() for weights in of.values()]) for of in (gradients(tiny_model), wanted)
    )
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.995


def test_dropout_gradients_are_those_of_the_same_draws_at_once(dropping_model):
    batch = batch_of(60)
    loss_of = loss_function(Objective(), batch, None)
    # The states of each chunk's second pass keep their graph: the loss over them, differentiated in one go.
    kept = []
    hook = dropping_model.register_forward_hook(
        lambda module, args, output: kept.append(output.last_hidden_state[0]) if torch.is_grad_enabled() else None
    )
    backward = Accelerator.backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "backward", lambda self, loss: backward(self, loss, retain_graph=True))
        cached_step(dropping_model, (3, 14)).run(batch, loss_of)
    hook.remove()
    found = gradients(dropping_model)
    # The last chunk is encoded first.
    in_order = [*kept[1:], kept[0]]
    loss_of(torch.cat(in_order)).backward()
    for name, weights in gradients(dropping_model).items():
        assert_equal(found[name], weights, name)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_dropout_is_drawn_by_the_key_and_disturbs_no_other_draw(dropping_model):
    batch = batch_of(60)
    loss_of = loss_function(Objective(), batch, None)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, _ = cached_step(dropping_model, (0, 1)).run(batch, loss_of)
    wanted = gradients(dropping_model)
    assert torch.equal(torch.get_rng_state(), before)
    other, _ = cached_step(dropping_model, (0, 2)).run(batch, loss_of)
    assert other != first
    # Layers that are computed again drop the same.
    for use_reentrant in (None, True, False):
        torch.rand(100)
        if use_reentrant is not None:
            dropping_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        dropping_model.zero_grad()
        again, _ = cached_step(dropping_model, (0, 1)).run(batch, loss_of)
        assert again == first
        for name, weights in gradients(dropping_model).items():
            assert_equal(weights, wanted[name], name)
