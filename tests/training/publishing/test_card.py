"""Cards of models and checkpoints: every number from record and scores, and nothing that was not measured."""

from __future__ import annotations

import re
from dataclasses import replace

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
from training.publishing.hub.checkpoints import CheckpointFacts, checkpoint_card
from training.publishing.record import AdapterRecord, Reference, StageRecord

ADAPTER = AdapterRecord(Reference("hub", "org/big"), "stated", 8, 16.0, ("q_proj", "v_proj"), parameters=21_000)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = write_release(tmp_path_factory.mktemp("packed") / NAME, evaluation=evaluate())
    draw_figures(folder)
    return folder


@pytest.fixture(scope="module")
def card(packed):
    return model_card(packed, f"org/{NAME}")


@pytest.fixture
def card_of(tmp_path):
    """The card of a release with some changes, of which there are neither scores nor losses."""
    return lambda **changes: model_card(write_release(tmp_path, make_release(**changes), losses=False), f"org/{NAME}")


def rows_of(card, first):
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


def test_exits_are_offered_with_what_to_choose_for_a_budget(tmp_path):
    evaluation, release = evaluate(), make_release()
    (whole,) = [each for each in evaluation.models if each.name == NAME]
    smaller = whole.of_exit(1, 10_000)
    evaluation.add_model(smaller)
    # Three texts less of every language, at full width; four less at the next.
    for score in evaluation.select(model=NAME, precision="float32"):
        if score.dimension > 8:
            lost = 0.3 if score.dimension == 32 else 0.2
            value = max(score.value - lost, 0.0)
            evaluation.scores.append(replace(score, model=smaller.label, value=value))
    release = replace(release, shape={**release.shape, "exit_layers": [1, 2]})
    card = model_card(write_release(tmp_path, release, evaluation=evaluation), f"org/{NAME}")
    assert "The first 1 of 2 layers are models, too" in card
    assert 'config_kwargs={"num_hidden_layers": 1})' in card
    # In bf16; where one bit of the larger model scores better at less, the row is not there.
    assert [
        cell for line in card.splitlines() if line.startswith("| 0.02 | 1 |") for cell in line.split("|")[3:-1]
    ] == [
        *(" 16 ", " float32 ", " 64 ", " 17.5 "),
        *(" 32 ", " float32 ", " 128 ", " 25.0 "),
    ]
    assert rows_of(card, "0.042")[1:] == ["2", "8", "binary", "1", "10.0"]
    assert "Fewer layers" not in model_card(write_release(tmp_path / "other", make_release()), NAME)


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


def test_what_is_not_known_is_not_there(card_of):
    card = card_of(dimensions=(32,), language_rows={}, prompts={"query": "", "document": ""})
    assert not re.search(r"^#+ (Truncation|By script|By language|Beside other models)$", card, re.MULTILINE)
    assert "This model was not evaluated." in card and "No score of this model came with it" in card
    assert "![" not in card and 'dimensions":' not in card and "prompt_name" not in card
    assert ModelCard(card).data.eval_results is None and "matryoshka" not in ModelCard(card).data.tags
    assert "Neither queries nor documents carry an instruction" in card
    card = card_of(stages=())
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
def test_the_relation_to_the_base_if_that_is_public(card_of, kind, starts, named, relation, base):
    merged = {"method": "mean", "models": ["org/a", "org/b"], "weights": [0.5, 0.5]} if kind == "merging" else {}
    parents = tuple(starts) if merged else ()
    card = card_of(stages=(StageRecord("last", kind, starts[0], arguments=merged, parents=parents),))
    data = ModelCard(card).data.to_dict()
    assert (data.get("base_model"), data.get("base_model_relation")) == (base, relation)
    assert rows_of(card, "made from")[1].startswith(named)


