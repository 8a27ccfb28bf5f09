"""The runner: scores are those of an independent computation, resumed but never stale, and faults are named."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import ndcg_score

pytest.importorskip("mteb")

from modeling_f2llm import F2LLMConfig, F2LLMModel
from modeling_f2llm.sentence_transformer import build_sentence_transformer
from training.evaluation import run, scoring, store
from training.evaluation.records import load_evaluation
from training.evaluation.run import main


@pytest.fixture
def folder(tmp_path, tiny_model, tiny_tokenizer):
    build_sentence_transformer(tiny_model, tiny_tokenizer).save_pretrained(str(tmp_path / "model"))
    return tmp_path / "model"


@pytest.fixture
def pairs(tmp_path, sentences):
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"query": sentences[:5], "passage": sentences[5:]}), path)
    return path


@pytest.fixture
def encoded(monkeypatch):
    """Grows by the texts of every call that asks for embeddings."""
    texts, encode = [], store.EmbeddingStore.encode

    def watched(self, *args, **kwargs):
        texts.extend(args[0])
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(store.EmbeddingStore, "encode", watched)
    return texts


def test_a_local_task_scores_as_scikit_learn_does_and_is_not_encoded_again(folder, pairs, tmp_path, sentences, encoded):
    out = tmp_path / "out"
    command = [str(folder), "--local", str(pairs), "--dims", "32", "8", "--precisions", "float32", "int8", "binary"]
    assert main([*command, "--output", str(out)]) == 0
    first = load_evaluation(out)
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), trust_remote_code=True)
    cosines = model.encode_query(sentences[:5]) @ model.encode_document(sentences[5:]).T
    expected = ndcg_score(np.eye(5), cosines, k=10)
    full = first.select(task="PairsRetrieval", dimension=32, precision="float32")
    assert full[0].value == pytest.approx(expected, abs=1e-4)
    assert len(first.scores) == 12 and not first.failures

    encoded.clear()
    assert main([*command, "--output", str(out)]) == 0 and not encoded
    again = load_evaluation(out)
    assert [score.value for score in again.scores] == [score.value for score in first.scores] and not again.failures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "STS2"], "did you mean STS2"),
        (["--benchmark", "MTEB(Multilingual, v9)"], "did you mean MTEB(Multilingual"),
        (["--local", "absent.parquet"], "no such file or folder"),
        (["--local", "PAIRS", "--dims", "64"], "dimension 64"),
        ([], "nothing to evaluate on"),
        (["--local", "PAIRS", "--max-length", "0"], "--max-length must be at least 1"),
        (["--local", "PAIRS", "--compare", "MODEL", "other"], "--compare 'other': no such model; there are"),
        (["--local", "PAIRS", "--output", "PAIRS"], "there is a file of that name; give a folder"),
        (["--local", "PAIRS", "PAIRS"], "two tasks are called PairsBitextMining, PairsRetrieval"),
    ],
)
def test_bad_input_is_one_line(options, message, folder, pairs, tmp_path, capsys, encoded):
    options = [{"PAIRS": str(pairs), "MODEL": str(folder)}.get(each, each) for each in options]
    output = [] if "--output" in options else ["--output", str(tmp_path / "out")]
    assert main([str(folder), *options, *output]) == 2
    assert message in capsys.readouterr().err and not encoded


def test_a_model_that_was_trained_on_is_evaluated_anew(folder, pairs, tmp_path, tiny_tokenizer, tiny_model, encoded):
    command = [str(folder), "--local", str(pairs), "--output", str(tmp_path / "out")]
    values = []
    for scale in (1.0, -1.0):
        with torch.no_grad():
            tiny_model.embed_tokens.weight[::2] *= scale
        build_sentence_transformer(tiny_model, tiny_tokenizer).save_pretrained(str(folder))
        encoded.clear()
        assert main(command) == 0 and encoded
        values.append([score.value for score in load_evaluation(tmp_path / "out").scores])
    assert values[0] != values[1]


def test_changed_data_of_the_same_name_are_evaluated_anew(folder, pairs, tmp_path, encoded, sentences):
    command = [str(folder), "--local", str(pairs), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    before = load_evaluation(tmp_path / "out")
    pq.write_table(pa.table({"query": sentences[:5], "passage": sentences[:5]}), pairs)
    encoded.clear()
    assert main(command) == 0 and encoded
    after = load_evaluation(tmp_path / "out")
    assert len(after.scores) == len(before.scores)
    assert [score.value for score in after.scores] != [score.value for score in before.scores]


def test_texts_cut_at_another_length_are_evaluated_anew(folder, pairs, tmp_path, encoded):
    command = [str(folder), "--local", str(pairs), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    encoded.clear()
    assert main([*command, "--max-length", "4"]) == 0 and encoded
    encoded.clear()
    assert main([*command, "--max-length", "4"]) == 0 and not encoded


def test_a_task_out_of_reach_is_noted_and_the_others_stay(folder, pairs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(folder), "--tasks", "STS22.v2", "--local", str(pairs), "--output", str(out)]) == 1
    assert "1 of 3 tasks failed" in capsys.readouterr().err
    found = load_evaluation(out)
    assert set(found.failures) == {f"{folder}: STS22.v2"}
    assert {score.task for score in found.scores} == {"PairsRetrieval", "PairsBitextMining"}
    assert all(score.examples == 5 for score in found.scores)


def test_it_ends_in_a_report_of_all_that_was_evaluated(folder, pairs, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--local", str(pairs), "--output", str(out)]
    assert main([str(folder), *command, "--dims", "32", "8"]) == 0
    other = tmp_path / "other"
    folder.rename(other)
    assert main([str(other), *command, "--compare", str(folder), str(other)]) == 0
    printed = capsys.readouterr().out
    assert f"{folder} (first) against {other} (second)" in printed and "no difference found" in printed
    assert printed.rstrip().endswith(str(out / "report.html"))
    found = load_evaluation(out)
    assert [model.name for model in found.models] == [str(folder), str(other)]
    assert {(score.model, score.dimension) for score in found.scores} == {
        (str(folder), 32),
        (str(folder), 8),
        (str(other), 32),
    }
    assert "dimensions" in (out / "report.md").read_text() and (out / "report.html").stat().st_size > 10_000


def test_examples_are_kept_and_survive_a_resumed_run(folder, pairs, tmp_path, encoded):
    command = [str(folder), "--local", str(pairs), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    first = load_evaluation(tmp_path / "out")
    for score in first.scores:
        assert first.examples[score.key].mean() == pytest.approx(score.value, abs=1e-4)
    assert main(command) == 0
    again = load_evaluation(tmp_path / "out")
    assert {key: values.tolist() for key, values in again.examples.items()} == {
        key: values.tolist() for key, values in first.examples.items()
    }
    # mteb's results without our record of the examples: they are made anew.
    (tmp_path / "out" / "scores.json").unlink()
    encoded.clear()
    assert main(command) == 0 and encoded
    assert set(load_evaluation(tmp_path / "out").examples) == set(first.examples)


def test_checkpoints_of_a_run_are_its_revisions(folder, pairs, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("checkpoint-2", "checkpoint-10", "model"):
        shutil.copytree(folder, run / name)
    command = ["--local", str(pairs), "--output", str(tmp_path / "out")]
    assert main([str(run), *command, "--revision", "all"]) == 0
    assert main([str(run), *command]) == 0
    labels = [model.label for model in load_evaluation(tmp_path / "out").models]
    assert labels == [f"{run}@checkpoint-2", f"{run}@checkpoint-10", str(run)]
    assert main([str(run), *command, "--revision", "checkpoint-3"]) == 2
    assert "no checkpoint 'checkpoint-3' in it; there are checkpoint-2, checkpoint-10" in capsys.readouterr().err


def test_a_run_without_a_log_or_manifest_is_reported_all_the_same(folder, pairs, tmp_path, caplog):
    run = tmp_path / "pruned"
    run.mkdir()
    (run / "recipe.yaml").write_text(f"manifest: {tmp_path / 'manifest.yaml'}\n")
    (tmp_path / "manifest.yaml").write_text("sources: []\n")
    shutil.copytree(folder, run / "model")
    assert main([str(run), "--local", str(pairs), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").exists() and "no resource classes" in caplog.text


def test_a_task_that_makes_its_score_in_another_way_is_not_run_again_for_its_examples(
    folder, pairs, tmp_path, encoded, monkeypatch
):
    command = [str(folder), "--local", str(pairs), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(scoring, "agree", lambda values, score: False)
    assert main(command) == 0
    found = load_evaluation(tmp_path / "out")
    assert {len(values) for values in found.examples.values()} == {0} and {s.examples for s in found.scores} == {5}
    encoded.clear()
    assert main(command) == 0 and not encoded


def test_a_fault_in_a_further_model_costs_nothing_that_comes_first(folder, pairs, tmp_path, capsys, encoded):
    (tmp_path / "empty").mkdir()
    command = [str(folder), "--local", str(pairs), "--against", str(tmp_path / "empty")]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2 and not encoded
    assert "holds no model" in capsys.readouterr().err


def test_a_model_that_is_too_narrow_costs_neither_the_others_nor_the_report(
    folder, pairs, tmp_path, tiny_config, tiny_tokenizer, capsys
):
    narrow = F2LLMModel(F2LLMConfig(**{**tiny_config.to_dict(), "hidden_size": 16, "matryoshka_dimensions": None}))
    build_sentence_transformer(narrow, tiny_tokenizer).save_pretrained(str(tmp_path / "narrow"))
    out = tmp_path / "out"
    command = [str(folder), "--local", str(pairs), "--dims", "32", "--against", str(tmp_path / "narrow"), str(folder)]
    assert main([*command, "--output", str(out)]) == 1
    found = load_evaluation(out)
    assert {score.model for score in found.scores} == {str(folder)} and len(found.scores) == 2
    assert "choose from 1 to 16" in found.failures[f"{tmp_path / 'narrow'}: all"]
    assert (out / "report.html").exists() and "1 of 4 tasks failed" in capsys.readouterr().err
    # What failed is forgotten when it is mended.
    command = [str(folder), "--local", str(pairs), "--dims", "16", "--against", str(tmp_path / "narrow")]
    assert main([*command, "--output", str(out)]) == 0
    assert not load_evaluation(out).failures


def test_a_faulty_manifest_is_found_before_anything_is_encoded(folder, pairs, tmp_path, capsys, encoded):
    command = [str(folder), "--local", str(pairs), "--manifest", str(tmp_path / "none.yaml")]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2 and not encoded
    assert "none.yaml" in capsys.readouterr().err


def test_models_on_different_data_are_not_compared(folder, pairs, tmp_path, capsys, sentences):
    out, other = tmp_path / "out", tmp_path / "other"
    assert main([str(folder), "--local", str(pairs), "--output", str(out)]) == 0
    pq.write_table(pa.table({"query": sentences[:5], "passage": sentences[:5]}), pairs)
    shutil.copytree(folder, other)
    command = [str(other), "--local", str(pairs), "--compare", str(folder), str(other), "--output", str(out)]
    assert main(command) == 2
    assert "scored on different data" in capsys.readouterr().err


def test_damaged_examples_are_made_anew_and_scores_stay(folder, pairs, tmp_path, caplog):
    out = tmp_path / "out"
    assert main([str(folder), "--local", str(pairs), "--output", str(out)]) == 0
    for content in ((out / "examples.npz").read_bytes()[:300], b""):
        (out / "examples.npz").write_bytes(content)
        assert len(load_evaluation(out).scores) == 2 and "cannot be read" in caplog.text
        assert main([str(folder), "--local", str(pairs), "--output", str(out)]) == 0
        assert len(load_evaluation(out).examples) == 2


def test_two_commands_that_evaluate_into_one_folder_wait(tmp_path, monkeypatch):
    def adds_itself(args):
        path = args.output / "scores"
        before = path.read_text() if path.exists() else ""
        time.sleep(0.2)
        args.output.mkdir(exist_ok=True)
        path.write_text(before + args.model)

    monkeypatch.setattr(run, "_evaluate_and_report", adds_itself)
    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(lambda name: main([name, "--output", str(tmp_path / "out")]), "abc"))
    assert ended == [0, 0, 0] and sorted((tmp_path / "out/scores").read_text()) == ["a", "b", "c"]
