from __future__ import annotations

import pytest

from modeling_f2llm.sentence_transformer import build_sentence_transformer
from training.common.errors import UserError
from training.common.run_folder import manifest_of, run_of
from training.evaluation.places import revisions_of
from training.models.reference import find_model


@pytest.fixture
def model(tiny_model, tiny_tokenizer):
    return build_sentence_transformer(tiny_model, tiny_tokenizer)


def test_a_run_stands_for_its_model_and_else_for_its_newest_checkpoint(tmp_path, model):
    for name in ("checkpoint-9", "checkpoint-10"):
        model.save_pretrained(str(tmp_path / "stage" / name))
    assert find_model(str(tmp_path / "stage"), None) == (str(tmp_path / "stage" / "checkpoint-10"), None)
    model.save_pretrained(str(tmp_path / "stage" / "model"))
    assert find_model(str(tmp_path / "stage"), None) == (str(tmp_path / "stage" / "model"), None)
    assert find_model("owner/name", "step-3") == ("owner/name", "step-3")
    with pytest.raises(UserError, match="name one of its stages: stage"):
        find_model(str(tmp_path), None)


def test_revisions_out_of_reach_are_one_line():
    with pytest.raises(UserError, match="its revisions cannot be listed"):
        revisions_of("nobody/nothing")


def test_the_manifest_of_a_run_is_found(tmp_path):
    folder = tmp_path / "model"
    assert run_of(str(folder)) is None
    manifest = tmp_path / "manifest.yaml"
    (tmp_path / "recipe.yaml").write_text(f"manifest: {manifest}\n")
    assert run_of(str(folder)) == run_of(str(tmp_path)) == tmp_path
    assert manifest_of(tmp_path) is None
    manifest.write_text("sources: []\n")
    assert manifest_of(tmp_path) == manifest
