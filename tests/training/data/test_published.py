"""The published format: what is read, in which order, and the file, row and column that a refusal names."""

from __future__ import annotations

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.data.published import MOST_CHARACTERS, PublishedFile

THREE = ["one", "zwei", "три"]


@pytest.fixture
def write(tmp_path):
    """Writes three rows whose passages are no negatives, with the columns that are given."""

    def write(row_group_size=None, **columns):
        path = tmp_path / "source.parquet"
        table = pa.table({name: values for name, values in columns.items() if values is not None})
        pq.write_table(table, path, row_group_size=row_group_size)
        return path

    return write


def read(path, required_negatives=0, batch_rows=8192):
    rows = []
    for batch in PublishedFile(path, required_negatives).batches(batch_rows):
        assert batch.first_row == len(rows) and len(batch) <= batch_rows
        columns = batch.columns.items()
        rows += [{name: texts[i] for name, texts in columns} for i in range(len(batch))]
    return rows


def test_rows_arrive_as_written_with_negatives_in_order_and_no_other_columns(write):
    for negatives in (0, 24):
        table = {"query": THREE, "passage": ["a", "b", "a"], **{f"negative_{k + 1}": THREE for k in range(negatives)}}
        file = PublishedFile(write(**table))
        assert (file.num_rows, len(file.negatives)) == (3, negatives)
        assert read(file.path, negatives) == pa.table(table).to_pylist()
        # Once more from the same object.
        assert [batch.columns for batch in file.batches()] == [batch.columns for batch in file.batches()]
    others = dict.fromkeys(("lang", "negative_10", "negative_2", "query", "negatives", "negative_1x"), THREE)
    path = write(**others, passage=["x", "y", "z"])
    assert PublishedFile(path).negatives == ["negative_2", "negative_10"]
    assert list(read(path)[0]) == ["query", "passage", "negative_2", "negative_10"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_all_kinds_of_strings_are_text(write, refuses, kind):
    path = write(query=pa.array(THREE, kind), passage=THREE, negative_1=pa.array(["x", None, "y"], kind))
    assert pq.read_schema(path).field("query").type == kind
    rows = read(path, required_negatives=0)
    assert [row["query"] for row in rows] == THREE
    assert [row["negative_1"] for row in rows] == ["x", None, "y"]
    for text, fault in ((" ", "empty"), (None, "null")):
        with refuses("row 2,", "column 'passage'", fault):
            read(write(query=THREE, passage=pa.array(["a", "b", text], kind)))


def test_views_of_every_column_become_plain(write):
    """Arrow can neither filter views nor take rows of them, as cleaning, mining and releasing do."""
    views = {name: pa.array(THREE, pa.string_view()) for name in ("query", "passage", "negative_1", "lang")}
    file = PublishedFile(write(**views, raw=pa.array([b"\xff", None, b"x"], pa.binary_view()), score=[1, 2, 3]))
    (batch,) = file.record_batches(all_columns=True)
    assert batch.schema.equals(file.schema)
    kept = batch.filter(pa.array([True, False, True])).take(pa.array([1, 0]))
    assert kept.column("lang").to_pylist() == [THREE[2], THREE[0]]
    assert kept.column("raw").to_pylist() == [b"x", b"\xff"] and kept.column("score").to_pylist() == [3, 1]
    assert [batch.column("lang").to_pylist() for batch in file.further_columns(["lang"])] == [THREE]


def test_negatives_may_be_null_as_long_as_enough_are_left(write, refuses):
    path = write(query=THREE, passage=["x", "y", "z"], negative_1=["a", None, "b"], negative_2=["c", "d", None])
    assert [row["negative_1"] for row in read(path, required_negatives=1)] == ["a", None, "b"]
    with refuses(path, "row 1,", "negative_", "fewer than 2"):
        read(path, required_negatives=2)
    # A column of nulls has the type null, as pandas writes it.
    path = write(query=THREE, passage=["x", "y", "z"], negative_1=THREE, negative_2=pa.nulls(3))
    assert [row["negative_2"] for row in read(path, required_negatives=1)] == [None, None, None]
    with refuses(path, "row 0,", "negative_", "fewer than 2"):
        read(path, required_negatives=2)


def test_further_columns(write, refuses):
    languages = ["deu", None, "fra"] * 3000
    columns = {"query": ["q"] * 9000, "passage": ["p"] * 9000, "row": range(9000), "lang_2": languages}
    path = write(**columns, lang=pa.array(languages).dictionary_encode())
    batches = list(PublishedFile(path).further_columns(["lang_2", "lang"]))
    assert len(batches) > 1 and all(batch.schema.names == ["lang_2", "lang"] for batch in batches)
    assert [text for batch in batches for text in batch.column("lang").to_pylist()] == languages
    with refuses(path, "column 'row' holds int64, not text"):
        list(PublishedFile(path).further_columns(["row"]))


@pytest.mark.parametrize(
    ("content", "fault"),
    [(None, "no such file"), (b"", "not a readable parquet file"), (b"PAR1", "not a readable parquet file")],
)
def test_file_that_is_no_parquet(tmp_path, refuses, content, fault):
    if content is not None:
        (tmp_path / "a.parquet").write_bytes(content)
    with refuses(tmp_path / "a.parquet", fault):
        PublishedFile(tmp_path / "a.parquet")
    with refuses(tmp_path, "not a readable parquet file"):
        PublishedFile(tmp_path)


def test_file_damaged_in_the_middle(tmp_path, refuses):
    path, plain = tmp_path / "a.parquet", {"compression": "none", "use_dictionary": False}
    # A flipped byte under a checksum: neither in the first nor the last text of the alphabet, which the file's
    # statistics repeat.
    table = pa.table({"query": THREE, "passage": ["answer one", "answer two", "answer three"]})
    pq.write_table(table, path, write_page_checksum=True, **plain)
    assert path.read_bytes().count(b"answer three") == 1
    path.write_bytes(path.read_bytes().replace(b"answer three", b"answer there"))
    with refuses(path, "not a readable parquet file"):
        read(path)


@pytest.mark.parametrize(
    ("column", "values", "parts"),
    [
        ("query", None, ["is missing", "passage, negative_1, negative_2"]),
        ("query", [1, 2, 3], ["int64", "not text"]),
        ("passage", [b"a", b"b", b"c"], ["binary", "not text"]),
        ("query", pa.array([1, 2, 1]).dictionary_encode(), ["int64", "not text"]),
    ],
)
def test_wrong_column(write, refuses, column, values, parts):
    columns = {"query": THREE, "passage": THREE, "negative_1": THREE, "negative_2": THREE}
    path = write(**columns | {column: values})
    with refuses(path, f"column {column!r}", *parts):
        PublishedFile(path)
    pq.write_table(pa.Table.from_arrays([pa.array(THREE)] * 4, ["query", "passage", column, "negative_1"]), path)
    with refuses(path, f"column {column!r}", "twice"):
        PublishedFile(path)


def test_too_few_rows_or_negative_columns(write, refuses):
    path = write(query=pa.array([], pa.string()), passage=pa.array([], pa.string()))
    with refuses(path, "no rows"):
        PublishedFile(path)
    path = write(query=THREE, passage=THREE, negative_1=THREE, negative_2=THREE)
    with refuses(path, "2 negative columns", "3", "num_hard_negatives"):
        PublishedFile(path, required_negatives=3)
    for task_type in ("retrieval", "clustering"):
        with refuses(path, f"'num_hard_negatives_{task_type}: 2'"):
            PublishedFile(path, task_type=task_type).require(3)


BROKEN = pa.Array.from_buffers(pa.string(), 3, pa.array([b"d", b"\xff\xfe", b"e"]).buffers())


@pytest.mark.parametrize(
    ("row", "column", "values", "fault"),
    [
        *((1, column, ["d", None, "e"], "is null") for column in ("query", "passage")),
        *((0, column, pa.nulls(3), "is null") for column in ("query", "passage")),
        *((2, column, ["d", "e", "\n\t "], "is empty") for column in ("query", "passage", "negative_1")),
        *((2, "query", ["d", "e", text], "is empty") for text in ("", "\u3000\u00a0")),
        (1, "passage", BROKEN, "is not UTF-8"),
        (1, "negative_2", ["d", "Curaçao", None], "equals column 'passage'"),
        (1, "negative_1", ["d", "Curac\u0327ao.", "e"], "is column 'passage' in another spelling"),
        (2, "passage", ["d", "e", "z" * (MOST_CHARACTERS + 1)], "has more than 1,000,000 characters"),
        (2, "positive_2", ["d", "e", "z" * (MOST_CHARACTERS + 1)], "has more than 1,000,000 characters"),
        (0, "positive_2", [" ", "e", None], "is empty"),
        (1, "positive_2", BROKEN, "is not UTF-8"),
        (0, "negative_1", ["More", "e", "f"], "equals column 'positive_2'"),
        (0, "negative_1", ["more!", "e", "f"], "is column 'positive_2' in another spelling"),
        (0, "passage_id", ["", "2", None], "is empty"),
        (1, "passage_id", BROKEN, "is not UTF-8"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_faulty_row(write, refuses, row, column, values, fault):
    columns = {"query": THREE, "passage": ["x", "Curaçao", "z"], "negative_1": ["a", "b", "c"], "negative_2": THREE}
    columns |= {"positive_2": ["More", None, None], "passage_id": ["1", "1", None]}
    path = write(**columns)
    assert len(read(path, required_negatives=2)) == 3
    with refuses(path, f"row {row},", f"column {column!r} {fault}"):
        read(write(**columns | {column: values}))


def test_documents_of_a_row(write, refuses):
    columns = {"query": THREE, "passage": ["x", "y", "z"], "negative_1": ["a", "b", "c"], "positive_10": THREE}
    columns |= {"positive_2": ["k", None, "l"], "positive_2_id": ["1", "2", None], "query_id": THREE}
    file = PublishedFile(write(**columns))
    assert file.positives == ["passage", "positive_2", "positive_10"] and file.ids == ["positive_2_id"]
    (batch,) = file.batches()
    assert batch.passages == ["x\nk\none", "y\nzwei", "z\nl\nтри"]
    assert len(read(write(**columns, negative_1_id=["2", None, None]))) == 3
    with refuses("row 1,", "column 'negative_1' has the document id of column 'positive_2'"):
        read(write(**columns, negative_1_id=[None, "2", None]))
    with refuses("column 'negative_1_id' holds int64, not text"):
        read(write(**columns, negative_1_id=[1, 2, 3]))


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"score": [1.0, None, 2.0]}, ["row 1,", "'score' is null, NaN or infinite"]),
        ({"score": [1.0, 2.0, float("nan")]}, ["row 2,", "'score' is null, NaN or infinite"]),
        ({"score": [float("-inf"), 2.0, 1.0]}, ["row 0,", "'score' is null, NaN or infinite"]),
        ({"score": pa.nulls(3)}, ["row 0,", "'score' is null, NaN or infinite"]),
        ({"score": ["1", "2", "3"]}, ["column 'score' holds string, not numbers"]),
        ({}, ["column 'score' is missing", "query, passage"]),
        ({"score": [1, 2, 3], "negative_1": THREE}, ["column 'negative_1' has no use beside scores"]),
        ({"score": [1, 2, 3], "positive_2": THREE}, ["column 'positive_2' has no use beside scores"]),
    ],
)
def test_faulty_graded_pairs(write, refuses, columns, parts):
    path = write(query=THREE, passage=["a", "b", "c"], score=[1, 3, 2])
    (batch,) = PublishedFile(path, task_type="similarity").batches()
    assert batch.columns["score"] == [1, 3, 2]
    path = write(query=THREE, passage=["a", "b", "c"], **columns)
    with refuses(path, *parts):
        list(PublishedFile(path, task_type="similarity").batches())


