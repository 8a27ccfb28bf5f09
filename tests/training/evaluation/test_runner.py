"""The command: scores are those of mteb and of scikit-learn, resumed but never stale, and faults are named."""

from __future__ import annotations

import pytest

pytest.importorskip("mteb")


import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import mteb
import numpy as np
import torch
from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer
from sklearn.metrics import ndcg_score

from modeling_f2llm import F2LLMConfig, F2LLMModel
from modeling_f2llm.sentence_transformer import build_sentence_transformer
from tests.training.evaluation.memory_tasks import KINDS, retrieval, sts
from tests.training.evaluation.synthetic import write
from training.evaluate import main
from training.evaluation import encoding, models, runner, scoring
from training.evaluation.encoding import EmbeddingStore
from training.evaluation.local_tasks import classification as classification_task
from training.evaluation.local_tasks import labels_of, pair_tasks
from training.evaluation.models import EncoderView, EvaluatedModel, Prompts
from training.evaluation.records import Evaluation, ModelRecord, load_evaluation
from training.evaluation.runner import evaluate_model
from training.evaluation.scoring import has_examples, recorded


@pytest.fixture
def folder(tmp_path, tiny_model, tiny_tokenizer):
    build_sentence_transformer(tiny_model, tiny_tokenizer).save_pretrained(str(tmp_path / "model"))
    return tmp_path / "model"


@pytest.fixture
def pairs(tmp_path, sentences):
    return write(tmp_path / "pairs.parquet", query=sentences[:5], passage=sentences[5:])


@pytest.fixture
def encoded(monkeypatch):
    """Grows by the texts of every call that asks for embeddings."""
    texts, encode = [], encoding.EmbeddingStore.encode

    def watched(self, *args, **kwargs):
        texts.extend(args[0])
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(encoding.EmbeddingStore, "encode", watched)
    return texts


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def run(folder, pairs, out):
    """Evaluate a model (by default the folder) on the pairs."""

    def run(*options, model=folder):
        return main([str(model), "--local", str(pairs), "--output", str(out), *map(str, options)])

    return run


def values(out):
    found = load_evaluation(out)
    assert not found.failures
    return [score.value for score in found.scores]


def test_exits_are_models_of_one_encoding(folder, run, out, sentences, monkeypatch):
    passes, encode = [], SentenceTransformer.encode

    def watched(self, inputs, prompt=None, **options):
        passes.extend((prompt, text) for text in inputs)
        return encode(self, inputs, prompt=prompt, **options)

    monkeypatch.setattr(SentenceTransformer, "encode", watched)
    assert run("--layers", "1", "--dims", "32", "8", "--precisions", "float32", "binary") == 0
    assert len(set(passes)) == len(passes) >= 10
    found = load_evaluation(out)
    assert [(each.label, each.layers) for each in found.models] == [(f"{folder} (1 layer)", 1), (str(folder), None)]
    assert found.models[0].parameters < found.models[1].parameters
    shorter = SentenceTransformer(str(folder), config_kwargs={"num_hidden_layers": 1})
    cosines = shorter.encode_query(sentences[:5]) @ shorter.encode_document(sentences[5:]).T
    fields = {"task": "PairsRetrieval", "dimension": 32, "precision": "float32"}
    (score,) = found.select(model=f"{folder} (1 layer)", **fields)
    assert score.value == pytest.approx(ndcg_score(np.eye(5), cosines, k=10), abs=1e-4) and len(found.scores) == 16
    assert run("--layers", "3") == 2


def test_ranks_of_token_embeddings_are_models_too(folder, run, out):
    model = F2LLMModel.from_pretrained(folder)
    model.factorize_embeddings([8, 16])
    model.save_pretrained(folder)
    assert run("--layers", "1", "--ranks", "8", "16") == 0
    sizes = {each.label: each.parameters for each in load_evaluation(out).models}
    names = [f"{folder} (rank {rank}{layers})" for rank in (8, 16) for layers in (", 1 layer", "")]
    assert list(sizes) == names
    # Columns of 320 tokens and 32 channels.
    assert sizes[names[2]] - sizes[names[0]] == sizes[names[3]] - sizes[names[1]] == 8 * (320 + 32)


