"""Own data of every form: read as the same rows, recognised by its columns, refused in one line where it is faulty."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from tests.training.data.building.own_forms import FORMS, ROWS, document, write_beir
from training.data.building.build_file import build_sources, check_source, load_source
from training.data.building.recognise import _find, own_entries, own_sources
from training.data.manifest import load_manifest
from training.data.prepared import OFFSETS, TOKENS

INSTRUCTION = {"instruction": "Answer."}


@pytest.fixture
def build(tmp_path):
    """Builds own data and returns the folder."""

    def build(*names, columns=(), **keys):
        seed, sources = own_sources(list(map(str, names)), columns, **keys)
        for source in sources:
            check_source(source, seed, load_source(source, Path()))
        return build_sources(seed, sources, Path(), tmp_path / "built").parent

    return build


def write(path, text):
    path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_rows_is_prepared_to_the_same_bytes(form, build, tmp_path, run, caplog):
    write_form, columns = FORMS[form]
    with caplog.at_level(logging.INFO):
        folder = build(write_form(tmp_path), columns=columns, **INSTRUCTION)
    table = pq.read_table(folder / "own.parquet").select(["query", "passage", "negative_1"])
    assert list(zip(*table.to_pydict().values(), strict=True)) == ROWS
    assert sum("rows, read as queries with passages and negatives" in line for line in caplog.messages) in (1, 2)
    prepared = run(load_manifest(folder / "manifest.yaml"), num_hard_negatives=(("retrieval", 1),), max_length=20)[0]
    bare = run(published(tmp_path), "plain", num_hard_negatives=(("retrieval", 1),), max_length=20)
    for name in (TOKENS, OFFSETS):
        assert np.array_equal(prepared.mapped_files[name], bare.mapped_files[name])
    assert np.array_equal(prepared.rows["train"], bare.rows["train"])


def published(folder):
    """The rows written as the published format by hand."""
    (folder / "plain_data").mkdir()
    pd.DataFrame(ROWS, columns=["query", "passage", "negative_1"]).to_parquet(folder / "plain_data/own.parquet")
    manifest = write(
        folder / "plain_data/m.yaml",
        json.dumps({"sources": [{"name": "own", "files": ["own.parquet"], "task_type": "retrieval", **INSTRUCTION}]}),
    )
    return load_manifest(manifest)[0]


def rows_of(folder, name="own"):
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def test_rows_of_a_query_are_joined_and_no_negative_is_one_of_its_passages(build, tmp_path):
    given = [
        {"query": "q", "pos": ["a", {"title": "T", "text": "b", "id": 7}], "neg": ["B b", "x", "A!"]},
        {"query": "other", "pos": "c", "neg": []},
        {"query": "q", "pos": ["d", 3.0], "neg": [{"id": 7, "text": "another text of the document"}, "d", "y", True]},
    ]
    first, second = rows_of(build(write(tmp_path / "own.jsonl", lines(*given)), **INSTRUCTION))
    assert (first["query"], first["passage"], first["negative_1"]) == ("other", "c", None)
    passages = [second["passage"], *(second[f"positive_{k}"] for k in (2, 3, 4))]
    assert (second["query"], passages) == ("q", ["a", "T b", "d", "3"])
    assert [second[f"negative_{k}"] for k in range(1, 5)] == ["B b", "x", "y", "true"]
    assert (second["positive_2_id"], second["passage_id"] if "passage_id" in second else None) == ("7", None)


def test_scores_ids_and_prompts_of_the_data_are_kept(build, tmp_path):
    row = {"query": "q", "pos": ["a", "b"], "neg": ["x"], "pos_scores": [0.9, 1], "neg_scores": ["0.25"]}
    text = lines({**row, "prompt": "Find it."}, {**row, "query": "r"})
    first, second = rows_of(build(write(tmp_path / "own.jsonl", text), **INSTRUCTION))
    assert (first["query"], second["query"]) == ("Instruct: Find it.\nQuery: q", "r")
    assert [first[f"{name}_score"] for name in ("passage", "positive_2", "negative_1")] == [0.9, 1.0, 0.25]
    row = {"query": "q", "positive_passages": [document("a")], "negative_passages": []}
    (row,) = rows_of(build(write(tmp_path / "own.jsonl", lines(row)), **INSTRUCTION))[:1]
    assert row["passage_id"] == "id of a"


def test_grades_of_beir_are_kept_and_its_split_is_the_one_for_training(build, tmp_path):
    folder = write_beir(tmp_path / "own", judged=["0\td2\t1", "0\td4\t-1"])
    (folder / "qrels/test.tsv").write_text("9\td1\t1\n")
    row = rows_of(build(folder, **INSTRUCTION))[0]
    assert [row[name] for name in ("passage", "passage_score", "positive_2", "positive_2_score")] == [
        ROWS[0][1],
        2,
        ROWS[1][1],
        1,
    ]
    assert {row["negative_1"], row["negative_2"]} == {ROWS[0][2], ROWS[2][1]}
    entries = own_entries([f"{folder}::test"])
    assert [entry["split"] for entry in entries] == ["test"]


def test_labels_become_classes_and_scores_become_graded_pairs(build, tmp_path):
    topics_file = write(tmp_path / "topics.tsv", "text\tlabel\n" + "".join(f"text {n}\t{n % 3}\n" for n in range(60)))
    pairs = write(
        tmp_path / "sts.csv", "sentence1,sentence2,label\n" + "".join(f"a{n},b{n},{n % 2}\n" for n in range(6))
    )
    folder = build(topics_file, pairs, **INSTRUCTION)
    topics, graded = rows_of(folder, "topics"), rows_of(folder, "sts")
    assert len(topics) == 60 and int(topics[0]["query"][5:]) % 3 == int(topics[0]["passage"][5:]) % 3
    assert graded[1] == {"query": "a1", "passage": "b1", "score": 1.0}
    assert [source.task_type for source in load_manifest(folder / "manifest.yaml")] == ["clustering", "similarity"]
    folder = build(topics_file, pairs, held_out_share=0.05, **INSTRUCTION)
    texts = {row["passage"] for row in rows_of(folder, "topics.candidates")}
    assert not texts & {row["query"] for row in rows_of(folder, "topics.held_out")} and len(texts) == 30
    assert not (folder / "sts.candidates.parquet").exists() and len(rows_of(folder, "sts.held_out")) == 3


def test_premises_find_what_they_entail(build, tmp_path):
    given = [(f"premise {n}", f"{label} {n}", label) for n in range(8) for label in range(3)]
    rows = [{"premise": one, "hypothesis": other, "label": label} for one, other, label in given]
    folder = build(write(tmp_path / "nli.jsonl", lines(*rows)), held_out_share=0.05, **INSTRUCTION)
    kept = rows_of(folder, "nli")
    assert len(kept) == len(rows_of(folder, "nli.held_out")) == 4
    number = kept[0]["query"][8:]
    assert (kept[0]["passage"], kept[0]["negative_1"]) == (f"0 {number}", f"2 {number}")
    assert len(rows_of(folder, "nli.candidates")) == 24


def test_held_out_queries_are_in_no_row(build, tmp_path):
    # Every query is also the passage or a negative of another one.
    rows = [
        {"query": f"text {n}", "pos": [f"Text {n + 1}!", f"answer {n}"], "neg": [f"text {n + 2}"]} for n in range(400)
    ]
    folder = build(write(tmp_path / "own.jsonl", lines(*rows)), held_out_share=0.05, **INSTRUCTION)
    held_out, kept = rows_of(folder, "own.held_out"), rows_of(folder)
    queries = {row["query"] for row in held_out}
    assert len(queries) == 100 and len(kept) == 300
    texts = {str(text).strip("!").lower() for row in kept for text in row.values()}
    assert not texts & queries
    assert {row["passage"] for row in held_out} <= {row["passage"] for row in rows_of(folder, "own.candidates")}
    assert json.loads((folder / "build.json").read_text())["sources"]["own"]["held_out"] == 100
    again = build(tmp_path / "own.jsonl", held_out_share=0.05, **INSTRUCTION)
    assert rows_of(again, "own.held_out") == held_out


def test_spellings_of_a_held_out_query_are_one_query_and_of_few_rows_half_stay(build, tmp_path):
    rows = [
        {"question": text, "answer": f"answer to {text}"}
        for n in range(5)
        for text in (f"Question {n}", f"question {n}?")
    ]
    folder = build(write(tmp_path / "own.jsonl", lines(*rows)), held_out_share=0.05, **INSTRUCTION)
    assert (len(rows_of(folder)), len(rows_of(folder, "own.held_out"))) == (6, 4)


def test_data_to_evaluate_on_alone_is_no_source(build, tmp_path):
    rows = write(tmp_path / "else.jsonl", lines(*({"question": f"q{n}", "answer": f"a{n}"} for n in range(9))))
    seed, sources = own_sources([str(rows)], held_out_share=1)
    folder = build_sources(seed, sources, Path(), tmp_path / "built").parent
    assert len(rows_of(folder, "else.held_out")) == len(rows_of(folder, "else.candidates")) == 9
    assert not (folder / "else.parquet").exists()


GOOD, PAIR = {"query": "g", "pos": ["h"]}, {"sentence1": "a", "sentence2": "b"}
FAULTY = {
    "broken.jsonl": (lines({"query": "a", "pos": ["b"]}) + '{"query": "x', "line 2", "not valid JSON"),
    "item.jsonl": (lines({"query": "a", "pos": ["b"]}, ["a"]), "line 2", "not a JSON object"),
    "null.jsonl": (lines({"query": "a", "pos": "b"}, {"query": None, "pos": "b"}), "line 2", "'query'", "quarantine"),
    "blank.csv": ("query,passage\na,b\nc,\n", "row 1", "'passage'", "quarantine"),
    "wide.csv": ("query,passage\na,b\nc,d,e\n", "line 3"),
    "empty_list.jsonl": (
        lines({"query": "a", "pos": ["b"]}, {"query": "c", "pos": [], "neg": ["d"]}),
        "line 2",
        "'pos'",
    ),
    "object.jsonl": (lines(GOOD, {"query": "a", "pos": [{"words": "b"}]}), "line 2", "'pos'", "words", "text"),
    "nested.jsonl": (lines(GOOD, {"query": "a", "pos": [{"text": ["b"]}]}), "line 2", "'pos'", "not text"),
    "few_scores.jsonl": (
        lines(GOOD, {"query": "a", "pos": ["b", "c"], "pos_scores": [1]}),
        "line 2",
        "'pos_scores'",
        "1 values",
    ),
    "score.jsonl": (
        lines({**PAIR, "score": 1}, {**PAIR, "sentence1": "c", "score": 17}),
        "line 2",
        "'score'",
        "17",
        "0 to 5",
    ),
    "score.csv": ("sentence1,sentence2,score\na,b,0.5\nc,d,high\n", "row 1", "'score'", "not a number"),
    "two.csv": ("question,anchor,answer\na,b,c\nd,e,f\n", "'question', 'anchor'", "--columns query=question"),
    "answers.csv": ("question,answer,document\na,b,c\n", "'answer', 'document'", "--columns passage="),
    "one.csv": ("question,answer\na,b\n", "1 rows", "at least two"),
    "header.csv": ("question,answer\n", "cannot load"),
    "empty.jsonl": ("", "is empty"),
    "binary.csv": (bytes(range(256)), "not UTF-8 text", "save it as UTF-8"),
    "zeros.jsonl": (b"\0\1\2", "no text file"),
    "latin.csv": (b"query,passage\n" + "größer,so\n".encode("latin-1"), "not UTF-8 text"),
    "cut.parquet": (b"PAR1 and no more", "cannot load"),
    "cut.jsonl.gz": (b"\x1f\x8b\x08\0\0\0\0\0", "cannot be read"),
    "letter.docx": ("a", ".jsonl", "its name may end with"),
    "label.csv": ("text,label\na,x\nb,x\n", "no row is left", "no other text"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_faulty_files(name, build, tmp_path, refuses):
    content, *parts = FAULTY[name]
    with refuses(name, *parts):
        build(write(tmp_path / name, content), held_out_share=0.05, **INSTRUCTION)
    assert not (tmp_path / "built").exists()


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("q9\td1\t1", ("line 26", "'q9'", "queries.jsonl")),
        ("1\tnowhere\t1", ("line 26", "'nowhere'", "corpus.jsonl")),
        ("1 d1 1", ("line 26", "separated by tabs")),
        ("1\td1\thigh", ("line 26", "grade")),
    ],
)
def test_faulty_judgements(line, parts, build, tmp_path, refuses):
    with refuses("train.tsv", *parts):
        build(write_beir(tmp_path / "own", [line]), **INSTRUCTION)


def test_what_is_not_there(build, tmp_path, refuses):
    (tmp_path / "nothing").mkdir()
    with refuses("nothing", "no data file"):
        build(tmp_path / "nothing")
    with refuses("gone.csv", "no such file"):
        build(tmp_path / "gone.csv")
    with refuses("manifest.yaml", "--manifest"):
        build(write(tmp_path / "nothing/manifest.yaml", "sources: []").parent)
    pairs = write(tmp_path / "pairs.csv", "query,passage\na,b\nc,d\n")
    for words, parts in ((["frage=x"], ("ROLE=COLUMN", "query")), (["query=x"], ("no column 'x'", "query, passage"))):
        with refuses(*parts):
            build(pairs, columns=words)


def test_names_of_the_hub():
    place = {"dataset": "org/name", "split": "train"}
    assert _find("org/name") == [place]
    assert _find("org/name:de:test") == [{**place, "config": "de", "split": "test"}]
    assert _find("org/name::test") == [{**place, "split": "test"}]


def test_an_unknown_file_is_shown_with_the_line_to_type(build, tmp_path):
    path = write(tmp_path / "own.csv", "Frage,Antwort\n" + "".join(f"was {n},das {n}\n" for n in range(9)))
    with pytest.raises(Exception) as caught:
        build(path)
    message = str(caught.value)
    assert "Columns: Frage, Antwort" in message and "was 2" in message and "was 3" not in message
    assert message.endswith("--columns query=Frage passage=Antwort")


def test_bad_rows_can_be_left_out(build, tmp_path):
    text = lines(
        {"query": "a", "pos": ["b"]}, {"query": "", "pos": ["b"]}, {"query": "c", "pos": []}, {"query": "d", "pos": "e"}
    )
    folder = build(write(tmp_path / "own.jsonl", text), on_bad_row="quarantine", **INSTRUCTION)
    assert len(rows_of(folder)) == 2
    assert json.loads((folder / "build.json").read_text())["sources"]["own"]["dropped"] == {"row is faulty": 2}


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("other.csv", "question,answer\n" + "".join(f"Text {n}!,reply {n}\n" for n in range(300))),
        (
            "nli.jsonl",
            lines(
                *(
                    {"premise": f"text {n}", "hypothesis": f"text {n + 1 + k}", "label": k}
                    for n in range(300)
                    for k in (0, 2)
                )
            ),
        ),
        (
            "pairs.jsonl",
            lines(*({"sentence1": f"other {n}", "sentence2": f"text {n}", "score": n % 5} for n in range(300))),
        ),
        ("topics.jsonl", lines(*({"text": f"text {n}", "label": n % 5} for n in range(300)))),
    ],
)
def test_what_one_file_holds_out_no_file_trains_on(name, rows, build, tmp_path):
    own = write(tmp_path / "own.jsonl", lines(*({"query": f"text {n}", "pos": f"answer {n}"} for n in range(400))))
    folder = build(own, write(tmp_path / name, rows), held_out_share=0.05, **INSTRUCTION)
    files = [each.stem for each in (own, tmp_path / name)]
    queries = {row["query"].strip("!").lower() for each in files for row in rows_of(folder, f"{each}.held_out")}
    texts = {str(text).strip("!").lower() for each in files for row in rows_of(folder, each) for text in row.values()}
    assert len(queries) > 100 and not texts & queries


def test_an_unused_label_is_asked_for(build, tmp_path, refuses):
    rows = [{"question": f"q{n}", "answer": f"a{n}", "label": n % 2} for n in range(4)]
    path = write(tmp_path / "own.jsonl", lines(*rows))
    with refuses("own.jsonl", "'label'", "score=label", "query=question passage=answer", "text=answer label=label"):
        build(path)
    assert "score" in rows_of(build(path, columns=["score=label"], **INSTRUCTION))[0]
    assert len(rows_of(build(path, columns=["query=question", "passage=answer"], **INSTRUCTION))) == 4


def test_names_that_mean_something_else(build, tmp_path, refuses):
    rows = [{"source": "wiki", "text": f"text {n}", "label": n % 3} for n in range(30)]
    assert len(rows_of(build(write(tmp_path / "own.jsonl", lines(*rows)), **INSTRUCTION))) == 30
    with refuses("'Query', 'query'", "--columns query="):
        build(write(tmp_path / "own.csv", "Query,query,passage\na,b,c\nd,e,f\n"))


def test_paths_lead_through_lists_to_every_text(build, tmp_path):
    rows = [{"q": {"text": f"q{n}"}, "found": [{"p": f"a{n}"}, {"p": [f"b{n}"]}, {}]} for n in range(3)]
    columns = ["query=q.text", "passage=found.p"]
    (first, *_) = rows_of(build(write(tmp_path / "own.jsonl", lines(*rows)), columns=columns, **INSTRUCTION))
    assert first == {"query": "q0", "passage": "a0", "positive_2": "b0"}


def test_ids_and_scores_belong_to_the_text_beside_them(build, tmp_path):
    columns = {"query": ["a", "b"], "passage": ["c", "d"], "positive_2": ["e", None], "positive_3": ["f", "g"]}
    columns |= {"positive_3_id": ["7", "8"], "passage_score": [0.5, None]}
    pd.DataFrame(columns).to_parquet(tmp_path / "own.parquet")
    first, second = rows_of(build(tmp_path / "own.parquet", **INSTRUCTION))
    assert (first["positive_3_id"], first["passage_score"], first["positive_2_id"]) == ("7", 0.5, None)
    assert (second["positive_2"], second["positive_2_id"], second["passage_score"]) == ("g", "8", None)


def test_files_and_folders_of_other_splits_are_left_out(build, tmp_path, refuses):
    for part in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "validation/part"):
        path = tmp_path / "own/data" / f"{part}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, lines(*({"query": f"{part} {n}", "pos": "a"} for n in range(3))))

    assert {row["query"][:5] for row in rows_of(build(tmp_path / "own", **INSTRUCTION))} == {"train"}
    assert len(rows_of(build(f"{tmp_path / 'own'}::test", **INSTRUCTION))) == 3
    with refuses("'nope'"):
        build(f"{tmp_path / 'own'}::nope")


def test_the_only_saved_split_is_read(build, tmp_path, refuses):
    rows = datasets.Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"]})
    datasets.DatasetDict({"validation": rows}).save_to_disk(tmp_path / "own")
    assert len(rows_of(build(tmp_path / "own", **INSTRUCTION))) == 2
    datasets.DatasetDict({"test": rows, "dev": rows}).save_to_disk(tmp_path / "two")
    with refuses("two", "test, dev", "name one"):
        build(tmp_path / "two")


def test_files_of_a_folder_with_other_columns_are_other_sources(build, tmp_path):
    (tmp_path / "own").mkdir()
    write(tmp_path / "own/a.csv", "query,passage\na,b\nc,d\n")
    write(tmp_path / "own/b.csv", "passage,query,more\ne,f,1\ng,h,2\n")
    folder = build(tmp_path / "own", **INSTRUCTION)
    assert [len(rows_of(folder, name)) for name in ("own", "own_2")] == [2, 2]


@pytest.mark.parametrize("name", ["own[1].csv", "own*.csv", "own?.csv"])
def test_names_of_files_are_no_patterns(name, build, tmp_path):
    write(tmp_path / name, "query,passage\na,b\nc,d\n")
    write(tmp_path / "own2.csv", "query,passage\ne,f\n")
    folder = build(tmp_path / name, **INSTRUCTION)
    assert sum(len(rows_of(folder, file.stem)) for file in folder.glob("*.parquet")) == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own.csv", '"query";"passage";"notes, of, all, kinds"\n"a, b";"c";1\nd;e;2\n'),
        ("own.tsv", "query\tpassage\tnotes, of, all, kinds\na, b\tc\t1\nd\te\t2\n"),
    ],
)
def test_separators_within_names(name, text, build, tmp_path):
    assert rows_of(build(write(tmp_path / name, text), **INSTRUCTION))[0] == {"query": "a, b", "passage": "c"}


def test_texts_of_beir_are_the_same_as_passage_and_as_candidate(build, tmp_path):
    folder = write_beir(tmp_path / "own")
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(lines({"_id": "n", "title": 5, "text": 12}, {"_id": "s", "title": " ", "text": "x"}, {"_id": "e"}))
    build(folder, held_out_share=0.05, **INSTRUCTION)
    texts = [row["passage"] for row in rows_of(tmp_path / "built", "own.candidates")]
    assert texts[-2:] == ["5 12", "x"] and "" not in texts and len(texts) == len({*texts})
