"""The card of a checkpoint: which step it is, how it is loaded, and that it is not a finished model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from hub_cards.snippets import snippets
from tests.hub_cards.markdown_pages import HOSTILE, structure
from training.publishing.hub.checkpoint_card import CheckpointFacts, checkpoint_card
from training.publishing.record import Reference

FACTS = CheckpointFacts(
    repository="org/tiny",
    revision="stage1-step-005000",
    stage="stage1",
    step=5000,
    dimensions=(32, 16, 8),
    max_steps=12_000,
    epoch=0.4167,
    metrics={"eval_source/names": 1.0, "eval_loss": 1.5, "loss": 2.25},
    parameters=21_000,
    prompts={"query": "Instruct: Find it.\nQuery: ", "document": ""},
    start=Reference("hub", "org/base"),
    teacher=Reference("local", "teacher"),
    languages=("deu", "swa"),
    finished=True,
)


def test_it_says_what_it_is_and_is_loaded_by_its_revision():
    card = checkpoint_card(FACTS)
    assert "# tiny, stage1, step 5,000\n" in card and "**Not a finished model**" in card
    assert "| step | 5,000 of 12,000 |" in card and "| epoch | 0.417 |" in card
    assert "The finished model is [org/tiny](https://huggingface.co/org/tiny)." in card
    # Those of all data first.
    assert card.index("| `eval_loss` | 1.5 |") < card.index("| `loss` | 2.25 |") < card.index("| `eval_source/names`")
    data = ModelCard(card).data
    assert (data.base_model, data.language) == ("org/base", ["de", "sw"])
    assert "intermediate-checkpoint" in data.tags and data.eval_results is None
    assert 'SentenceTransformer("org/tiny", revision="stage1-step-005000")' in snippets(card)["checkpoint"]


def test_what_is_not_known_is_not_there():
    nothing = {"metrics": {}, "prompts": {}, "start": None, "teacher": None, "languages": (), "finished": False}
    card = checkpoint_card(replace(FACTS, **nothing))
    assert "None was logged." in card and "Texts carry no instruction." in card
    assert not any(word in card for word in ("teacher", "started from", "finished model is"))
    assert {"base_model", "language"}.isdisjoint(ModelCard(card).data.to_dict())


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_change_no_structure(text):
    def renamed(added):
        return replace(
            FACTS,
            repository=f"org/tiny {added}",
            stage=f"stage1 {added}",
            revision=f"step {added}",
            metrics={f"eval_source/names {added}": 1.0},
            teacher=Reference("local", f"teacher {added}"),
        )

    card = checkpoint_card(renamed(text))
    assert structure(card) == structure(checkpoint_card(renamed("x")))
    compile(snippets(card)["checkpoint"], "checkpoint", "exec")
