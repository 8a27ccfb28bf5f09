"""The default recipe itself, cut short: what `make quickstart` runs, on the real data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from training.evaluation.records import load_evaluation
from training.run_stage import main


def test_quickstart_runs_to_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--cap", "2000", "--max_steps", "2", "--report_to", "none"]) == 0
    result = json.loads((tmp_path / "runs/quickstart/evaluation-stage2.json").read_text())
    assert list(result["accuracy"]) == ["128", "64", "32", "16", "8"]
    assert result["pairs"] > 10000 and len(result["languages"]) > 200
    # The baseline does not depend on the training; it is the number that the README compares with.
    assert result["tfidf"] == pytest.approx(0.287, abs=0.002)
    assert result["model"] == "runs/quickstart/stage2/model"
    printed = capsys.readouterr().out
    assert "TF-IDF" in printed and "from sentence_transformers import SentenceTransformer" in printed
    assert SentenceTransformer(result["model"], truncate_dim=32).encode_query("Deutschland").shape == (32,)
    student = json.loads((tmp_path / "runs/quickstart/evaluation.json").read_text())
    assert list(student["accuracy"]) == ["40", "32", "16", "8"]
    small, large = (
        sum(weights.numel() for weights in SentenceTransformer(each["model"]).parameters())
        for each in (student, result)
    )
    assert 0.2 < small / large < 0.3
    report = load_evaluation(tmp_path / "runs/quickstart/report")
    assert [model.label for model in report.models] == ["runs/quickstart/stage2", "TF-IDF", "runs/quickstart/student"]
    scores = report.select(model="runs/quickstart/stage2", dimension=64, precision="float32")
    mean = sum(score.value * score.examples for score in scores) / result["pairs"]
    assert mean == pytest.approx(result["accuracy"]["64"], abs=1e-4)
    page = (tmp_path / "runs/quickstart/report/report.html").read_text()
    assert "runs/quickstart/student (first) against TF-IDF (second)" in page and page.count("<svg") >= 6


@pytest.mark.slow
def test_quickstart_beats_the_baseline_and_truncates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    result = json.loads((tmp_path / "runs/quickstart/evaluation-stage2.json").read_text())
    accuracy = result["accuracy"]
    assert accuracy["128"] >= 1.4 * result["tfidf"]
    assert accuracy["32"] >= 0.85 * accuracy["128"]
    student = json.loads((tmp_path / "runs/quickstart/evaluation.json").read_text())
    assert student["accuracy"]["40"] >= 1.1 * student["tfidf"]