def handles(path):
    return [file.path for file in psutil.Process().open_files()].count(str(path.resolve()))


def test_file_is_open_only_while_it_is_read(write, refuses):
    # A source may have more part files than a process may have handles.
    file = PublishedFile(write(query=[*"abcdefghi", None], passage=["b"] * 10))
    assert handles(file.path) == 0
    batches = file.batches(2)
    # Rows before the fault are yielded.
    assert [next(batches).columns["query"][0] for _ in range(4)] == ["a", "c", "e", "g"]
    assert handles(file.path) == 1
    with refuses("row 9,"):
        next(batches)
    assert handles(file.path) == 0
    assert sum(len(batch) for batch in file.batches(4, skip_bad=True)) == 9
    unfinished = file.batches(2)
    next(unfinished)
    unfinished.close()
    assert handles(file.path) == 0


@pytest.mark.parametrize(("rows", "characters"), [(20_000, 10), (200, 200_000), (40, 1_000_000)])
def test_batch_of_long_texts_has_fewer_rows(tmp_path, rows, characters):
    texts = [f"{row} ".ljust(characters, "x") for row in range(rows)]
    pq.write_table(pa.table({"query": texts, "passage": texts}), tmp_path / "a.parquet", use_dictionary=False)
    sizes = [len(batch) for batch in PublishedFile(tmp_path / "a.parquet").batches()]
    assert sum(sizes) == rows
    assert max(sizes) == 8192 if characters == 10 else max(sizes) * characters * 2 <= max(32 << 20, 2 * characters)
