import os
import re
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from fsspec.registry import known_implementations

from hetegen_rec.config import Schema
from hetegen_rec.data.errors import BadRowsError, DataError
from hetegen_rec.data.opening import check_columns
from hetegen_rec.data.raw import (
    column_keys,
    expand_paths,
    iter_tables,
    list_row_groups,
    read_row_group,
    read_shape,
    row_groups,
)

SCHEMA = Schema.model_validate(
    {
        "label": "click",
        "timestamp": "time",
        "fields": [
            {"name": "item", "kind": "id"},
            {"name": "price", "kind": "numeric", "column": "price usd"},
            {"name": "tags", "kind": "multi_valued"},
        ],
    }
)


def write(path: Path, rows: int, row_group_size: int = 4) -> str:
    table = pa.table({"n": pa.array(range(rows), pa.int64())})
    pq.write_table(table, path, row_group_size=row_group_size)
    return str(path)


def rows_of(path: str, schema: Schema = SCHEMA) -> dict[str, list]:
    tables = [table for group in list_row_groups([path]) for table in iter_tables(group, schema)]
    return pa.concat_tables(tables).to_pydict()


def test_row_groups_number_the_rows_of_the_split_over_sorted_files(tmp_path) -> None:
    write(tmp_path / "b.parquet", 6)
    write(tmp_path / "a.parquet", 5)
    write(tmp_path / "empty.parquet", 0)
    groups = list_row_groups([f"{tmp_path}/*.parquet"])
    assert [(Path(g.path).name, g.index, g.num_rows, g.first_row) for g in groups] == [
        ("a.parquet", 0, 4, 0),
        ("a.parquet", 1, 1, 4),
        ("b.parquet", 0, 4, 5),
        ("b.parquet", 1, 2, 9),
    ]
    assert read_row_group(groups[3], ["n"]).to_pydict() == {"n": [4, 5]}


def test_patterns_keep_their_order_and_a_file_counts_once(tmp_path) -> None:
    b, a = write(tmp_path / "b.parquet", 1), write(tmp_path / "a.parquet", 1)
    assert expand_paths([b, f"{tmp_path}/*.parquet"]) == [b, a]


def test_a_file_of_two_names_counts_once_by_the_first(tmp_path) -> None:
    (tmp_path / "here").mkdir()
    path = write(tmp_path / "here" / "a.parquet", 1)
    (tmp_path / "there").symlink_to(tmp_path / "here")
    (tmp_path / "link.parquet").symlink_to(path)
    names = [f"{tmp_path}/{name}" for name in ("here/../here/a.parquet", "there/*", "link.parquet")]
    assert expand_paths([path, *names]) == [path]
    assert expand_paths([*names, path]) == names[:1]


@pytest.mark.parametrize("url", ["unknown://bucket/*.parquet", "lacking://bucket/*.parquet"])
def test_a_url_that_cannot_be_opened_here_is_named(monkeypatch, url) -> None:
    lacking = {"class": "no_such_package.FileSystem", "err": "install no_such_package"}
    monkeypatch.setitem(known_implementations, "lacking", lacking)
    with pytest.raises(DataError, match=rf"{re.escape(url)}: .*; name paths, or URLs that fsspec can open"):
        expand_paths([url])


def test_files_of_any_file_system_known_to_fsspec_are_read() -> None:
    with fsspec.open("memory://raw-test/part.parquet", "wb") as stream:
        pq.write_table(pa.table({"n": [1, 2]}), stream)
    (group,) = list_row_groups(["memory://raw-test/*.parquet"])
    assert read_row_group(group, ["n"]).to_pydict() == {"n": [1, 2]}


def test_a_pattern_without_files_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"no file matches '.*nothing-\*\.parquet'"):
        expand_paths([f"{tmp_path}/nothing-*.parquet"])


def test_a_truncated_parquet_file_is_named(tmp_path) -> None:
    path = tmp_path / "cut.parquet"
    write(path, 100)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"cut\.parquet: cannot be read; it may be truncated"):
        list_row_groups([str(path)])


def test_damaged_pages_name_file_and_row_group(tmp_path) -> None:
    path = tmp_path / "damaged.parquet"
    write(path, 100, row_group_size=100)
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)
    (group,) = list_row_groups([str(path)])
    with pytest.raises(DataError, match=r"damaged\.parquet, row group 0"):
        read_row_group(group, ["n"])


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_missing_column_names_file_column_key_and_what_there_is(tmp_path, suffix) -> None:
    path = tmp_path / f"part.{suffix}"
    if suffix == "csv":
        path.write_text("click,time,item,tags\n")
    else:
        pq.write_table(pa.table({"click": [1], "time": [1], "item": [1], "tags": [1]}), path)
    with pytest.raises(DataError) as error:
        check_columns(str(path), column_keys(SCHEMA), read_shape(str(path)).schema.names)
    message = str(error.value)
    assert f"{path}: no column 'price usd' (`features.fields, `column` of 'price'`)" in message
    assert "click, time, item, tags" in message


def test_csv_types_do_not_depend_on_the_cells(tmp_path) -> None:
    path = tmp_path / "part.csv"
    path.write_text('click,time,item,price usd,tags,extra\n1,7,01,2,a|b,x\n0,8,,,,y\n1,9,"",1.5,"q, r",z\n')
    assert rows_of(str(path)) == {
        "click": [1.0, 0.0, 1.0],
        "time": [7, 8, 9],
        "item": ["01", None, ""],
        "price usd": [2.0, None, 1.5],
        "tags": [["a", "b"], None, ["q, r"]],
    }


