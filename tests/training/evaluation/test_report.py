"""The page holds its tables and figures, and nothing from outside."""

from __future__ import annotations

import json
from pathlib import Path

from tests.training.evaluation.synthetic import evaluation
from training.evaluation.report import main


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    evaluation().save(tmp_path)
    assert main([str(tmp_path), "--compare", "large", "small"]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4 and page.count("<table") == 5
    assert 'src="' not in page and 'href="http' not in page and "the first is better" in page
    assert main([str(tmp_path), "--compare", "large", "huge"]) == 2


def test_the_page_shows_the_curves_of_a_run(tmp_path: Path) -> None:
    evaluation().save(tmp_path)
    log = [{"step": step, "loss_source/names": 1 / step, "eval_source/names": 2 / step} for step in range(1, 5)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert main([str(tmp_path), "--run", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<svg") == 5
    assert main([str(tmp_path), "--run", str(tmp_path / "none")]) == 2
