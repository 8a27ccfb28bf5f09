"""The card of a model: every number from its record and its scores, and nothing that was not measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from hub_cards.markdown import one_line
from hub_cards.snippets import snippets
from modeling_f2llm import build_sentence_transformer
from tests.hub_cards.library_calls import expected_calls, library_calls
from tests.hub_cards.markdown_pages import HOSTILE, structure
from tests.training.publishing.releases import NAME, evaluate, make_release, write_release
from training import export
from training.publishing.card import model_card
from training.publishing.evaluation import draw_figures
from training.publishing.record import AdapterRecord, Reference, StageRecord


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = write_release(tmp_path_factory.mktemp("packed") / NAME, evaluation=evaluate())
    draw_figures(folder)
    return folder


@pytest.fixture(scope="module")
def card(packed: Path) -> str:
    return model_card(packed, f"org/{NAME}")


def rows_of(card: str, first: str) -> list[str]:
    """The cells of the row that begins with a text."""
    line = next(line for line in card.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_metadata_is_what_the_hub_reads(card):
    data = ModelCard(card).data
    assert data.language == ["de", "fi", "ja", "multilingual", "ru", "sw"]
    assert (data.license, data.library_name) == ("apache-2.0", "sentence-transformers")
    assert data.pipeline_tag == "sentence-similarity"
    assert (data.base_model, data["base_model_relation"], data.datasets) == ("org/base", "finetune", ["org/kinds"])
    assert {"matryoshka", "text-embeddings-inference", "qwen3"} <= set(data.tags)
    assert data.model_name == NAME
    name, values = "accuracy_at_1", {result.metric_name: result.metric_value for result in data.eval_results}
    assert values == {name: 0.525, f"{name}, first 16 dimensions": 0.325, f"{name}, first 8 dimensions": 0.25}
    assert {result.task_type for result in data.eval_results} == {"retrieval"}


def test_scores_are_those_of_the_evaluation_at_every_width(card):
    task = rows_of(card, "`Names`")
    assert task[:4] == ["`Names`", "Retrieval", "`accuracy_at_1`", "52.5"] and task[5:] == ["4", "40"]
    low, high = map(float, task[4].split(" – "))
    assert low < 52.5 < high
    assert rows_of(card, "Latn")[1] == "70.0" and rows_of(card, "Latn")[3:] == ["2", "20"]
    assert rows_of(card, "`jpn-Jpan`")[:3] == ["`jpn-Jpan`", "Japanese", "20.0"]
    # One per cent or more of a thousand rows; a tenth of a per cent.
    assert rows_of(card, "1 % of the training rows or more")[1] == "70.0"
    assert rows_of(card, "0.1 % or more")[1] == "35.0"
    assert "Means: over examples 52.5, over languages 52.5." in card
    assert [rows_of(card, f"`{name}`")[3] for name in ("large", NAME, "TF-IDF")] == ["62.5", "52.5", "42.5"]
    assert rows_of(card, "32") == ["32", "128", "52.5", "32", "42.5", "4", "32.5"]
    assert rows_of(card, "8") == ["8", "32", "25.0", "8", "17.5", "1", "10.0"]
    assert "The first 16 of 32 dimensions keep 62 % of the score." in card
    assert "truncate_dim=16)" in card


def test_lineage_and_limits_are_told(card):
    assert rows_of(card, "`stage1`")[1:] == [
        "training",
        "[org/base](https://huggingface.co/org/base) at `0123456789ab`",
        *["–", "90,000", "900", "20", "1", "2.5", "1.25"],
    ]
    assert rows_of(card, "`pruned`")[1:5] == ["pruning", "`stage1`", "–", "21,000"]
    assert rows_of(card, "`student`")[3:] == ["`teacher`", "21,000", "1,000", "10", "0.5", "3.5", "0.75"]
    assert "hard negatives (7 for retrieval, 9 for clustering) and, for retrieval, with the passages" in card
    assert rows_of(card, "`temperature`")[1:] == ["`0.05`", "–", "`0.05`"]
    assert rows_of(card, "`names`")[1:] == ["retrieval", "deu, fin, rus", "MIT", "900", "900", "900"]
    kinds = "`kinds` of [org/kinds](https://huggingface.co/datasets/org/kinds)"
    assert rows_of(card, kinds)[1:] == ["clustering", "jpn, mul", "–", "–", "–", "100"]
    assert "1 of the 5 languages of the training data has no score: `swa`." in card
    assert "Training cut texts after 64 tokens. Longer ones, up to 512" in card
    assert "The scores are of the weights in `float32`; here they are rounded to `bfloat16`." in card
    assert "HeldOutPairs" not in card


def test_what_is_not_known_is_not_there(tmp_path):
    release = make_release(dimensions=(32,), language_rows={}, prompts={"query": "", "document": ""})
    card = model_card(write_release(tmp_path, release, losses=False))
    assert not re.search(r"^#+ (Truncation|By script|By language|Beside other models)$", card, re.MULTILINE)
    assert "This model was not evaluated." in card and "No score of this model came with it" in card
    assert "![" not in card and 'dimensions":' not in card and "prompt_name" not in card
    assert ModelCard(card).data.eval_results is None and "matryoshka" not in ModelCard(card).data.tags
    assert "Neither queries nor documents carry an instruction" in card
    card = model_card(write_release(tmp_path, make_release(stages=()), losses=False))
    assert "No record of its training came with this model." in card
    assert "base_model" not in ModelCard(card).data.to_dict() and "### Settings" not in card


@pytest.mark.parametrize(
    ("kind", "starts", "named", "relation", "base"),
    [
        ("training", [Reference("hub", "org/base")], "[org/base]", "finetune", "org/base"),
        ("merging", [Reference("hub", f"org/{name}") for name in "ab"], "[org/a]", "merge", ["org/a", "org/b"]),
        ("training", [Reference("scratch")], "random weights", None, None),
        ("training", [Reference("local", "mine")], "`mine`", None, None),
    ],
)
def test_the_relation_to_the_base_if_that_is_public(tmp_path, kind, starts, named, relation, base):
    merged = {"method": "mean", "models": ["org/a", "org/b"], "weights": [0.5, 0.5]} if kind == "merging" else {}
    parents = tuple(starts) if merged else ()
    stage = StageRecord("last", kind, starts[0], arguments=merged, parents=parents)
    card = model_card(write_release(tmp_path, make_release(stages=(stage,)), losses=False))
    data = ModelCard(card).data.to_dict()
    assert (data.get("base_model"), data.get("base_model_relation")) == (base, relation)
    assert rows_of(card, "made from")[1].startswith(named)


def test_an_adapter_names_its_base(tmp_path):
    adapter = AdapterRecord(Reference("hub", "org/big"), "stated", 8, 16.0, ("q_proj", "v_proj"), parameters=21_000)
    card = model_card(write_release(tmp_path, make_release(adapter=adapter), losses=False))
    data = ModelCard(card).data
    assert (data.base_model, data["base_model_relation"]) == ("org/big", "adapter")
    assert {"peft", "lora"} <= set(data.tags) and "text-embeddings-inference" not in data.tags
    assert rows_of(card, "adapter")[1] == "LoRA, rank 8, alpha 16, on `q_proj`, `v_proj`"
    assert rows_of(card, "size of the adapter")[1] == "0.042 MB"
    assert list(snippets(card)) == ["sentence-transformers", "transformers"]
    assert 'AutoModel.from_pretrained("org/big")' in card and f'PeftModel.from_pretrained(base, "{NAME}")' in card
    assert "is stated; it was not checked" in card and "docker" not in card


def test_a_merged_adapter_names_the_base_that_it_was_merged_into(tmp_path):
    adapter = AdapterRecord(
        Reference("hub", "org/big", "0123456789abcdef"), "trained", 8, 16.0, ("q_proj",), merged=True
    )
    stage = StageRecord("lora@merged", "merged_adapter", Reference("local", "big"), arguments={"lora": True})
    card = model_card(write_release(tmp_path, make_release(adapter=adapter, stages=(stage,)), losses=False))
    data = ModelCard(card).data
    assert (data.base_model, data["base_model_relation"]) == ("org/big", "finetune") and "peft" not in data.tags
    assert "merged into [org/big](https://huggingface.co/org/big) at `0123456789ab`" in rows_of(card, "adapter")[1]
    assert "An adapter was trained from [org/big]" in card and "Then it was merged into them." in card
    assert list(snippets(card)) == ["sentence-transformers", "transformers", "remote-code"] and "docker" in card


def test_links_to_the_family(packed):
    members = {"org/small": make_release(name="small", parameters=7), "org/first": make_release(parameters=90_000)}
    card = model_card(
        packed, links={"stage1": "org/first"}, datasets=["org/data"], collection="org/family-0123", members=members
    )
    names = ["[org/small](https://huggingface.co/org/small)", f"**{NAME}** (this model)"]
    names.append("[org/first](https://huggingface.co/org/first)")
    family = card[card.index("## The family") : card.index("## Truncation")]
    assert re.findall(r"^\| (\S*\[?\*?.*?) \| 32 \| 2 \| 64 \| 4 / 2 \|", family, flags=re.MULTILINE) == names
    assert rows_of(card, "`pruned`")[2] == names[2]
    assert ModelCard(card).data.datasets == ["org/kinds", "org/data"]
    assert "(https://huggingface.co/collections/org/family-0123)" in card


@pytest.fixture(scope="module")
def benign_structure(tmp_path_factory):
    return structure(_card_of(tmp_path_factory.mktemp("benign"), lambda text: f"{text} x"))


def _card_of(folder: Path, rename: Any) -> str:
    release = make_release(rename, author=rename("A. Author"))
    # Names in an archive end where a zero does.
    evaluation = evaluate(rename=lambda own: rename(own).replace("\0", "0"))
    return model_card(write_release(folder, release, evaluation), f"org/{NAME}")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_change_no_structure(tmp_path, text, benign_structure):
    card = _card_of(tmp_path, lambda own: f"{own} {text}")
    assert structure(card) == benign_structure
    data = ModelCard(card).data
    assert data.eval_results[0].dataset_name == one_line(f"Names {text}".replace("\0", "0"))
    assert list(snippets(card)) == ["sentence-transformers", "transformers", "remote-code"]
    for name, code in snippets(card).items():
        compile(code, name, "exec")


@pytest.mark.parametrize("kind", ["model", "adapter"])
@pytest.mark.parametrize("document", ["", 'Title: "'])
@pytest.mark.parametrize("query", ["", "Instruct: Find it.\nQuery: "])
def test_other_libraries_are_given_the_prompts(tmp_path, query, document, kind):
    adapter = AdapterRecord(Reference("hub", "org/big"), "stated", 8, 16.0, ("q_proj", "v_proj"), parameters=21_000)
    changes = {"adapter": adapter} if kind == "adapter" else {}
    release = make_release(prompts={"query": query, "document": document}, **changes)
    card = model_card(write_release(tmp_path, release, losses=False), f"org/{NAME}")
    expected = expected_calls(f"org/{NAME}", query, document) if query or document else {}
    assert library_calls(card) == expected


def test_the_printed_code_that_truncates_ranks_by_cosine(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    folder = tmp_path / "org" / NAME
    build_sentence_transformer(tiny_model, tiny_tokenizer).save_pretrained(str(folder))
    write_release(folder, make_release(dimensions=[32, 8]), losses=False)
    monkeypatch.chdir(tmp_path)
    card, printed = model_card(folder, f"org/{NAME}"), []
    (code,) = re.findall(r"^## Truncation$.*?^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert "truncate_dim=8)" in code
    names: dict[str, Any] = {"print": lambda *_: None}
    exec(snippets(card)["sentence-transformers"], names)
    queries, documents = (names[f"{side}_embeddings"][:, :8] for side in ("query", "document"))
    exec(code, {**names, "print": printed.append})
    expected = torch.nn.functional.cosine_similarity(torch.tensor(queries)[:, None], torch.tensor(documents)[None], -1)
    torch.testing.assert_close(printed[0], expected, atol=1e-5, rtol=0)


def test_the_export_that_the_card_names_is_a_command(card, tmp_path):
    (command,) = re.findall(r"^python training/export.py (.*)$", card, re.MULTILINE)
    # The command has these options: what it lacks is the model.
    assert export.main(command.replace("model --", f"{tmp_path / 'model'} --").split()) == 2