def test_a_local_task_scores_as_scikit_learn_does_and_is_not_encoded_again(folder, run, out, sentences, encoded):
    options = ["--dims", "32", "8", "--precisions", "float32", "int8", "binary"]
    assert run(*options) == 0
    first = load_evaluation(out)
    model = SentenceTransformer(str(folder), trust_remote_code=True)
    cosines = model.encode_query(sentences[:5]) @ model.encode_document(sentences[5:]).T
    (full,) = first.select(task="PairsRetrieval", dimension=32, precision="float32")
    assert full.value == pytest.approx(ndcg_score(np.eye(5), cosines, k=10), abs=1e-4) and len(first.scores) == 12
    for score in first.scores:
        assert first.examples[score.key].mean() == pytest.approx(score.value, abs=1e-4)
    encoded.clear()
    assert run(*options) == 0 and not encoded
    assert values(out) == [score.value for score in first.scores]
    np.testing.assert_equal(load_evaluation(out).examples, first.examples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL", "--tasks", "STS2"], "task 'STS2' is unknown; there are STS2"),
        (["MODEL", "--benchmark", "MTEB(Multilingual, v9)"], "there are MTEB(Multilingual"),
        (["MODEL", "--local", "absent.parquet"], "no such file or folder"),
        (["MODEL", "--local", "PAIRS", "--dims", "64"], "dimension 64"),
        (["MODEL"], "nothing to evaluate on"),
        (["MODEL", "--local", "PAIRS", "--max-length", "0"], "--max-length must be at least 1"),
        (["MODEL", "--local", "PAIRS", "--embedding-cache", "0"], "--embedding-cache must be more than 0 GiB, got 0"),
        (["MODEL", "--local", "PAIRS", "--compare", "MODEL", "other"], "--compare 'other' is unknown; there are"),
        (["MODEL", "--local", "PAIRS", "--output", "PAIRS"], "pairs.parquet: is a file"),
        (["MODEL", "--local", "PAIRS", "PAIRS"], "two tasks are called PairsRetrieval"),
        (["MODEL", "--local", "PAIRS", "--manifest", "none.yaml"], "none.yaml"),
        # A fault in a further model costs nothing that comes first.
        (["MODEL", "--local", "PAIRS", "--against", "EMPTY"], "holds no model"),
    ],
)
def test_bad_input_is_one_line(options, message, folder, pairs, out, tmp_path, capsys, encoded):
    (tmp_path / "empty").mkdir()
    paths = {"PAIRS": str(pairs), "MODEL": str(folder), "EMPTY": str(tmp_path / "empty")}
    output = [] if "--output" in options else ["--output", str(out)]
    assert main([paths.get(each, each) for each in options] + output) == 2
    assert message in capsys.readouterr().err and not encoded


def test_changed_models_options_and_data_are_evaluated_again_and_not_compared(
    folder, run, pairs, out, tmp_path, encoded, sentences, capsys, tiny_tokenizer, tiny_model
):
    assert run() == 0
    first = values(out)
    with torch.no_grad():
        tiny_model.embed_tokens.weight[::2] *= -1
    build_sentence_transformer(tiny_model, tiny_tokenizer).save_pretrained(str(folder))
    assert run() == 0
    before = values(out)
    assert first != before
    shutil.copytree(folder, tmp_path / "other")
    write(pairs, query=sentences[:5], passage=sentences[:5])
    assert run("--compare", folder, tmp_path / "other", model=tmp_path / "other") == 2
    assert "scored on different data" in capsys.readouterr().err
    encoded.clear()
    assert run() == 0 and encoded
    assert len(values(out)) == 2 * len(before) and values(out)[-len(before) :] != before
    encoded.clear()
    assert run("--max-length", 4) == 0 and encoded
    encoded.clear()
    assert run("--max-length", 4) == 0 and not encoded


def test_a_task_out_of_reach_is_noted_and_the_others_stay(folder, run, out, capsys):
    assert run("--tasks", "STS22.v2") == 1
    assert "1 of 3 tasks failed" in capsys.readouterr().err
    found = load_evaluation(out)
    assert set(found.failures) == {f"{folder}: STS22.v2"}
    assert {score.task for score in found.scores} == {"PairsRetrieval", "PairsBitextMining"}
    assert all(score.examples == 5 for score in found.scores)


