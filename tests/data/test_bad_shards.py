"""Rows that cannot be used while reading: an error that names them, or padding and an entry in `skipped`."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from encoded_shards import Shards, encoded_rows, open_shards, write_shards

from hetegen_rec.data.cursor import Cursor
from hetegen_rec.data.encoded_rows import LABEL
from hetegen_rec.data.errors import DataError

SIZES = [20, 20, 20, 20, 20]
BAD = set(range(40, 60))
"""Rows of the second file's first row group."""


def with_column(name, values):
    """The rows of the second file, one column of the bad row group replaced."""
    table = encoded_rows(40, 80)
    column = table[name].to_pylist()
    return table.set_column(table.column_names.index(name), name, pa.array(values + column[20:]))


def rewrite(path, table):
    pq.write_table(table, path, row_group_size=20)


def flip_bytes(path):
    """Damages the pages of the first row group and leaves the footer alone."""
    group = pq.read_metadata(path).row_group(0)
    content = bytearray(path.read_bytes())
    for index in range(group.num_columns):
        column = group.column(index)
        start = column.dictionary_page_offset or column.data_page_offset
        content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)


DAMAGES = {
    "damaged pages": (flip_bytes, "cannot be read"),
    "an id beyond its table": (
        lambda path: rewrite(path, with_column("item", [3] * 19 + [50])),
        "'item' holds ids from 3 to 50, but its table has 50 rows",
    ),
    "a negative id": (
        lambda path: rewrite(path, with_column("item", [-1] * 20)),
        "'item' holds ids from -1 to -1, but its table has 50 rows",
    ),
    "an id in a list beyond its table": (
        lambda path: rewrite(path, with_column("history", [[0, 1, 99]] * 20)),
        "'history' holds ids from 0 to 99",
    ),
    "a list that is too long": (
        lambda path: rewrite(path, with_column("tags", [[1] * 7] * 20)),
        "'tags' holds 7 values in a row, but `max_length` is 2",
    ),
    "an absent id": (
        lambda path: rewrite(path, with_column("item", [1] * 19 + [None])),
        "'item' holds rows without a value",
    ),
    "an absent list": (
        lambda path: rewrite(path, with_column("tags", [[1]] * 19 + [None])),
        "'tags' holds rows without a value",
    ),
    "an absent id in a list": (
        lambda path: rewrite(path, with_column("history", [[1, None]] * 20)),
        "'history' holds rows without a value",
    ),
    "a label that is no number": (
        lambda path: rewrite(path, with_column(LABEL, [1.0] * 19 + [float("nan")])),
        "'__label' holds the label nan, neither 0 nor 1",
    ),
    "an absent row id": (
        lambda path: rewrite(path, with_column("__row_id", [*range(40, 59), None])),
        "'__row_id' holds rows without a value",
    ),
}


def rows_of(reader, epoch=0):
    return [row for batch in reader.epoch(Cursor(epoch)) for row in batch.row_ids.tolist()]


def warnings_of(caplog):
    """Ours: libraries have their own, said once a process."""
    records = [record for record in caplog.records if record.name.startswith("hetegen_rec.")]
    return [record for record in records if record.levelno == logging.WARNING]


@pytest.fixture(params=list(DAMAGES))
def damaged(request, tmp_path):
    """A reader of five row groups, the third one damaged after opening; and what the error says."""

    def damage(**changes):
        reader = open_shards(write_shards(tmp_path, SIZES), **changes)
        spoil, message = DAMAGES[request.param]
        spoil(tmp_path / "part-002.parquet")
        return reader, message

    return damage


def test_a_bad_row_group_is_an_error_that_names_it(damaged):
    reader, message = damaged(shuffle=False)
    with pytest.raises(DataError, match=rf"part-002\.parquet, row group 0.*{message}"):
        rows_of(reader)


def test_a_bad_row_group_is_skipped_on_demand(damaged, caplog):
    reader, message = damaged(skip_bad=True, shuffle_rows=100)
    rows = rows_of(reader)
    assert sorted(row for row in rows if row >= 0) == sorted(set(range(100)) - BAD)
    assert len(rows) == 100
    assert sum(skipped.num_rows for skipped in reader.skipped) == 20
    assert all("part-002.parquet, row group 0, rows " in skipped.where for skipped in reader.skipped)
    assert message in reader.skipped[0].reason
    (warning,) = warnings_of(caplog)
    assert "part-002.parquet, row group 0" in warning.getMessage()


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"PAR1 PAR1")])
@pytest.mark.parametrize("skip_bad", [True, False])
def test_a_file_that_is_gone_or_cut_off_takes_all_its_row_groups_along(tmp_path, spoil, skip_bad):
    reader = open_shards(write_shards(tmp_path, SIZES), skip_bad=skip_bad)
    spoil(tmp_path / "part-002.parquet")
    if skip_bad:
        assert sorted(row for row in rows_of(reader) if row >= 0) == [*range(40), *range(80, 100)]
        assert sum(skipped.num_rows for skipped in reader.skipped) == 40
    else:
        with pytest.raises(DataError, match=r"part-002\.parquet"):
            rows_of(reader)


