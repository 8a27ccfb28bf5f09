"""The command: scores are those of an independent computation, resumed but never stale, and faults are named."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score

pytest.importorskip("mteb")

from sentence_transformers import SentenceTransformer

import training.evaluate
from modeling_f2llm import F2LLMConfig, F2LLMModel
from modeling_f2llm.sentence_transformer import build_sentence_transformer
from tests.training.evaluation.local_runs import write
from training.evaluate import main
from training.evaluation import encoding, runner
from training.evaluation.records import load_evaluation


@pytest.fixture
def folder(tmp_path, tiny_model, tiny_tokenizer):
    build_sentence_transformer(tiny_model, tiny_tokenizer).save_pretrained(str(tmp_path / "model"))
    return tmp_path / "model"


@pytest.fixture
def pairs(tmp_path, sentences):
    return write(tmp_path / "pairs.parquet", query=sentences[:5], passage=sentences[5:])


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


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
def run(folder, pairs, out):
    """Evaluate a model (by default the folder) on the pairs."""

    def run(*options, model=folder):
        return main([str(model), "--local", str(pairs), "--output", str(out), *map(str, options)])

    return run


def values(out):
    found = load_evaluation(out)
    assert not found.failures
    return [score.value for score in found.scores]


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
    again = load_evaluation(out)
    assert values(out) == [score.value for score in first.scores]
    assert {key: each.tolist() for key, each in again.examples.items()} == {
        key: each.tolist() for key, each in first.examples.items()
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL", "--tasks", "STS2"], "task 'STS2' is unknown; there are STS2"),
        (["MODEL", "--benchmark", "MTEB(Multilingual, v9)"], "there are MTEB(Multilingual"),
        (["MODEL", "--local", "absent.parquet"], "no such file or folder"),
        (["MODEL", "--local", "PAIRS", "--dims", "64"], "dimension 64"),
        (["MODEL"], "nothing to evaluate on"),
        (["MODEL", "--local", "PAIRS", "--max-length", "0"], "--max-length must be at least 1"),
        (["MODEL", "--local", "PAIRS", "--compare", "MODEL", "other"], "--compare 'other' is unknown; there are"),
        (["MODEL", "--local", "PAIRS", "--output", "PAIRS"], "pairs.parquet: is read"),
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


def test_a_command_names_a_model_or_a_report(capsys):
    for words in ([], ["MODEL", "--report", "FOLDER"]):
        with pytest.raises(SystemExit, match="2"):
            main(words)
    assert "not allowed with" in capsys.readouterr().err


def test_a_model_that_was_trained_on_is_evaluated_again(folder, run, out, tiny_tokenizer, tiny_model, encoded):
    found = []
    for scale in (1.0, -1.0):
        with torch.no_grad():
            tiny_model.embed_tokens.weight[::2] *= scale
        build_sentence_transformer(tiny_model, tiny_tokenizer).save_pretrained(str(folder))
        encoded.clear()
        assert run() == 0 and encoded
        found.append(values(out))
    assert found[0] != found[1]


def test_changed_data_are_evaluated_again_and_not_compared(
    folder, run, pairs, out, tmp_path, encoded, sentences, capsys
):
    assert run() == 0
    before = values(out)
    shutil.copytree(folder, tmp_path / "other")
    write(pairs, query=sentences[:5], passage=sentences[:5])
    assert run("--compare", folder, tmp_path / "other", model=tmp_path / "other") == 2
    assert "scored on different data" in capsys.readouterr().err
    encoded.clear()
    assert run() == 0 and encoded
    assert len(values(out)) == 2 * len(before) and values(out)[-len(before) :] != before


def test_texts_truncated_at_another_length_are_evaluated_again(run, encoded):
    assert run() == 0
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


def test_a_task_that_computes_its_score_in_another_way_is_not_run_again_for_its_examples(
    run, out, encoded, monkeypatch
):
    monkeypatch.setattr(runner, "agree", lambda values, score: False)
    assert run() == 0
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


def test_examples_that_were_deleted_are_computed_again(run, out, encoded):
    assert run() == 0
    (out / "examples.npz").unlink()
    encoded.clear()
    assert run() == 0 and encoded
    assert len(load_evaluation(out).examples) == len(load_evaluation(out).scores) == 2


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


def test_the_command_starts_as_a_script_whose_folder_hides_no_library():
    """The folder of a script comes first in the path."""
    script = Path(training.evaluate.__file__)
    ended = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "--report FOLDER" in ended.stdout, ended.stderr
    assert not {path.stem for path in script.parent.iterdir()} & sys.stdlib_module_names - {"__init__"}