def test_it_ends_in_a_report_of_all_that_was_evaluated(folder, run, out, tmp_path, capsys):
    assert run("--dims", 32, 8) == 0
    other = folder.rename(tmp_path / "other")
    assert run("--compare", folder, other, model=other) == 0
    printed = capsys.readouterr().out
    assert f"{folder} (first) against {other} (second)" in printed and "no difference found" in printed
    assert printed.rstrip().endswith(str(out / "report.html"))
    found = load_evaluation(out)
    assert [model.name for model in found.models] == [str(folder), str(other)]
    views = {(score.model, score.dimension) for score in found.scores}
    assert views == {(str(folder), 32), (str(folder), 8), (str(other), 32)}
    assert "dimensions" in (out / "report.md").read_text() and (out / "report.html").stat().st_size > 10_000


def test_checkpoints_of_a_run_are_its_revisions(folder, run, out, tmp_path, capsys, caplog):
    stage = tmp_path / "run"
    for name in ("checkpoint-2", "checkpoint-10", "model"):
        shutil.copytree(folder, stage / name)
    assert run("--revision", "all", model=stage) == 0
    # A run without a log, or with a manifest that has no languages, is reported, too.
    (stage / "recipe.yaml").write_text(f"manifest: {tmp_path / 'manifest.yaml'}\n")
    (tmp_path / "manifest.yaml").write_text("sources: []\n")
    assert run(model=stage) == 0 and (out / "report.html").exists() and "no resource classes" in caplog.text
    labels = [model.label for model in load_evaluation(out).models]
    assert labels == [f"{stage}@checkpoint-2", f"{stage}@checkpoint-10", str(stage)]
    assert run("--revision", "checkpoint-3", model=stage) == 2
    assert "no checkpoint 'checkpoint-3' in it; there are checkpoint-2, checkpoint-10" in capsys.readouterr().err


def test_examples_are_computed_again_where_they_were_deleted_but_not_where_the_score_is_no_mean(
    run, out, encoded, monkeypatch
):
    assert run() == 0
    (out / "examples.npz").unlink()
    encoded.clear()
    monkeypatch.setattr(scoring, "_TOLERANCE", -1)
    assert run() == 0 and encoded
    found = load_evaluation(out)
    assert {len(each) for each in found.examples.values()} == {0} and {s.examples for s in found.scores} == {5}
    encoded.clear()
    assert run() == 0 and not encoded


def test_a_model_that_is_too_narrow_costs_neither_the_others_nor_the_report(
    folder, run, out, tmp_path, tiny_config, tiny_tokenizer, capsys
):
    narrow = F2LLMModel(F2LLMConfig(**{**tiny_config.to_dict(), "hidden_size": 16, "matryoshka_dimensions": None}))
    build_sentence_transformer(narrow, tiny_tokenizer).save_pretrained(str(tmp_path / "narrow"))
    assert run("--dims", 32, "--against", tmp_path / "narrow", folder) == 1
    found = load_evaluation(out)
    assert {score.model for score in found.scores} == {str(folder)} and len(found.scores) == 2
    assert "choose from 1 to 16" in found.failures[f"{tmp_path / 'narrow'}: all"]
    assert (out / "report.html").exists() and "1 of 4 tasks failed" in capsys.readouterr().err
    # What failed is forgotten when it works.
    assert run("--dims", 16, "--against", tmp_path / "narrow") == 0 and values(out)


def test_two_commands_that_evaluate_into_one_folder_wait(out, monkeypatch):
    def adds_itself(args):
        path = args.output / "scores"
        before = path.read_text() if path.exists() else ""
        time.sleep(0.2)
        args.output.mkdir(exist_ok=True)
        path.write_text(before + args.model)

    monkeypatch.setattr(runner, "_evaluate", adds_itself)
    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(lambda name: main([name, "--output", str(out)]), "abc"))
    assert ended == [0, 0, 0] and sorted((out / "scores").read_text()) == ["a", "b", "c"]


