"""What the tests of preparation read of sources, before and after."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq


def write_rows(path, rows, negatives, **more):
    names = ["query", "passage", *(f"negative_{number + 1}" for number in range(negatives))]
    columns = {name: [f"{name} {row}" for row in range(rows)] for name in names}
    # As the published files are: one row group, however large.
    pq.write_table(pa.table(columns | more), path, row_group_size=rows)


def published_rows(source):
    rows = [row for path in source.files for row in pq.read_table(path).to_pylist()]
    return [tuple(text for column, text in row.items() if column != "lang") for row in rows]


def contents(folder):
    """What is in a folder of prepared sources, but for the remembered hashes of files."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != ".hashes")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
