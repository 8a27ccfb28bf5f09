"""A cache of embeddings: each text encoded once, the same scores on any number of processes."""

from __future__ import annotations

import os
import shutil
import signal
from functools import partial
from itertools import chain

import numpy as np
import pytest

pytest.importorskip("mteb")

from mteb import mocks

from modeling_f2llm import F2LLMModel
from tests.training.distributed_recipe import save_model
from tests.training.evaluation import synthetic
from tests.training.evaluation.memory_tasks import TEXTS, clustering, retrieval, sts
from tests.training.processes import launch
from training.common.command import run_command
from training.evaluate import main
from training.evaluation import parallel, runner
from training.evaluation.embedding_cache import CachedStore, EmbeddingCache
from training.evaluation.encoding import EmbeddingStore
from training.evaluation.models import load_model
from training.evaluation.parallel import Job, Worker, cut, evaluate_tasks
from training.evaluation.records import Evaluation, ModelRecord, load_evaluation
from training.evaluation.runner import evaluate_model
from training.models.devices import with_all_processes

GIB = 2**30


def make_tasks(*arguments):
    return [sts(), retrieval(), clustering()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, tiny_config, tiny_tokenizer)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder), None, 8192)


@pytest.fixture(autouse=True, scope="module")
def small_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "_PART_BATCHES", 1)
        for module in (parallel, runner):
            patch.setattr(module, "find_tasks", make_tasks)
        yield


