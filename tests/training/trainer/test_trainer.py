"""The objective by its formulas, and the trainer's log of its terms: as computed from the weights and the batch."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from modeling_f2llm import F2LLMModel
from modeling_f2llm.compression import spread_loss
from modeling_f2llm.losses import in_batch_loss, matryoshka_weights
from training.config.arguments import StageArguments
from training.distillation.distillation import Distillation, read_width
from training.distillation.teacher import Teacher
from training.evaluation.encoding import calibrate, quantized, unit_length
from training.models.encoding import embed_batch
from training.trainer.batches import GlobalBatchSampler, PackedCollator, PreparedRows
from training.trainer.step import Objective
from training.trainer.trainer import F2LLMTrainer

WIDTH, DIMS = 16, [16, 8, 4]


def batch_of(task_type="retrieval", **indices):
    """Three rows; text 2 is the negative of two rows, text 5 negative of one and positive of another."""
    default = {"query": [0, 3, 6], "positive": [1, 4, 5], "negatives": [[2, 5], [7, 2], [8, 0]]}
    return {"task_type": task_type, **{name: torch.tensor(index) for name, index in {**default, **indices}.items()}}


@pytest.fixture
def embeddings():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(9, WIDTH, generator=generator, requires_grad=True)


def gathered(embeddings, batch):
    return tuple(embeddings[batch[name]] for name in ("query", "positive", "negatives"))


def test_terms_are_cross_entropies_of_cosines(embeddings):
    # The formulas of the published training, written out at full width.
    batch = batch_of()
    query, positive, negatives = (normalize(part, dim=-1) for part in gathered(embeddings, batch))
    terms = Objective().terms(embeddings, batch)
    in_batch = cross_entropy(query @ positive.T / 0.05, torch.arange(3))
    candidates = torch.cat([positive[:, None], negatives], dim=1)
    hard = cross_entropy((query[:, None] * candidates).sum(-1) / 0.05, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(terms["in_batch"], in_batch)
    torch.testing.assert_close(terms["hard"], hard)


@pytest.mark.parametrize("dims", [None, DIMS])
@pytest.mark.parametrize(
    ("query", "positive", "left_out"),
    [
        ([0, 0, 6], [1, 4, 5], {(0, 1), (1, 0)}),  # one query, two answers
        ([0, 3, 6], [1, 4, 1], {(0, 2), (2, 0)}),  # two queries, one answer
        ([0, 0, 6], [1, 4, 4], {(0, 1), (1, 0), (1, 2), (2, 1)}),
        ([0, 0, 0], [1, 1, 1], {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)}),
        ([0, 1, 2], [1, 2, 0], {(0, 2), (1, 0), (2, 1)}),  # a query that is another row's positive
        ([0, 3, 6], [0, 4, 3], {(1, 2)}),  # the other way round it is a negative; a row's own positive always stays
    ],
)
def test_masked_duplicates_are_left_out_of_the_in_batch_negatives(embeddings, dims, query, positive, left_out):
    batch = batch_of(query=query, positive=positive)
    exclude = torch.tensor([[(row, other) in left_out for other in range(3)] for row in range(3)])
    terms = Objective(0.05, dims, mask_duplicates=True).terms(embeddings, batch)
    wanted = in_batch_loss(embeddings[batch["query"]], embeddings[batch["positive"]], dims=dims, exclude=exclude)
    assert terms["in_batch"].item() == wanted.item()
    plain = Objective(0.05, dims).terms(embeddings, batch)
    assert terms["hard"].item() == plain["hard"].item()
    assert terms["in_batch"].item() < plain["in_batch"].item()
    # No loss, and no NaN, if all rows are duplicates.
    assert (terms["in_batch"].item() == 0) == (len(left_out) == 6)
    terms["in_batch"].backward()
    assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize("dims", [None, DIMS])
def test_without_gathered_gradients_positives_learn_from_their_hard_negatives_only(embeddings, dims):
    def gradients(**keys):
        terms = Objective(dims=dims, **keys).terms(embeddings, batch)
        return {name: torch.autograd.grad(term, embeddings, retain_graph=True)[0] for name, term in terms.items()}

    # No text is query and positive of the same batch here.
    batch = batch_of()
    full, published = gradients(), gradients(gather_gradients=False)
    assert full["in_batch"][batch["positive"]].abs().min() > 0
    assert not published["in_batch"][batch["positive"]].any()
    assert torch.equal(published["in_batch"][batch["query"]], full["in_batch"][batch["query"]])
    assert torch.equal(published["hard"], full["hard"])


@pytest.fixture
def teacher():
    """Twice as wide as the student."""
    return torch.randn(9, 2 * WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.mark.parametrize("task_type", ["retrieval", "clustering", "classification"])
def test_terms_of_a_task_and_the_squared_distance_of_each_role_to_the_teacher(embeddings, teacher, task_type):
    batch = batch_of(task_type)
    plain = Objective(dims=DIMS).terms(embeddings, batch)
    # Only retrieval has an in-batch term.
    assert list(plain) == (["in_batch", "hard"] if task_type == "retrieval" else ["hard"])
    assert plain["hard"].item() == Objective(dims=DIMS).terms(embeddings, batch_of())["hard"].item()
    terms = Objective(dims=DIMS, distillation_weight=0.5).terms(embeddings, batch, teacher)
    distances = (embeddings - teacher[:, :WIDTH]).square()
    wanted = 0.5 * sum(distances[batch[role]].mean() for role in ("query", "positive", "negatives"))
    torch.testing.assert_close(terms.pop("distillation"), wanted)
    assert {name: term.item() for name, term in terms.items()} == {name: term.item() for name, term in plain.items()}


def test_rows_without_negatives_have_no_hard_loss(embeddings, teacher):
    batch = batch_of() | {"negatives": torch.empty(3, 0).long()}
    terms = Objective().terms(embeddings, batch, teacher)
    assert terms["hard"].item() == 0 < terms["in_batch"].item()
    distances = (embeddings - teacher[:, :WIDTH]).square()
    wanted = distances[batch["query"]].mean() + distances[batch["positive"]].mean()
    torch.testing.assert_close(terms["distillation"], wanted)
    sum(terms.values()).backward()
    # Nothing flows into the teacher.
    assert teacher.grad is None and embeddings.grad.isfinite().all() and embeddings.grad.any()


@pytest.mark.parametrize("task_type", ["retrieval", "classification", "similarity"])
@pytest.mark.parametrize("dims", [None, DIMS])
def test_terms_on_quantized_embeddings_are_those_of_what_an_index_holds(embeddings, task_type, dims):
    batch = batch_of(task_type) | {"scores": torch.tensor([1.0, 3.0, 2.0])}
    terms = Objective(dims=dims, quantized={"int8": 0.5, "binary": 2.0}).terms(embeddings, batch)
    plain = Objective(dims=dims).terms(embeddings, batch)
    assert list(terms) == [*plain, "int8", "binary"] and all(terms[name] == plain[name] for name in plain)
    documents = batch["positive"].tolist() + batch["negatives"].flatten().tolist()
    wanted, widths = {"int8": 0.0, "binary": 0.0}, dims or [WIDTH]
    for precision, factor in (("int8", 0.5), ("binary", 2.0)):
        for width, weight in zip(widths, matryoshka_weights(widths), strict=True):
            asked = unit_length(embeddings[:, :width].detach().numpy())
            stored = quantized(asked, precision, calibrate(asked[documents]))
            asked = stored if precision == "binary" else asked
            # A text is a query or a document: the last rows are the queries.
            both = torch.from_numpy(np.concatenate([stored, asked]))
            of_both = Objective().terms(both, batch | {"query": batch["query"] + len(asked)})
            wanted[precision] += factor * weight * sum(of_both.values()).item()
    assert {name: terms[name].item() for name in wanted} == pytest.approx(wanted, rel=1e-5)
    torch.stack([terms["int8"], terms["binary"]]).sum().backward()
    assert embeddings.grad.isfinite().all() and embeddings.grad[batch["query"]].any(dim=1).all()


@pytest.mark.parametrize(
    ("query", "positive", "own_forms", "queries", "positives"),
    [
        ([0, 3, 6], [1, 4, 5], None, [], []),
        ([0, 0, 6], [1, 4, 5], None, [], [(1, 4)]),  # one query, two answers: they are related
        ([0, 3, 6], [1, 4, 1], None, [(0, 6)], []),  # two queries, one answer
        ([0, 3, 6], [3, 4, 5], None, [(0, 3)], [(3, 4)]),  # a query that is another row's positive
        ([0, 3, 6], [1, 4, 5], [[1, 4], [4, 4], [5, 5]], [(0, 3)], [(1, 4)]),  # another positive of a row
    ],
)
def test_unrelated_queries_and_positives_are_spread(embeddings, query, positive, own_forms, queries, positives):
    batch = batch_of(query=query, positive=positive) | ({"own_forms": torch.tensor(own_forms)} if own_forms else {})
    batch |= {"forms": torch.arange(9)} if own_forms else {}
    wanted = 0.0
    for texts, related in ((query, queries), (positive, positives)):
        distinct = sorted({*texts})
        near = [[(one, other) in related or (other, one) in related for one in distinct] for other in distinct]
        wanted += 0.3 * spread_loss(embeddings[distinct], dims=DIMS, exclude=torch.tensor(near))
    terms = Objective(dims=DIMS, spread_weight=0.3).terms(embeddings, batch)
    torch.testing.assert_close(terms["spread"], wanted)
    # Elsewhere the texts of two rows may be of one class.
    assert "spread" not in Objective(spread_weight=0.3).terms(embeddings, batch_of("clustering"))


# The log


def new_model(config, seed, width=32):
    config = deepcopy(config)
    config.vocab_size, config.hidden_size = 400, width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return F2LLMModel(config)


SCORES = {"score_distillation_weight": 2.0, "teacher_temperature": 0.1, "mask_false_negatives": 0.02}


@pytest.mark.parametrize(("logging_steps", "max_tokens", "more"), [(1, None, {}), (4, 150, {}), (4, 150, SCORES)])
def test_logged_terms_are_those_computed_directly(
    tmp_path, tiny_config, small_tokenizer, prepared_sources, num_hard_negatives, logging_steps, max_tokens, more
):
    counts = {f"num_hard_negatives_{task_type}": count for task_type, count in num_hard_negatives.items()}
    args = StageArguments(
        **{"output_dir": str(tmp_path), "model": "here", "teacher": "here", "use_cpu": True, **counts},
        **{"max_tokens_per_forward": max_tokens, "max_length": 48, "global_batch_size": 16, "distillation_weight": 0.5},
        **{"spread_weight": 0.2, "quantized": '{"binary": 0.1, "int8": 0}'},
        learning_rate=0.0,  # the weights stay what they are
        **{"max_steps": 8, "logging_steps": logging_steps, "logging_first_step": False, **more},
        **{"save_strategy": "no", "report_to": [], "disable_tqdm": True},
    )
    model, teacher = new_model(tiny_config, 0), Teacher(new_model(tiny_config, 1, width=48))
    distillation = Distillation(read_width(args, 32, 48), teacher)
    trainer = F2LLMTrainer(model, args, prepared_sources, small_tokenizer, distillation=distillation)
    assert trainer.console.terms[:5] == ["in_batch", "hard", "binary", "spread", "distillation"]
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]

    sampler = GlobalBatchSampler([len(source.rows["train"]) for source in prepared_sources], 16, seed=args.seed)
    collator = PackedCollator(prepared_sources, num_hard_negatives, args.seed)
    rows = PreparedRows(prepared_sources)
    steps = []
    for keys, _ in zip(sampler, range(8), strict=False):
        batch = collator([rows[key] for key in keys])
        compressed = {"spread_weight": 0.2, "quantized": {"binary": 0.1}}
        objective = Objective(args.temperature, [32, 16, 8], distillation_weight=0.5, **compressed, **more)
        noted = {}
        terms = objective.terms(embed_batch(model, batch), batch, teacher.embed(batch), noted=noted)
        loss = sum(terms.values()).item()
        named = {f"loss_{name}": term.item() for name, term in terms.items()}
        steps.append({"loss": loss, f"loss_source/{batch['source']}": loss, **named})
        steps[-1] |= {name: value.item() for name, value in noted.items()}
    assert len(steps) == 8 and len({tuple(sorted(step)) for step in steps}) > 1
    assert len(logged) == 8 // logging_steps
    for number, line in enumerate(logged):
        window = steps[number * logging_steps : (number + 1) * logging_steps]
        # A term is averaged over the steps that have it.
        names = set().union(*window)
        means = {name: [step[name] for step in window if name in step] for name in names}
        wanted = {name: sum(values) / len(values) for name, values in means.items()}
        found = {name: line[name] for name in line if name.startswith(("loss", "masked"))}
        assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("each_node", "shared_by"), [(False, (5, 8)), (True, (1, 4))])
def test_a_cache_is_filled_by_all_processes_or_by_those_of_each_node(monkeypatch, each_node, shared_by):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    calls = []
    place = {"process_index": 5, "world_size": 8, "local_process_index": 1, "device": "cpu"}
    trainer = SimpleNamespace(
        args=SimpleNamespace(save_on_each_node=each_node, **place),
        accelerator=SimpleNamespace(autocast=nullcontext, wait_for_everyone=lambda: calls.append("wait")),
        distillation=SimpleNamespace(fill_cache=lambda *share: calls.append(share)),
    )
    F2LLMTrainer.fill_teacher_cache(trainer)
    assert calls == [("cpu", *shared_by), "wait"]