def test_skipping_moves_no_other_row_and_keeps_the_ranks_in_step(tmp_path):
    shards = write_shards(tmp_path, SIZES)
    layout = {"world_size": 2, "num_lanes": 4, "skip_bad": True, "shuffle_rows": 7}
    readers = [open_shards(shards, rank=rank, **layout) for rank in range(2)]
    whole = [rows_of(reader) for reader in readers]
    (tmp_path / "part-004.parquet").unlink()
    left = [[row if row < 80 else -1 for row in rows] for rows in whole]
    assert [rows_of(reader) for reader in readers] == left


def test_a_row_group_is_warned_of_once_and_counted_in_every_epoch(tmp_path, caplog):
    reader = open_shards(write_shards(tmp_path, SIZES), skip_bad=True, shuffle_rows=9)
    (tmp_path / "part-004.parquet").unlink()
    for epoch in range(3):
        rows_of(reader, epoch)
    assert sum(skipped.num_rows for skipped in reader.skipped) == 3 * 20
    assert len(warnings_of(caplog)) == 1


def test_skipping_more_than_half_of_an_epoch_is_an_error(tmp_path):
    reader = open_shards(write_shards(tmp_path, SIZES), skip_bad=True)
    for path in sorted(tmp_path.iterdir())[:2]:
        path.unlink()
    with pytest.raises(DataError, match=r"more than half of a rank's rows.*data\.on_bad_shard"):
        rows_of(reader)


def test_a_rank_may_skip_all_of_a_share_as_small_as_a_row_group(tmp_path):
    reader = open_shards(
        write_shards(tmp_path, SIZES),
        rank=0,
        world_size=5,
        num_lanes=5,
        batch_size=5,
        shuffle=False,
        skip_bad=True,
    )
    flip_bytes(tmp_path / "part-000.parquet")
    assert rows_of(reader) == [-1] * 20


@pytest.mark.parametrize("skip_bad", [True, False])
def test_what_the_encoder_cannot_use_is_named_or_skipped(tmp_path, skip_bad):
    def encode(table, first_row, where):
        if first_row == 20:
            raise KeyError("no such value")
        return table

    reader = open_shards(write_shards(tmp_path, SIZES), shuffle=False, skip_bad=skip_bad, encode=encode)
    if skip_bad:
        assert rows_of(reader) == [*range(20), *[-1] * 20, *range(40, 100)]
    else:
        place = r"part-000\.parquet, row group 1, rows 0 to 20"
        with pytest.raises(DataError, match=rf"{place}: cannot be used.*no such value"):
            rows_of(reader)


def test_running_out_of_memory_is_no_fault_of_the_rows(tmp_path):
    def encode(table, first_row, where):
        raise MemoryError

    reader = open_shards(write_shards(tmp_path, SIZES), skip_bad=True, encode=encode)
    with pytest.raises(MemoryError):
        rows_of(reader)


def test_shards_without_a_column_are_an_error(tmp_path):
    pq.write_table(encoded_rows(0, 9).drop_columns("tags"), tmp_path / "part.parquet")
    reader = open_shards(Shards(str(tmp_path)), columns=["item", "history", "__label", "__row_id"])
    with pytest.raises(DataError, match=r"part\.parquet.*'tags'.*prepare"):
        rows_of(reader)


def test_columns_of_wider_types_are_taken_as_they_fit(tmp_path):
    table = encoded_rows(0, 9)
    wide = table.set_column(0, "item", table["item"].cast(pa.int64()))
    pq.write_table(wide, tmp_path / "part.parquet")
    assert sorted(rows_of(open_shards(Shards(str(tmp_path))))) == list(range(9))


@pytest.mark.parametrize("values", [pa.array(["x"] * 9), pa.array(np.full(9, 2**40))])
def test_columns_that_do_not_fit_are_an_error(tmp_path, values):
    table = encoded_rows(0, 9).set_column(0, "item", values)
    pq.write_table(table, tmp_path / "part.parquet")
    with pytest.raises(DataError, match=r"part\.parquet, row group 0, rows 0 to 9: cannot be used"):
        rows_of(open_shards(Shards(str(tmp_path)), shuffle=False))