def test_an_adapter_names_its_base_or_the_base_that_it_was_merged_into(card_of):
    card = card_of(adapter=ADAPTER)
    data = ModelCard(card).data
    assert (data.base_model, data["base_model_relation"]) == ("org/big", "adapter")
    assert {"peft", "lora"} <= set(data.tags) and "text-embeddings-inference" not in data.tags
    assert rows_of(card, "adapter")[1] == "LoRA, rank 8, alpha 16, on `q_proj`, `v_proj`"
    assert rows_of(card, "size of the adapter")[1] == "0.042 MB"
    assert list(snippets(card)) == ["sentence-transformers", "transformers"]
    assert 'AutoModel.from_pretrained("org/big")' in card and f'PeftModel.from_pretrained(base, "org/{NAME}")' in card
    assert "is stated; it was not checked" in card and "docker" not in card
    base = Reference("hub", "org/big", "0123456789abcdef")
    stage = StageRecord("lora@merged", "merged_adapter", Reference("local", "big"), arguments={"lora": True})
    card = card_of(adapter=replace(ADAPTER, base=base, match="trained", merged=True), stages=(stage,))
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
    return structure(_renamed(tmp_path_factory.mktemp("benign"), lambda text: f"{text} x"))


def _renamed(folder, rename):
    release = make_release(rename, author=rename("A. Author"))
    # Names in an archive end where a zero does.
    evaluation = evaluate(rename=lambda own: rename(own).replace("\0", "0"))
    return model_card(write_release(folder, release, evaluation), f"org/{NAME}")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_change_no_structure(tmp_path, text, benign_structure):
    card = _renamed(tmp_path, lambda own: f"{own} {text}")
    assert structure(card) == benign_structure
    data = ModelCard(card).data
    assert data.eval_results[0].dataset_name == one_line(f"Names {text}".replace("\0", "0"))
    assert list(snippets(card)) == ["sentence-transformers", "transformers", "remote-code"]
    for name, code in snippets(card).items():
        compile(code, name, "exec")


@pytest.mark.parametrize("kind", ["model", "adapter"])
@pytest.mark.parametrize("document", ["", 'Title: "'])
@pytest.mark.parametrize("query", ["", "Instruct: Find it.\nQuery: "])
def test_other_libraries_are_given_the_prompts(card_of, query, document, kind):
    changes = {"adapter": ADAPTER} if kind == "adapter" else {}
    card = card_of(prompts={"query": query, "document": document}, **changes)
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
    names = {"print": lambda *_: None}
    exec(snippets(card)["sentence-transformers"], names)
    queries, documents = (names[f"{side}_embeddings"][:, :8] for side in ("query", "document"))
    exec(code, {**names, "print": printed.append})
    expected = torch.nn.functional.cosine_similarity(torch.tensor(queries)[:, None], torch.tensor(documents)[None], -1)
    torch.testing.assert_close(printed[0], expected, atol=1e-5, rtol=0)


def test_the_export_that_the_card_names_is_a_command(card, tmp_path):
    (command,) = re.findall(r"^python training/export.py (.*)$", card, re.MULTILINE)
    # The command has these options: what it lacks is the model.
    assert export.main(command.replace("model --", f"{tmp_path / 'model'} --").split()) == 2


# Checkpoints

FACTS = CheckpointFacts(
    **{"repository": "org/tiny", "revision": "stage1-step-005000", "languages": ("deu", "swa"), "finished": True},
    **{"stage": "stage1", "step": 5000, "max_steps": 12_000, "epoch": 0.4167, "parameters": 21_000},
    metrics={"eval_source/names": 1.0, "eval_loss": 1.5, "loss": 2.25},
    prompts={"query": "Instruct: Find it.\nQuery: ", "document": ""},
    dimensions=(32, 16, 8),
    start=Reference("hub", "org/base"),
    teacher=Reference("local", "teacher"),
)


def test_a_checkpoint_says_what_it_is_and_is_loaded_by_its_revision():
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


def test_what_is_not_known_of_a_checkpoint_is_not_there():
    nothing = {"metrics": {}, "prompts": {}, "start": None, "teacher": None, "languages": (), "finished": False}
    card = checkpoint_card(replace(FACTS, **nothing))
    assert "None was logged." in card and "Texts carry no instruction." in card
    assert not any(word in card for word in ("teacher", "started from", "finished model is"))
    assert {"base_model", "language"}.isdisjoint(ModelCard(card).data.to_dict())


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_change_no_structure_of_the_card_of_a_checkpoint(text):
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