@pytest.mark.parametrize("kinds", [("categorical", "numeric"), ("numeric", "categorical")])
def test_a_csv_column_that_is_wanted_as_numbers_and_as_text_is_refused(tmp_path, kinds) -> None:
    path = tmp_path / "part.csv"
    path.write_text("click,hour\n1,07\n0,7\n")
    fields = [{"name": f"hour_{kind}", "kind": kind, "column": "hour"} for kind in kinds]
    schema = Schema.model_validate({"label": "click", "fields": fields})
    with pytest.raises(DataError, match=f"column 'hour' .* field 'hour_{kinds[0]}' and .* 'hour_{kinds[1]}'"):
        rows_of(str(path), schema)


def test_tsv_may_be_compressed_and_read_in_blocks(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("hetegen_rec.data.delimited.CSV_BLOCK_BYTES", 64)
    lines = ["click\ttime\titem\tprice usd\ttags", *(f"1\t{i}\t{i}\t{i}\tt{i}" for i in range(50))]
    path = tmp_path / "part.tsv.gz"
    with fsspec.open(str(path), "wt", compression="gzip") as stream:
        stream.write("\n".join(lines))
    (group,) = list_row_groups([str(path)])
    assert group.num_rows == 50
    assert len(list(iter_tables(group, SCHEMA))) > 1
    assert rows_of(str(path))["item"] == [str(i) for i in range(50)]


@pytest.mark.parametrize("place", ["", "file://"])
@pytest.mark.parametrize(("suffix", "codec"), [("gz", "gzip"), ("BZ2", "bz2"), ("zst", "zstd")])
def test_csv_is_decompressed_by_its_suffix_also_at_a_url(tmp_path, place, suffix, codec) -> None:
    path = tmp_path / f"part.csv.{suffix}"
    with pa.CompressedOutputStream(str(path), codec) as stream:
        stream.write(b"click,time,item,price usd,tags\n1,7,01,2,a|b\n")
    assert rows_of(f"{place}{path}")["item"] == ["01"]


def test_a_csv_cell_of_the_wrong_type_names_file_column_and_value(tmp_path) -> None:
    path = tmp_path / "part.csv"
    path.write_text("click,time,item,price usd,tags\n1,7,5,cheap,\n")
    with pytest.raises(DataError, match=r"part\.csv: In column 'price usd': .* invalid value 'cheap'"):
        rows_of(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Empty CSV file"),
        (b"click,time,item\n1,7\n", "Expected 3 columns, got 2"),
        (
            b'click,time,item\n1,7,"open\n' + b"1,7,5\n" * 40,
            "a row is longer than 0 MiB, or a quote is not closed",
        ),
        (b"click,time,it\xffem\n1,7,5\n", "'utf-8' codec can't decode"),
        (b"click,time,item,price usd,tags\n1,7,\xff,,\n", "In column 'item': .* invalid UTF8 data"),
    ],
)
def test_a_csv_file_that_is_none_is_named(tmp_path, monkeypatch, content, message) -> None:
    monkeypatch.setattr("hetegen_rec.data.delimited.CSV_BLOCK_BYTES", 64)
    path = tmp_path / "part.csv"
    path.write_bytes(content)
    with pytest.raises(BadRowsError, match=rf"part\.csv: .*{message}") as error:
        rows_of(str(path))
    assert "\n" not in str(error.value)


def test_a_csv_header_without_rows_has_no_row_groups(tmp_path) -> None:
    path = tmp_path / "part.csv"
    path.write_text("click,time\n")
    assert list_row_groups([str(path)]) == []


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_file_that_was_written_anew_is_noticed(tmp_path, suffix) -> None:
    path = tmp_path / f"part.{suffix}"
    write_rows = pq.write_table if suffix == "parquet" else pyarrow.csv.write_csv
    schema = Schema.model_validate({"label": "n", "fields": [{"name": "m", "kind": "id"}]})
    write_rows(pa.table({"n": [0, 1], "m": [5, 6]}), path)
    shape = read_shape(str(path))
    (group,) = row_groups([(str(path), shape.group_rows)], {str(path): shape.stamp})
    assert len(list(iter_tables(group, schema))) == 1
    write_rows(pa.table({"n": [0, 1], "m": [6, 5]}), tmp_path / "new")
    os.utime(tmp_path / "new", ns=(1, 1))  # clocks of file systems may be slow
    (tmp_path / "new").replace(path)
    with pytest.raises(BadRowsError, match="was written anew since the files were listed; start again"):
        list(iter_tables(group, schema))


def test_large_row_groups_are_streamed_in_batches(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("hetegen_rec.data.raw.BATCH_ROWS", 10)
    schema = Schema.model_validate({"label": "n", "fields": [{"name": "m", "kind": "id"}]})
    pq.write_table(pa.table({"n": range(25), "m": range(25), "other": range(25)}), tmp_path / "a.parquet")
    (group,) = list_row_groups([f"{tmp_path}/a.parquet"])
    tables = list(iter_tables(group, schema))
    assert [table.num_rows for table in tables] == [10, 10, 5]
    assert tables[0].column_names == ["n", "m"]
