from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from tests.training.recipes import error_of, write_single_stage
from training.common.run_folder import last_checkpoint
from training.run_stage import main
from training.trainer.monitor import NOTES, StepWatch
from training.trainer.trainer import F2LLMTrainer, Objective


@pytest.fixture
def watch(tmp_path, prepared_sources, small_tokenizer):
    return StepWatch(tmp_path, prepared_sources, small_tokenizer)


def _batch(source="qa"):
    """Rows 4, 7 and 1: texts 0 to 2 are the queries, 3 to 5 the passages, 6 to 8 the negatives."""
    query, positive, negatives = torch.arange(9).reshape(3, 3)
    indices = {"query": query, "positive": positive, "negatives": negatives[:, None]}
    return {"source": source, "rows": [4, 7, 1], **indices}


def _gradient(*norms):
    return torch.tensor([*norms, *[0.0] * (9 - len(norms))])


def _feed(watch, losses, source="qa"):
    for step, loss in enumerate(losses):
        watch.loss(step, _batch(source), loss, _gradient())


def _notes(folder):
    path = folder / NOTES
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def test_a_spike_is_noted_with_its_source_and_rows(watch, tmp_path, prepared_sources, caplog):
    _feed(watch, [0.9, 1.1] * 20)
    assert not (tmp_path / NOTES).exists()
    watch.loss(41, _batch(), 5.0, _gradient(0.5, 3.0, 1.0))
    (note,) = _notes(tmp_path)
    assert (note["kind"], note["step"], note["source"], note["rows"]) == ("loss spike", 41, "qa", [4, 7, 1])
    assert note["loss"] == 5.0 and note["mean"] == pytest.approx(1.0) and note["deviation"] == pytest.approx(0.1)
    assert [row["row"] for row in note["worst"]] == [7, 1, 4]
    assert [row["score"] for row in note["worst"]] == pytest.approx([3.0, 1.0, 0.5])
    # A query of the source "qa" under its instruction, and an answer of it.
    assert "Answer from qa." in note["worst"][0]["query"] and "qa question" in note["worst"][0]["query"]
    assert note["worst"][0]["passage"].startswith("qa answer")
    assert "loss spike at step 41 in source 'qa'" in caplog.text


@pytest.mark.parametrize("mean", [1.0, 1e-6, 300.0])
def test_falling_and_constant_losses_do_not_spike(watch, tmp_path, uninterrupted, mean):
    _feed(watch, [5.0 * 0.97**step for step in range(200)], "topics")
    _feed(watch, [mean] * 30 + [mean * (1 + 1e-6), mean * 1.05] + [mean] * 5)
    assert not _notes(tmp_path) and not _notes(uninterrupted)
    watch.loss(40, _batch(), mean * 1.5, _gradient())
    assert len(_notes(tmp_path)) == 1


def test_losses_are_compared_within_their_source_and_when_there_are_enough(watch, tmp_path):
    _feed(watch, [0.9, 1.1] * 15, "qa")
    _feed(watch, [9.0] * 19, "topics")
    watch.loss(60, _batch("topics"), 90.0, _gradient())
    assert not _notes(tmp_path)
    watch.loss(61, _batch("qa"), 9.0, _gradient())
    assert [note["source"] for note in _notes(tmp_path)] == ["qa"]


def test_what_is_not_finite_is_the_worst_and_stays_json(watch, tmp_path):
    watch.record("non-finite gradient", 3, _batch(), _gradient(1.0, math.nan, 2.0), norm=math.inf)
    (note,) = _notes(tmp_path)
    assert note["norm"] == "inf"
    assert [(row["row"], row["score"]) for row in note["worst"]] == [(7, "inf"), (1, 2.0), (4, 1.0)]


def _poison(monkeypatch, at_step, what):
    """Makes the loss of a step NaN, or the gradient alone."""
    terms, calls = Objective.terms, []

    def poisoned(self, embeddings, *args, **kwargs):
        # Validation needs no gradient.
        if embeddings.requires_grad:
            calls.append(None)
        found = terms(self, embeddings, *args, **kwargs)
        if embeddings.requires_grad and len(calls) == at_step:
            if what == "loss":
                return {name: term * float("nan") for name, term in found.items()}
            for term in found.values():
                term.register_hook(lambda gradient: gradient * float("nan"))
        return found

    monkeypatch.setattr(Objective, "terms", poisoned)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_noted_and_not_taken(tmp_path, monkeypatch, capsys, resumes_exactly, what):
    recipe, run = write_single_stage(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:
        _poison(patch, 5, what)
        line = error_of([recipe], capsys, 1)
    assert line.startswith(f"stopped: the {what} became nan at step 5, on a batch of source 'tiny_retrieval'; ")
    assert f"last good checkpoint: {run / 'checkpoint-3'}" in line and str(run / NOTES) in line
    (note,) = _notes(run)
    assert (note["kind"], note["step"], note["source"]) == (f"non-finite {what}", 5, "tiny_retrieval")
    assert len(note["rows"]) > 5 == len(note["worst"]) and {row["row"] for row in note["worst"]} < set(note["rows"])
    assert all(row["query"].startswith("the ") for row in note["worst"])
    assert last_checkpoint(run) == run / "checkpoint-3"
    weights = load_file(run / "checkpoint-3/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    resumes_exactly(recipe)


def test_a_scaled_gradient_may_overflow(tmp_path, monkeypatch, capsys):
    """The scaler of fp16 skips such a step and scales the next one less."""
    get_grad_norm = F2LLMTrainer._get_grad_norm

    def scaled(self, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(self.accelerator, "scaler", object())
            return get_grad_norm(self, *args, **kwargs)

    _poison(monkeypatch, 2, "gradient")
    monkeypatch.setattr(F2LLMTrainer, "_get_grad_norm", scaled)
    main([str(write_single_stage(tmp_path, max_steps=2, save_strategy="no", eval_strategy="no"))])
    assert "the gradient became" not in capsys.readouterr().err
    assert not (tmp_path / "run" / NOTES).exists()
