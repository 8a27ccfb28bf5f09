"""The same rows in every form in which users have them."""

from __future__ import annotations

import gzip
import json

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

# The last passage has what csv files must quote.
ROWS = [(f"question {n}", f"answer {n}", f"wrong {n}") for n in range(11)] + [
    ("größer?", 'so,\r\n"sagt" man; ja', "東京")
]


def _lines(path, rows, opened=open):
    path.parent.mkdir(parents=True, exist_ok=True)
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def _frame(query="query", passage="passage", negative="negative"):
    return pd.DataFrame(ROWS, columns=[query, passage, negative])


def _csv(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    _frame().to_csv(path, index=False, **options)
    return path


def _jsonl(folder, name, of_row):
    return _lines(folder / name, [of_row(*row) for row in ROWS])


def _json(folder):
    (folder / "own.json").write_text(json.dumps([dict(zip("qpn", row, strict=True)) for row in ROWS]))
    return folder / "own.json"


def _parquet(folder):
    pq.write_table(pa.Table.from_pandas(_frame("anchor", "positive"), preserve_index=False), folder / "own.parquet")
    return folder / "own.parquet"


def _arrow(folder):
    table = pa.Table.from_pandas(_frame(), preserve_index=False)
    with pa.ipc.new_stream(str(folder / "own.arrow"), table.schema) as writer:
        writer.write_table(table)
    return folder / "own.arrow"


def _saved(folder):
    datasets.Dataset.from_pandas(_frame("question", "answer", "neg")).save_to_disk(folder / "own")
    return folder / "own"


def _folder(folder):
    for part in range(2):
        rows = [{"query": query, "passage": passage, "negative": negative} for query, passage, negative in ROWS]
        _lines(folder / "own" / f"part-{part}.jsonl", rows[part * 6 : part * 6 + 6])
    return folder / "own"


def _published(folder):
    pq.write_table(pa.Table.from_pandas(_frame(negative="negative_1"), preserve_index=False), folder / "own.parquet")
    return folder / "own.parquet"


def document(text):
    return {"docid": f"id of {text}", "title": "", "text": text}


def write_beir(folder, judged=()):
    """Folders of BEIR: passages have grade 2, negatives 0; ``judged`` are further lines."""
    texts = [text for _, passage, negative in ROWS for text in (passage, negative)]
    _lines(folder / "queries.jsonl", [{"_id": str(n), "text": query} for n, (query, _, _) in enumerate(ROWS)])
    (folder / "qrels").mkdir()
    lines = [line for n in range(len(ROWS)) for line in (f"{n}\td{2 * n}\t2", f"{n}\td{2 * n + 1}\t0")]
    corpus = [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate([*texts, "unjudged"])]
    _lines(folder / "corpus.jsonl", corpus)
    (folder / "qrels/train.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines, *judged]))
    return folder


# Each writes the rows into a folder and returns what the user gives; the second part are words of --columns.
FORMS = {
    "jsonl": (lambda f: _jsonl(f, "own.jsonl", lambda q, p, n: {"question": q, "answer": p, "negative": n}), ()),
    "jsonl.gz": (lambda f: _lines(f / "own.jsonl.gz", _frame().to_dict("records"), gzip.open), ()),
    "json": (_json, ("query=q", "passage=p", "negative=n")),
    "csv": (lambda f: _csv(f / "own.csv"), ()),
    "csv of a spreadsheet": (lambda f: _csv(f / "own.csv", sep=";", encoding="utf-8-sig", lineterminator="\r\n"), ()),
    "tsv": (lambda f: _csv(f / "own.tsv", sep="\t"), ()),
    "csv.bz2": (lambda f: _csv(f / "own.csv.bz2"), ()),
    "parquet": (_parquet, ()),
    "arrow": (_arrow, ()),
    "save_to_disk": (_saved, ()),
    "folder": (_folder, ()),
    "other names": (
        lambda f: _jsonl(f, "own.jsonl", lambda q, p, n: {"Frage": q, "Antwort": p, "falsch": n}),
        ("query=Frage", "passage=Antwort", "negative=falsch"),
    ),
    "triplets": (lambda f: _jsonl(f, "own.jsonl", lambda q, p, n: {"anchor": q, "positive": p, "negative_1": n}), ()),
    "FlagEmbedding": (lambda f: _jsonl(f, "own.jsonl", lambda q, p, n: {"query": q, "pos": [p, p], "neg": [n, p]}), ()),
    "Tevatron": (
        lambda f: _jsonl(
            f,
            "own.jsonl",
            lambda q, p, n: {
                **{"query_id": q, "query": q, "positive_passages": [document(p)]},
                "negative_passages": [document(n), document(p)],
            },
        ),
        (),
    ),
    "inline": (lambda f: _jsonl(f, "own.jsonl", lambda q, p, n: {"query": q, "pos_doc": p, "neg_doc": [n]}), ()),
    "BEIR": (lambda f: write_beir(f / "own"), ()),
    "published": (_published, ()),
}