@pytest.fixture(scope="module")
def run(model, folder):
    """Evaluate all tasks into a folder, by ``evaluate_tasks``."""

    def run(output, cache=GIB, tasks=make_tasks):
        job = Job((str(folder), None, 8192), (), (), ("float32",), output)
        evaluate_tasks(job, model, tasks(), load_evaluation(output, missing_ok=True), cache)

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The results of one process with a cache."""
    run(tmp_path_factory.getbasetemp() / "whole")
    return results(tmp_path_factory.getbasetemp() / "whole")


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    """The results of one process without the cache."""
    found = Evaluation()
    evaluate_model(model, make_tasks(), found, tmp_path_factory.mktemp("expected"))
    return {score.key: pytest.approx(score.value, abs=2e-5) for score in found.scores}


@pytest.fixture
def encoded(monkeypatch):
    """Grows by the texts that the model encodes."""
    texts, compute = [], EmbeddingStore.compute

    def watched(self, each, *arguments):
        texts.extend(each)
        return compute(self, each, *arguments)

    monkeypatch.setattr(EmbeddingStore, "compute", watched)
    return texts


def results(output):
    """All scores in their order, and those of the examples."""
    found = load_evaluation(output)
    assert not found.failures and not (output / ".parallel").exists()
    examples = {key: each.tolist() for key, each in sorted(found.examples.items())}
    return [(score.key, score.value) for score in found.scores], examples


def test_processes_of_a_launch_score_as_one_and_as_without_the_cache(whole, expected, folder, tmp_path, monkeypatch):
    assert dict(whole[0]) == expected
    monkeypatch.setattr(runner, "write_report", lambda *_, **__: "the report")
    words = [folder, "--tasks", "all", "--embedding-cache", "0.5", "--output", tmp_path / "out"]
    statuses, logs = launch(main, words, tmp_path)
    assert statuses == [0, 0] and results(tmp_path / "out") == whole, logs
    assert logs[1] == "" and logs[0].count("the report") == 1
    # 30 of two tasks, and 38 of retrieval, whose documents have titles.
    assert "98 texts of 3 tasks, 60 encoded" in logs[0]
    assert {path.name for path in (tmp_path / "out/mteb").rglob("Memory*.json")} >= {"MemorySTS.json"}


def test_exits_and_ranks_score_as_without_the_cache(folder, tmp_path, monkeypatch):
    small = tmp_path / "model"
    shutil.copytree(folder, small)
    inner = F2LLMModel.from_pretrained(small)
    inner.factorize_embeddings([8, 16])
    inner.save_pretrained(small)
    expected = Evaluation()
    for rank in (8, 16):
        exits = load_model(str(small), None, 8192, layers=[1], rank=rank)
        evaluate_model(exits, make_tasks(), expected, tmp_path / "expected", dims=(32, 8))
    monkeypatch.setattr(runner, "write_report", lambda *_, **__: "the report")
    views = ["--layers", "1", "--ranks", "8", "16", "--dims", "32", "8"]
    words = [small, "--tasks", "all", *views, "--embedding-cache", "0.5", "--output", tmp_path / "out"]

    def command(words):
        status = main(words)
        assert not parallel._worker.cache_info().currsize
        return status

    statuses, logs = launch(command, words, tmp_path)
    assert statuses == [0, 0] and logs[0].count("98 texts of 3 tasks, 60 encoded") == 2, logs
    found = load_evaluation(tmp_path / "out").models
    assert [(each.label, each.parameters) for each in found] == [(e.label, e.parameters) for e in expected.models]
    scores = {score.key: pytest.approx(score.value, abs=2e-5) for score in expected.scores}
    assert dict(results(tmp_path / "out")[0]) == scores and len(scores) == 2 * 2 * 2 * len(make_tasks())


def test_a_small_cache_holds_fewer_tasks_at_once(run, expected, tmp_path, encoded, monkeypatch):
    held, close, score = [], EmbeddingCache.close, Worker.score

    def watched(self):
        held.extend([len(self._places)] * bool(self._places))
        close(self)

    def unseen(self, names):
        own = score(self, names)
        # A disk that machines share may show the files of others late.
        shutil.rmtree(self.job.folder / "scores")
        return own

    monkeypatch.setattr(EmbeddingCache, "close", watched)
    monkeypatch.setattr(Worker, "score", unseen)
    run(tmp_path, cache=4 * 32 * len(TEXTS))
    assert dict(results(tmp_path)[0]) == expected
    # Retrieval alone has more texts than fit.
    assert held == [30, 38, 30] and len(encoded) == sum(held)


@pytest.mark.parametrize("step", ["encode", "score"])
def test_a_run_that_was_interrupted_continues_with_what_is_missing(run, whole, tmp_path, encoded, monkeypatch, step):
    name = {"encode": "compute", "score": "evaluate_task"}[step]
    owner, scored, calls = EmbeddingStore if step == "encode" else parallel, [], []
    original = getattr(owner, name)

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, interrupted)
        run(tmp_path / "out")
    # Half a file, embeddings of another model, and scores that another killed run has left.
    work = tmp_path / "out/.parallel"
    (cache,) = (work / "embeddings").iterdir()
    (cache / ".half.npy.partial").write_bytes(b"half")
    (work / "embeddings/other").mkdir()
    Evaluation([ModelRecord("small")], [synthetic.score()]).save(work / "scores/7")
    evaluate_task = parallel.evaluate_task
    monkeypatch.setattr(parallel, "evaluate_task", lambda *args: scored.append(args[1]) or evaluate_task(*args))
    run(tmp_path / "out")
    found = load_evaluation(tmp_path / "out")
    assert found.select(model="small") == [synthetic.score()]
    found._drop(found.select(model="small"))
    found.save(tmp_path / "out")
    scores, examples = results(tmp_path / "out")
    assert (sorted(scores), examples) == (sorted(whole[0]), whole[1])
    assert len(encoded) == len(set(encoded)) == 2 * len(TEXTS) and len(scored) == (3 if step == "encode" else 2)


@pytest.mark.parametrize(
    ("fault", "statuses", "line"),
    [
        ("error", [1, 1], "stopped: process 1: OSError: the disk is full. To go on, run the same command again"),
        ("death", [1, -signal.SIGKILL], "stopped: lost contact with another process"),
    ],
)
def test_a_process_that_fails_is_reported_in_one_line_and_costs_no_finished_task(
    run, expected, model, tmp_path, monkeypatch, fault, statuses, line
):
    def score(self, names):
        if os.environ.get("RANK") == "1" and fault == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("RANK") == "1":
            raise OSError("the disk is full")
        return whole_score(self, names[:2])

    whole_score = Worker.score
    monkeypatch.setattr(parallel, "load_model", lambda *_: model)
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "score", score)
        command = partial(with_all_processes, lambda: run_command(partial(run, tmp_path / "out")))
        found, logs = launch(lambda _: command(), [], tmp_path)
    assert found == statuses and logs[0].splitlines()[-1].startswith(line) and logs[0].count("stopped") == 1
    assert logs[1] == "" and (tmp_path / "out/.parallel/scores/0/scores.json").exists()
    scored = []
    evaluate_task = parallel.evaluate_task
    monkeypatch.setattr(parallel, "evaluate_task", lambda *args: scored.append(args[1]) or evaluate_task(*args))
    run(tmp_path / "out")
    assert dict(results(tmp_path / "out")[0]) == expected and len(scored) == 1


def test_a_task_that_fails_is_noted_and_run_again(run, expected, tmp_path):
    def with_a_fault():
        tasks = make_tasks()
        tasks[0].dataset = {}
        return tasks

    run(tmp_path, tasks=with_a_fault)
    found = load_evaluation(tmp_path)
    assert [key.partition(": ")[2] for key in found.failures] == ["MemorySTS, 32 dimensions, float32"]
    assert {score.task for score in found.scores} == {"MemoryRetrieval", "MemoryClustering"}
    run(tmp_path)
    assert dict(results(tmp_path)[0]) == expected


def test_texts_that_no_rehearsal_finds_are_encoded_with_their_task(run, expected, tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(parallel._Rehearsal, "embed", None)
    run(tmp_path)
    assert dict(results(tmp_path)[0]) == expected and len(encoded) > 2 * len(TEXTS)


@pytest.mark.slow
def test_rehearsals_of_all_kinds_of_tasks_of_mteb_find_all_texts(model, tmp_path, encoded, monkeypatch):
    def score(self, names):
        before = len(encoded)
        own = whole_score(self, names)
        assert len(encoded) == before > 0
        return own

    kinds = [kind for name, kind in sorted(vars(mocks).items()) if name.startswith("Mock")]
    tasks = [task for task in (kind() for kind in kinds) if set(task.metadata.modalities) == {"text"}]
    whole_score = Worker.score
    monkeypatch.setattr(Worker, "score", score)
    evaluation, plain = Evaluation(), Evaluation()
    evaluate_tasks(Job((), (), (), ("float32",), tmp_path / "out"), model, tasks, evaluation, GIB)
    evaluate_model(model, tasks, plain, tmp_path / "plain")
    assert len({score.task_type for score in evaluation.scores}) > 10 and not evaluation.failures
    scores = {score.key: pytest.approx(score.value, abs=2e-5) for score in plain.scores}
    assert {score.key: score.value for score in evaluation.scores} == scores


def test_parts_are_the_same_without_others():
    texts = [str(number) * (1 + number % 9) for number in range(20)]
    parts = list(cut(texts, 2))
    assert sorted(chain(*parts)) == sorted(texts) and [len(part) for part in parts] == [2] * 10
    assert list(cut(chain(*parts[::3]), 2)) == parts[::3]


@pytest.mark.parametrize("joined", [True, False])
def test_prompts_are_joined_with_texts_only_where_pooling_reads_them(encoder, tmp_path, joined):
    encoder.set_pooling_include_prompt(joined)
    cache, plain = EmbeddingCache(tmp_path, 32), EmbeddingStore(encoder)
    expected = plain.encode(TEXTS, "query: ", "query")
    as_encoded = CachedStore(encoder, cache).as_encoded
    assert as_encoded(["a"], "b", "query") == ((["ba"], "", None) if joined else (["a"], "b", None))
    np.testing.assert_allclose(CachedStore(encoder, cache).encode(TEXTS, "query: "), expected, atol=1e-6)
    # What is in the cache is not encoded.
    given, prompt, side = as_encoded(TEXTS[:3], "query: ", "query")
    cache.add([cache.key(text, prompt, side) for text in given], np.eye(3, 32, dtype=np.float32))
    store = CachedStore(encoder, EmbeddingCache(tmp_path, 32))
    np.testing.assert_array_equal(store.encode(TEXTS[:3][::-1], "query: "), np.eye(3, 32)[::-1])
    assert store.encoded == 0
