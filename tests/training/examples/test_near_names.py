"""Names within one edit: those that a table of distances finds; the command splits the accuracy by them."""

from __future__ import annotations

import itertools

import pyarrow as pa
import pyarrow.parquet as pq

from modeling_f2llm import build_sentence_transformer
from training.data.manifest import write_manifest
from training.examples.near_names import main, within_one_edit


def _distance(one: str, other: str) -> int:
    """Levenshtein's table, row by row."""
    row = list(range(len(other) + 1))
    for i, char in enumerate(one, 1):
        previous, row = row, [i]
        for j, against in enumerate(other, 1):
            row.append(min(row[-1] + 1, previous[j] + 1, previous[j - 1] + (char != against)))
    return row[-1]


def test_texts_within_one_edit_are_those_of_levenshteins_distance():
    words = ["".join(each) for size in range(5) for each in itertools.product("ab", repeat=size)]
    for chosen in (["abab"], ["", "bbb"], ["aab", "ba"]):
        expected = [min(_distance(word, other) for other in chosen) <= 1 for word in words]
        assert within_one_edit(words, chosen).tolist() == expected
    assert within_one_edit(["ＫＥＮＩＡ", "Straße"], ["Kenya", "STRASSEN"]).tolist() == [True, True]
    assert not within_one_edit(["Togo"], []).any()


def test_the_command_leaves_out_near_names(tmp_path, capsys, tiny_model, tiny_tokenizer):
    build_sentence_transformer(tiny_model, tiny_tokenizer).save_pretrained(str(tmp_path / "model"))
    names = [f"river {'x' * 3 * i}" for i in range(12)]
    rows = {"query": names[:2], "passage": names[2:4], "negative_1": ["orbit"] * 2}
    pq.write_table(pa.table(rows), tmp_path / "names.parquet")
    about = {"task_type": "retrieval", "symmetric": False, "instruction": "Retrieve.", "languages": ["eng"]}
    entry = {"name": "names", "files": ["names.parquet"], **about, "licence": "MIT"}
    write_manifest(tmp_path / "manifest.yaml", [entry])
    held_out = [f"{name}y" for name in names]
    pq.write_table(pa.table({"query": held_out, "passage": names}), tmp_path / "held_out.parquet")
    pq.write_table(pa.table({"passage": names}), tmp_path / "candidates.parquet")
    assert main([str(tmp_path / "model"), "--data", str(tmp_path)]) == 0
    head, _, own, tfidf = capsys.readouterr().out.splitlines()
    assert head == "| accuracy@1 | all 12 names | 8 far from training names |"
    assert own.startswith(f"| {tmp_path / 'model'} | ") and tfidf.startswith("| TF-IDF | ")
    assert all(0 <= float(cell) <= 1 for line in (own, tfidf) for cell in line.split("|")[2:4])
    assert main(["--data", str(tmp_path / "none")]) == 2
    assert "no such file" in capsys.readouterr().err
