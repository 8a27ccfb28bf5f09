"""The trainer's log: every term and every source's loss, as computed directly from the weights and the batch."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from modeling_f2llm import F2LLMModel
from training.config.arguments import StageArguments
from training.distillation.distillation import Distillation
from training.distillation.teacher import Teacher
from training.models.encoding import embed_batch
from training.trainer.batches import GlobalBatchSampler, PackedCollator, PreparedRows
from training.trainer.trainer import F2LLMTrainer, Objective

DIMS = [32, 16, 8]


def new_model(config, seed, width=32):
    config = deepcopy(config)
    config.vocab_size, config.hidden_size = 400, width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return F2LLMModel(config)


@pytest.mark.parametrize(("logging_steps", "max_tokens_per_forward"), [(1, None), (4, 150)])
def test_logged_terms_are_those_computed_directly(
    tmp_path, tiny_config, small_tokenizer, prepared_sources, num_hard_negatives, logging_steps, max_tokens_per_forward
):
    counts = {f"num_hard_negatives_{task_type}": count for task_type, count in num_hard_negatives.items()}
    args = StageArguments(
        output_dir=str(tmp_path),
        model="of the test",
        max_length=48,
        global_batch_size=16,
        max_tokens_per_forward=max_tokens_per_forward,
        distillation_weight=0.5,
        # The weights stay what they are.
        learning_rate=0.0,
        max_steps=8,
        logging_steps=logging_steps,
        logging_first_step=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **counts,
    )
    model, teacher = new_model(tiny_config, 0), Teacher(new_model(tiny_config, 1, width=48))
    trainer = F2LLMTrainer(model, args, prepared_sources, small_tokenizer, distillation=Distillation(32, teacher))
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]

    sampler = GlobalBatchSampler([len(source.rows["train"]) for source in prepared_sources], 16, seed=args.seed)
    collator = PackedCollator(prepared_sources, num_hard_negatives, args.seed)
    rows = PreparedRows(prepared_sources)
    steps = []
    for keys, _ in zip(sampler, range(8), strict=False):
        batch = collator([rows[key] for key in keys])
        objective = Objective(args.temperature, DIMS, distillation_weight=0.5)
        terms = objective.terms(embed_batch(model, batch), batch, teacher.embed(batch))
        loss = sum(terms.values()).item()
        named = {f"loss_{name}": term.item() for name, term in terms.items()}
        steps.append({"loss": loss, f"loss_source/{batch['source']}": loss, **named})
    assert len(steps) == 8 and len({tuple(sorted(step)) for step in steps}) > 1
    assert len(logged) == 8 // logging_steps
    for number, line in enumerate(logged):
        window = steps[number * logging_steps : (number + 1) * logging_steps]
        # A term is averaged over the steps that have it.
        names = set().union(*window)
        means = {name: [step[name] for step in window if name in step] for name in names}
        wanted = {name: sum(values) / len(values) for name, values in means.items()}
        assert {name: line[name] for name in line if name.startswith("loss")} == pytest.approx(wanted, rel=1e-4)


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
