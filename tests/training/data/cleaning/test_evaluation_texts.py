"""Evaluation texts: the same from every kind of file, from every layout of an mteb task, and refused by name."""

from __future__ import annotations

import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from training.data.cleaning.evaluation_texts import evaluation_file, evaluation_tasks

ROWS = pd.DataFrame({"id": [1, 2], "question": ["Who?", "Where\nnow?"], "answer": ["Über, “quoted”", "東京"]})
TEXTS = [("question", "Who?"), ("answer", "Über, “quoted”"), ("question", "Where\nnow?"), ("answer", "東京")]
WRITE = {
    "parquet": ROWS.to_parquet,
    "jsonl": lambda path: ROWS.to_json(path, orient="records", lines=True, force_ascii=False),
    "csv": lambda path: ROWS.to_csv(path, index=False),
    "tsv": lambda path: ROWS.to_csv(path, index=False, sep="\t"),
}


def texts_of(argument):
    return [text for _, text in evaluation_file(argument).texts()]


@pytest.mark.parametrize("suffix", WRITE)
def test_named_columns_of_every_kind_of_file(tmp_path, refuses, suffix):
    path = tmp_path / f"set.{suffix}"
    WRITE[suffix](path)
    read = evaluation_file(f"{path}:question,answer")
    assert (read.name, list(read.texts())) == (f"set.{suffix}", TEXTS)
    assert list(evaluation_file(f"{path}:answer").texts()) == TEXTS[1::2]
    with refuses(path, "lacks text", "id, question, answer"):
        evaluation_file(f"{path}:question,text")
    with refuses(path, "needs names of columns", "id, question, answer"):
        evaluation_file(str(path))


def test_lines_lists_and_json_in_parquet_are_texts(tmp_path):
    path = tmp_path / "set.txt"
    path.write_text("one\n\ntwo\n")
    assert texts_of(str(path)) == ["one", "two"]
    pq.write_table(pa.table({"sentences": [["a", None, "b"], [], ["c"]]}), tmp_path / "set.parquet")
    assert texts_of(f"{tmp_path}/set.parquet:sentences") == ["a", "b", "c"]
    mixed = Dataset.from_dict({"a": ["大熊猫", 3], "b": [["竹"], ["y", 2]]}, on_mixed_types="use_json")
    mixed.to_parquet(tmp_path / "set.parquet")
    assert texts_of(f"{tmp_path}/set.parquet:a,b") == ["大熊猫", "竹", "y"]


@pytest.mark.parametrize(
    ("argument", "content", "part"),
    [
        ("none.csv:text", None, "no such evaluation file"),
        ("set.csv:question", b"", "cannot be read"),
        ("set.parquet:question", b"no parquet", "cannot be read"),
        ("set.jsonl:question", b'{"question": "a"}\n["b"]\n', "cannot be read"),
        ("set.docx:question", b"a", ".parquet"),
        ("set.txt:question", b"a", "lacks question"),
    ],
)
def test_faulty_files_are_refused(tmp_path, refuses, argument, content, part):
    if content is not None:
        (tmp_path / argument.split(":")[0]).write_bytes(content)
    with refuses(argument.split(":")[0], part):
        texts_of(f"{tmp_path}/{argument}")


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_texts_of_tables_are_not_guessed_at(tmp_path, suffix):
    texts = ["NA", "null", "None", "00001", "1e5", "True", "2020-01-01", *["12"] * 20_000, "0.50", "text"]
    (tmp_path / f"set.{suffix}").write_text("\n".join(["text", *texts]) + "\n", encoding="utf-8")
    assert texts_of(f"{tmp_path}/set.{suffix}:text") == texts


def fake_task(name, data, **attributes):
    """What is used of an mteb task."""

    def load_data():
        if isinstance(data, Exception):
            raise data
        task.dataset = data

    metadata = SimpleNamespace(name=name, revision=f"{name}-1")
    task = SimpleNamespace(metadata=metadata, eval_splits=["test"], load_data=load_data, **attributes)
    return task


def tasks():
    table = Dataset.from_dict
    corpus = table({"id": ["d1"], "title": ["Pandas"], "text": ["They eat bamboo."]})
    queries = table({"id": ["q1"], "text": [[{"role": "user", "content": "Who eats?"}]]})
    retrieval = {"corpus": corpus, "queries": queries, "relevant_docs": {"q1": {"d1": 1}}, "top_ranked": None}
    sts = {name: table({"sentence1": [f"{name} a"], "sentence2": ["b"], "score": [1.0]}) for name in ("train", "test")}
    intents = table({"text": ["Hallo"], "label_text": ["gruß"]})
    clusters = table({"sentences": [["x", "y"], ["z"]], "labels": [["l", "l"], ["l"]]})
    return [
        fake_task("Retrieval", {"default": {"test": retrieval}}),
        fake_task("STS", sts, column_names=("sentence1", "sentence2")),
        fake_task("Intent", {"de": {"test": intents}}, input_column_name="text", label_column_name="label_text"),
        fake_task("Clusters", {"test": clusters}, input_column_name="sentences"),
        fake_task("Bitext", {"test": table({"eng_Latn": ["one"], "deu_Latn": ["eins"], "id": ["1"]})}),
        fake_task("Broken", OSError("no network")),
    ]


@pytest.fixture
def mteb(monkeypatch):
    known = {task.metadata.name: task for task in tasks()}
    known["Both"] = SimpleNamespace(tasks=[known["STS"], known["Intent"]])

    def get_tasks(tasks):
        for name in tasks:
            if name not in known:
                raise KeyError(f"'{name}' not found. Did you mean: 'STS'?")
        return [known[name] for name in tasks]

    module = ModuleType("mteb")
    module.get_tasks = get_tasks
    monkeypatch.setitem(sys.modules, "mteb", module)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("Retrieval", {"corpus.title": "Pandas", "corpus.text": "They eat bamboo.", "queries.text": "Who eats?"}),
        ("STS", {"sentence1": "test a", "sentence2": "b"}),
        ("Intent", {"text": "Hallo"}),
        ("Clusters", {"sentences": "xyz"}),
        ("Bitext", {"eng_Latn": "one", "deu_Latn": "eins"}),
    ],
)
def test_every_layout_of_a_task_gives_its_evaluated_texts(mteb, name, texts):
    (task,) = evaluation_tasks([name])
    assert (task.name, task.version()) == (name, [name, f"{name}-1"])
    found = defaultdict(str)
    for column, text in task.texts():
        found[column] += text
    assert found == texts


def test_tasks_of_others_and_those_that_cannot_be_had(mteb, refuses, monkeypatch):
    assert [task.name for task in evaluation_tasks(["Both", "STS"])] == ["STS", "Intent"]
    with refuses("unknown mteb task", "'STZ'", "Did you mean: 'STS'"):
        evaluation_tasks(["STS", "STZ"])
    (broken,) = evaluation_tasks(["Broken"])
    with refuses("'Broken'", "no network", "give its texts as a file"):
        list(broken.texts())
    monkeypatch.setitem(sys.modules, "mteb", None)
    with refuses("mteb", "pip install 'f2llm[eval]'"):
        evaluation_tasks(["STS"])


def test_a_csv_file_with_a_trailing_comma_keeps_its_columns(tmp_path):
    (tmp_path / "e.csv").write_text("query,passage\nwhat is a cat,a small animal,\n", encoding="utf-8")
    assert texts_of(f"{tmp_path / 'e.csv'}:query") == ["what is a cat"]
