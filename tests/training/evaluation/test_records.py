"""Records of an evaluation are read back as they were written."""

from __future__ import annotations

import numpy as np
import pytest

from tests.training.evaluation.synthetic import score
from training.evaluation.records import Evaluation, ModelRecord, bytes_per_vector, load_evaluation


def test_an_evaluation_is_read_back(tmp_path):
    made, models = score(), [ModelRecord("m", None, 100, 64, 10.5)]
    written = Evaluation(models, [made], {made.key: np.array([0, 1, 0.5], np.float32)}, {"other": "offline"})
    written.save(tmp_path / "run")
    read = load_evaluation(tmp_path / "run")
    assert (read.models, read.scores, read.failures) == (written.models, written.scores, written.failures)
    np.testing.assert_array_equal(read.examples[made.key], written.examples[made.key])


def test_scores_are_selected_by_their_fields():
    evaluation = Evaluation(scores=[score(), score(dimension=32), score(task="u")])
    assert evaluation.select(task="Names", dimension=32) == [score(dimension=32)]
    assert evaluation.select(evaluation.scores[:2], precision="float32") == evaluation.scores[:2]


@pytest.mark.parametrize(("precision", "expected"), [("float32", 40), ("int8", 10), ("binary", 2)])
def test_bytes_per_vector(precision, expected):
    assert bytes_per_vector(10, precision) == expected


def test_a_folder_without_an_evaluation_is_refused(tmp_path, refuses):
    with refuses(tmp_path, "holds no whole evaluation"):
        load_evaluation(tmp_path)
    (tmp_path / "scores.json").write_text("{}")
    with refuses(tmp_path, "run it again"):
        load_evaluation(tmp_path)
