"""The published format: what is read, in which order, and the file, row and column that a refusal names."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.data.published import PublishedFile
from training.data.row_checks import MOST_CHARACTERS

THREE = ["one", "zwei", "три"]
Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(**columns: Any) -> Path:
        path = tmp_path / "source.parquet"
        pq.write_table(pa.table(columns), path)
        return path

    return write


def read(path: Path, required_negatives: int = 0, batch_rows: int = 8192) -> list[dict[str, str | None]]:
    rows = []
    for batch in PublishedFile(path, required_negatives).batches(batch_rows):
        assert batch.first_row == len(rows)
        assert len(batch) <= batch_rows
        columns = batch.columns.items()
        rows += [{name: texts[i] for name, texts in columns} for i in range(len(batch))]
    return rows


@pytest.mark.parametrize("negatives", [0, 1, 2, 24])
def test_rows_arrive_as_written(write: Callable[..., Path], negatives: int) -> None:
    table = {"query": THREE, "passage": ["a", "b", "a"], **{f"negative_{k + 1}": THREE for k in range(negatives)}}
    path = write(**table)
    assert PublishedFile(path).num_rows == 3
    assert len(PublishedFile(path).negatives) == negatives
    assert read(path, negatives) == pa.table(table).to_pylist()


def test_negatives_are_in_numerical_order_and_other_columns_left_out(write: Callable[..., Path]) -> None:
    path = write(
        lang=THREE,
        negative_10=THREE,
        passage=["x", "y", "z"],
        negative_2=THREE,
        query=THREE,
        negatives=THREE,
        negative_1x=THREE,
    )
    assert PublishedFile(path).negatives == ["negative_2", "negative_10"]
    assert list(read(path)[0]) == ["query", "passage", "negative_2", "negative_10"]


@pytest.mark.parametrize("batch_rows", [1, 7, 100])
def test_batches_do_not_change_the_rows(tmp_path: Path, batch_rows: int) -> None:
    table = pa.table({"query": [f"q{i}" for i in range(50)], "passage": [f"p{i}" for i in range(50)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=11)
    assert read(tmp_path / "a.parquet", batch_rows=batch_rows) == table.to_pylist()


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view()])
def test_all_kinds_of_strings_are_text(write: Callable[..., Path], refuses: Refuses, kind: pa.DataType) -> None:
    path = write(query=pa.array(THREE, kind), passage=THREE, negative_1=pa.array(["x", None, "y"], kind))
    assert pq.read_schema(path).field("query").type == kind
    rows = read(path)
    assert [row["query"] for row in rows] == THREE
    assert [row["negative_1"] for row in rows] == ["x", None, "y"]
    path = write(query=THREE, passage=pa.array(["a", "b", " "], kind))
    with refuses(path, "row 2,", "column 'passage'", "empty"):
        read(path)


def test_dictionary_encoded_columns(write: Callable[..., Path]) -> None:
    labels = pa.array(["yes", "no", "yes"]).dictionary_encode()
    path = write(query=THREE, passage=labels, negative_1=pa.array(["no", None, "no"]).dictionary_encode())
    assert pa.types.is_dictionary(pq.read_schema(path).field("passage").type)
    assert [(row["passage"], row["negative_1"]) for row in read(path)] == [("yes", "no"), ("no", None), ("yes", "no")]


def test_null_negatives_may_stand_anywhere(write: Callable[..., Path]) -> None:
    path = write(query=THREE, passage=THREE, negative_1=[None, "a", "b"], negative_2=["c", None, "d"])
    assert [row["negative_1"] for row in read(path, required_negatives=1)] == [None, "a", "b"]


def test_negative_column_of_nulls_only(write: Callable[..., Path], refuses: Refuses) -> None:
    # Its type is null, as pandas writes it.
    path = write(query=THREE, passage=["x", "y", "z"], negative_1=THREE, negative_2=pa.nulls(3))
    assert [row["negative_2"] for row in read(path, required_negatives=1)] == [None, None, None]
    with refuses(path, "row 0,", "negative_", "fewer than 2"):
        read(path, required_negatives=2)


def test_missing_file(tmp_path: Path, refuses: Refuses) -> None:
    with refuses(tmp_path / "none.parquet", "no such file"):
        PublishedFile(tmp_path / "none.parquet")


def test_empty_file(tmp_path: Path, refuses: Refuses) -> None:
    (tmp_path / "a.parquet").touch()
    with refuses(tmp_path / "a.parquet", "empty"):
        PublishedFile(tmp_path / "a.parquet")


@pytest.mark.parametrize("content", [b"PAR1", b"query\tpassage\n" * 10, b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_file_that_is_no_parquet(tmp_path: Path, refuses: Refuses, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with refuses(tmp_path / "a.parquet", "not a readable parquet file"):
        PublishedFile(tmp_path / "a.parquet")


def test_folder_instead_of_file(tmp_path: Path, refuses: Refuses) -> None:
    with refuses(tmp_path, "not a readable parquet file"):
        PublishedFile(tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_file(write: Callable[..., Path], refuses: Refuses, share: float) -> None:
    path = write(query=[f"question {i}" for i in range(1000)], passage=["answer"] * 1000)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with refuses(path, "not a readable parquet file"):
        PublishedFile(path)


def test_file_damaged_in_the_middle(tmp_path: Path, refuses: Refuses) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"text {i}" for i in range(1000)]
    pq.write_table(
        pa.table({"query": texts, "passage": texts}), path, row_group_size=100, compression="none", use_dictionary=False
    )
    content = bytearray(path.read_bytes())
    middle = content.index(b"text 500")
    content[middle - 60 : middle + 300] = b"\xff" * 360
    path.write_bytes(content)
    file = PublishedFile(path)  # its footer is whole
    with refuses(path, "not a readable parquet file"):
        list(file.batches(50))


def test_flipped_byte_under_a_checksum(tmp_path: Path, refuses: Refuses) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"query": THREE, "passage": ["answer one", "answer two", "answer three"]})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    # Neither the first nor the last text of the alphabet, which the file's statistics repeat.
    assert path.read_bytes().count(b"answer three") == 1
    path.write_bytes(path.read_bytes().replace(b"answer three", b"answer there"))
    with refuses(path, "not a readable parquet file"):
        read(path)


@pytest.mark.parametrize("column", ["query", "passage", "negative_1"])
def test_column_that_is_there_twice(tmp_path: Path, refuses: Refuses, column: str) -> None:
    path = tmp_path / "a.parquet"
    names = ["query", "passage", "negative_1", column]
    pq.write_table(pa.Table.from_arrays([pa.array(THREE)] * 4, names), path)
    with refuses(path, f"column {column!r}", "twice"):
        PublishedFile(path)


def test_further_columns(tmp_path: Path, refuses: Refuses) -> None:
    path, count = tmp_path / "a.parquet", 20_000
    told = [["deu", None, "fra"][row % 3] for row in range(count)]
    table = pa.table({"query": ["q"] * count, "passage": ["p"] * count, "row": range(count)})
    table = table.append_column("lang", pa.array(told).dictionary_encode()).append_column("lang_2", pa.array(told))
    pq.write_table(table, path)
    batches = list(PublishedFile(path).further_columns(["lang_2", "lang"]))
    assert len(batches) > 1 and all(batch.schema.names == ["lang_2", "lang"] for batch in batches)
    assert [text for batch in batches for text in batch.column("lang").to_pylist()] == told
    with refuses(path, "column 'row' holds int64, not text"):
        list(PublishedFile(path).further_columns(["row"]))


@pytest.mark.parametrize("column", ["query", "passage"])
def test_missing_column(write: Callable[..., Path], refuses: Refuses, column: str) -> None:
    columns = {"query": THREE, "passage": THREE, "text": THREE}
    del columns[column]
    path = write(**columns)
    with refuses(path, f"column {column!r} is missing", ", ".join(columns)):
        PublishedFile(path)


@pytest.mark.parametrize(
    ("column", "values", "kind"),
    [
        ("query", [1, 2, 3], "int64"),
        ("passage", [["a"], ["b"], ["c"]], "list"),
        ("passage", [b"a", b"b", b"c"], "binary"),
        ("negative_2", [0.5, 1.5, 2.5], "double"),
        ("query", pa.array([1, 2, 1]).dictionary_encode(), "int64"),
    ],
)
def test_wrong_column_type(write: Callable[..., Path], refuses: Refuses, column: str, values: Any, kind: str) -> None:
    path = write(**{"query": THREE, "passage": THREE, "negative_1": THREE, "negative_2": THREE, column: values})
    with refuses(path, f"column {column!r}", kind, "not text"):
        PublishedFile(path)


def test_zero_rows(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write(query=pa.array([], pa.string()), passage=pa.array([], pa.string()))
    with refuses(path, "no rows"):
        PublishedFile(path)


def test_too_few_negative_columns(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write(query=THREE, passage=THREE, negative_1=THREE, negative_2=THREE)
    with refuses(path, "2 negative columns", "3", "num_hard_negatives"):
        PublishedFile(path, required_negatives=3)
    for task_type in ("retrieval", "clustering"):
        with refuses(path, f"'num_hard_negatives_{task_type}: 2'"):
            PublishedFile(path).require(3, task_type)


@pytest.mark.parametrize("column", ["query", "passage"])
def test_null_text(write: Callable[..., Path], refuses: Refuses, column: str) -> None:
    path = write(**{"query": THREE, "passage": THREE, column: ["a", None, "b"]})
    with refuses(path, "row 1,", f"column {column!r}", "null"):
        read(path)


@pytest.mark.parametrize("column", ["query", "passage"])
def test_text_column_of_nulls_only(write: Callable[..., Path], refuses: Refuses, column: str) -> None:
    path = write(**{"query": THREE, "passage": THREE, column: pa.nulls(3)})
    with refuses(path, "row 0,", f"column {column!r}", "null"):
        read(path)


def test_null_in_a_dictionary_encoded_column(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write(query=THREE, passage=pa.array(["a", "b", None]).dictionary_encode())
    with refuses(path, "row 2,", "column 'passage'", "null"):
        read(path)


@pytest.mark.parametrize("column", ["query", "passage", "negative_1"])
@pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u3000\u00a0"])
def test_empty_text(write: Callable[..., Path], refuses: Refuses, column: str, text: str) -> None:
    path = write(**{"query": THREE, "passage": ["x", "y", "z"], "negative_1": THREE, column: ["d", "e", text]})
    with refuses(path, "row 2,", f"column {column!r}", "empty"):
        read(path)


def test_row_with_too_few_negatives(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write(query=THREE, passage=["x", "y", "z"], negative_1=["a", None, "b"], negative_2=["c", "d", None])
    assert len(read(path, required_negatives=1)) == 3
    with refuses(path, "row 1,", "negative_", "fewer than 2"):
        read(path, required_negatives=2)


def test_text_that_is_not_utf8(write: Callable[..., Path], refuses: Refuses) -> None:
    broken = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff\xfe", b"c"]).buffers())
    path = write(query=THREE, passage=broken)
    with refuses(path, "row 1,", "column 'passage'", "not UTF-8"):
        read(path)


def test_passage_that_is_its_own_negative(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write(query=THREE, passage=THREE, negative_1=["x", "y", "z"], negative_2=["x", THREE[1], None])
    with refuses(path, "row 1,", "column 'negative_2'", "equals column 'passage'"):
        read(path)


@pytest.mark.parametrize("spelling", ["Curaçao ", "curaçao", "Curaçao.", "Curac\u0327ao", "ＣＵＲＡÇＡＯ"])
def test_passage_that_is_its_own_negative_in_another_spelling(
    write: Callable[..., Path], refuses: Refuses, spelling: str
) -> None:
    path = write(query=THREE, passage=["Curaçao"] * 3, negative_1=["Cuba", "Bonaire", spelling])
    with refuses(path, "row 2,", "column 'negative_1'", "is column 'passage' in another spelling"):
        read(path)


def test_text_of_absurd_length(write: Callable[..., Path], refuses: Refuses) -> None:
    assert len(read(write(query=THREE, passage=["x", "y", "z" * MOST_CHARACTERS]))) == 3
    path = write(query=THREE, passage=["x", "y", "z" * (MOST_CHARACTERS + 1)])
    with refuses(path, "row 2,", "column 'passage'", "more than 1,000,000 characters"):
        read(path)


@pytest.mark.parametrize("row", [0, 9, 10, 25, 49])
@pytest.mark.parametrize("column", ["query", "passage", "negative_1"])
def test_row_number_counts_from_the_start_of_the_file(tmp_path: Path, refuses: Refuses, row: int, column: str) -> None:
    columns = {name: [f"{name} {i}" for i in range(50)] for name in ("query", "passage", "negative_1")}
    columns[column][row] = " "
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=17)
    with refuses(tmp_path / "a.parquet", f"row {row},", repr(column)):
        read(tmp_path / "a.parquet", batch_rows=10)


def test_rows_before_the_fault_are_yielded(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write(query=["a", "b", "c", None], passage=["d"] * 4)
    batches = PublishedFile(path).batches(2)
    assert next(batches).columns["query"] == ["a", "b"]
    with refuses("row 3,"):
        next(batches)


def handles(path: Path) -> int:
    return [file.path for file in psutil.Process().open_files()].count(str(path.resolve()))


def test_file_is_open_only_while_it_is_read(write: Callable[..., Path]) -> None:
    # A source may have more part files than a process may have handles.
    path = write(query=["a"] * 10, passage=["b"] * 10)
    file = PublishedFile(path)
    assert handles(path) == 0
    batches = file.batches(2)
    next(batches)
    assert handles(path) == 1
    assert len(list(batches)) == 4
    assert handles(path) == 0
    unfinished = file.batches(2)
    next(unfinished)
    unfinished.close()
    assert handles(path) == 0


def test_faulty_file_does_not_stay_open(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write(query=["a", None], passage=["b", "c"])
    file = PublishedFile(path)
    with refuses("row 1,"):
        list(file.batches(1))
    assert handles(path) == 0
    path = write(query=["a"])
    with refuses("'passage'"):
        PublishedFile(path)
    assert handles(path) == 0


def test_file_can_be_read_twice(write: Callable[..., Path]) -> None:
    file = PublishedFile(write(query=THREE, passage=THREE))
    assert [batch.columns for batch in file.batches()] == [batch.columns for batch in file.batches()]


@pytest.mark.parametrize(("rows", "characters"), [(20_000, 10), (200, 200_000), (40, 1_000_000)])
def test_batch_of_long_texts_has_fewer_rows(tmp_path: Path, rows: int, characters: int) -> None:
    texts = [f"{row} ".ljust(characters, "x") for row in range(rows)]
    pq.write_table(pa.table({"query": texts, "passage": texts}), tmp_path / "a.parquet", use_dictionary=False)
    sizes = [len(batch) for batch in PublishedFile(tmp_path / "a.parquet").batches()]
    assert sum(sizes) == rows
    assert max(sizes) == 8192 if characters == 10 else max(sizes) * characters * 2 <= max(32 << 20, 2 * characters)


def test_first_batch_of_a_single_row_group_reads_a_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {name: [os.urandom(250).hex() for _ in range(30_000)] for name in ("query", "passage", "negative_1")}
    pq.write_table(pa.table(columns), path, row_group_size=30_000, compression="none")
    assert pq.read_metadata(path).num_row_groups == 1
    batches = PublishedFile(path).batches(10)
    before = pa.total_allocated_bytes()
    assert next(batches).columns["query"] == columns["query"][:10]
    # A buffer and a page of each column, where the whole file is 45 MB.
    assert pa.total_allocated_bytes() - before < 12_000_000
    batches.close()


def test_views_of_every_column_become_plain(write: Callable[..., Path]) -> None:
    """Arrow can neither filter views nor take rows of them, as cleaning, mining and releasing do."""
    views = {name: pa.array(THREE, pa.string_view()) for name in ("query", "passage", "negative_1", "lang")}
    file = PublishedFile(write(**views, raw=pa.array([b"\xff", None, b"x"], pa.binary_view()), score=[1, 2, 3]))
    (batch,) = file.record_batches(all_columns=True)
    assert batch.schema.equals(file.schema)
    kept = batch.filter(pa.array([True, False, True])).take(pa.array([1, 0]))
    assert kept.column("lang").to_pylist() == [THREE[2], THREE[0]]
    assert kept.column("raw").to_pylist() == [b"x", b"\xff"] and kept.column("score").to_pylist() == [3, 1]
    assert [batch.column("lang").to_pylist() for batch in file.further_columns(["lang"])] == [THREE]