@pytest.fixture
def model(store):
    meta = ModelMeta.create_empty({"name": "a/b", "revision": "1"})
    return EvaluatedModel(ModelRecord("model", identity="1"), store, meta, Prompts())


@pytest.fixture
def evaluate(model, tmp_path):
    def run(*tasks, into=None, **options):
        found = Evaluation() if into is None else into
        evaluate_model(model, tasks, found, tmp_path / "evaluated", **options)
        return found

    return run


def by_subset(evaluation, **fields):
    assert not evaluation.failures
    return {score.subset: score.value for score in evaluation.select(**fields)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_mteb_alone_whatever_was_evaluated_before(kind, evaluate, encoder, capsys, monkeypatch):
    (result,) = mteb.evaluate(
        SentenceTransformerEncoderWrapper(encoder), kind(), cache=None, co2_tracker=False, show_progress_bar=False
    ).task_results
    expected = {each["hf_subset"]: pytest.approx(each["main_score"], abs=2e-5) for each in result.scores["test"]}
    capsys.readouterr()
    assert by_subset(evaluate(kind())) == expected
    # The bar over tasks is shown, and no bar of mteb or datasets.
    shown = capsys.readouterr().err
    assert "model: 100%" in shown and shown.count("%|") == shown.count("model: ")
    # Narrower views first, and the same task again.
    task, other = kind(), retrieval() if kind is not retrieval else sts()
    first = evaluate(other, task, dims=[8, 32], precisions=["int8", "float32"])
    assert by_subset(first, task=task.metadata.name, dimension=32, precision="float32") == expected
    found = evaluate(task)
    assert by_subset(found) == expected and all(score.examples > 0 for score in found.scores)
    # What is known is not encoded again.
    before = list(found.scores)
    monkeypatch.setattr(EmbeddingStore, "encode", None)
    assert evaluate(kind(), into=found).scores == before and not found.failures


def test_a_view_that_fails_is_named_and_the_others_stay(evaluate, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no bits")

    monkeypatch.setattr(models, "quantized", fails)
    found = evaluate(sts(), dims=[32, 8], precisions=["int8", "float32"])
    assert {(score.dimension, score.precision) for score in found.scores} == {(32, "float32"), (8, "float32")}
    assert found.failures == {f"model: MemorySTS, {dim} dimensions, int8": "RuntimeError: no bits" for dim in (32, 8)}


RETRIEVAL_METRICS = ["ndcg_at_10", "map_at_10", "recall_at_5", "precision_at_5", "hit_rate_at_1"]


@pytest.mark.parametrize(("number", "metrics"), [(0, RETRIEVAL_METRICS), (1, ["f1", "accuracy"]), (2, ["accuracy"])])
def test_examples_average_to_every_metric(number, metrics, model, tmp_path, sentences):
    # Few dimensions: some of the answers are wrong.
    view = EncoderView(model, 2)
    queries = [*sentences, *(f"{text} {text}" for text in sentences)]
    path = write(tmp_path / "pairs.parquet", query=queries, passage=[text[::-1] for text in queries])
    labels = labels_of("here", [f"{text} {n}" for n in range(4) for text in sentences], ([*"a" * 10, *"b" * 10]) * 2)
    task = [*pair_tasks(path, "Names"), classification_task("Names", tmp_path, ["eng-Latn"], labels)][number]
    for metric in metrics:
        task.metadata = task.metadata.model_copy(update={"main_score": metric})
        with recorded(task) as found:
            options = {"co2_tracker": False, "show_progress_bar": False, "prediction_folder": tmp_path / "unused"}
            (result,) = mteb.evaluate(view, task, cache=None, **options).task_results
        examples = found["test", "default"]
        assert len(examples) == 20 and 0 < examples.mean() < 1 and not (tmp_path / "unused").exists()
        assert examples.mean() == pytest.approx(result.scores["test"][0][metric], abs=2e-5)


def test_metrics_that_are_not_a_mean_have_no_examples():
    names = ["STS22.v2", "TwentyNewsgroupsClustering.v2", "SprintDuplicateQuestions", "NFCorpus"]
    assert [has_examples(task) for task in map(mteb.get_task, names)] == [False, False, False, True]
