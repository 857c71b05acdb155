"""Readers: every row once, the same global batches for any number of ranks, resume, errors."""

import gc
import threading
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.batching import Batcher, encoded_schema
from hetegen_rec.data.raw import DataError, list_row_groups
from hetegen_rec.data.reader import Reader

SCHEMA = Schema.model_validate(
    {
        "label": "click",
        "fields": [
            {"name": "item", "kind": "id"},
            {"name": "history", "kind": "sequence", "table": "item", "max_length": 3},
            {"name": "tags", "kind": "multi_valued", "max_length": 2},
        ],
    }
)
NUM_IDS = 50


class FlatStatistics:
    """Every id is as frequent as any other."""

    def log_prior(self, field, oov_dropout=0.0):
        return np.zeros(NUM_IDS, dtype=np.float32)

    def lookups(self, table):
        return np.full(NUM_IDS, 2.0)

    def log_rate(self, table, oov_dropout=0.0):
        return np.full(NUM_IDS, -4.0, dtype=np.float32)


def encoded_rows(start, stop):
    """Rows whose content tells which row it is."""
    rows = range(start, stop)
    return pa.table(
        {
            "item": [row % NUM_IDS for row in rows],
            "history": [[(row + i) % NUM_IDS for i in range(row % 4)] for row in rows],
            "tags": [[row % 7] for row in rows],
            "__label": [float(row % 2) for row in rows],
            "__row_id": list(rows),
        },
        schema=encoded_schema(SCHEMA),
    )


@dataclass
class Shards:
    """Parquet files on disk."""

    directory: str

    @property
    def row_groups(self):
        return list_row_groups([f"{self.directory}/*.parquet"])


def write_shards(directory, sizes):
    """One file for every two row groups of these sizes."""
    first = 0
    for start in range(0, len(sizes), 2):
        with pq.ParquetWriter(directory / f"part-{start:03d}.parquet", encoded_schema(SCHEMA)) as writer:
            for size in sizes[start : start + 2]:
                writer.write_table(encoded_rows(first, first + size))
                first += size
    return Shards(str(directory))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """83 rows in row groups of uneven sizes."""
    return write_shards(tmp_path_factory.mktemp("encoded"), [20, 0, 31, 7, 1, 24])


def open_shards(shards, oov_dropout=0.0, **changes):
    arguments = {
        "rank": 0,
        "world_size": 1,
        "batch_size": 8,
        "num_lanes": 1,
        "seed": 3,
        "shuffle": True,
        "shuffle_rows": 10,
        "prefetch_batches": 2,
        "pad": False,
        "columns": encoded_schema(SCHEMA).names,
    }
    batcher = Batcher(SCHEMA, FlatStatistics(), oov_dropout)
    return Reader(shards.row_groups, batcher, **{**arguments, **changes})


def contents(batch):
    """Everything of a batch that can be compared."""
    lists = [getattr(batch, name).tolist() for name in ("ids", "labels", "row_ids", "strata")]
    return (*lists, batch.kjt.values().tolist(), batch.kjt.lengths().tolist(), batch.noise_seed, batch.cursor)


def epoch_of(reader, epoch=0, start=0):
    return [contents(batch) for batch in reader.epoch(epoch, start)]


def row_ids_of(reader, epoch=0):
    return [row for batch in reader.epoch(epoch) for row in batch.row_ids.tolist()]


def global_rows(shards, world_size, **changes):
    """For each step the rows of all ranks' batches, in order of rank."""
    ranks = [
        list(open_shards(shards, rank=rank, world_size=world_size, **changes).epoch(0))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    return [
        {
            "row_ids": torch.cat([batch.row_ids for batch in step]).tolist(),
            "ids": torch.cat([batch.ids for batch in step]).tolist(),
            "strata": torch.cat([batch.strata for batch in step]).tolist(),
            "cursors": {batch.cursor for batch in step},
        }
        for step in zip(*ranks, strict=True)
    ]


def test_batches_hold_what_their_rows_hold(shards):
    for batch in open_shards(shards).epoch(0):
        rows = batch.row_ids.tolist()
        assert batch.labels.tolist() == [float(row % 2) for row in rows]
        assert batch.ids[:, 0].tolist() == [row % NUM_IDS for row in rows]
        assert batch.kjt["history:0"].lengths().tolist() == [int(row % 4 > 0) for row in rows]
        assert batch.kjt["tags"].values().tolist() == [row % 7 for row in rows]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 40), st.booleans())
def test_training_reads_each_row_once_up_to_the_remainder(shards, num_lanes, share, shuffle_rows, shuffle):
    reader = open_shards(
        shards,
        num_lanes=num_lanes,
        batch_size=share * num_lanes,
        shuffle_rows=shuffle_rows,
        shuffle=shuffle,
    )
    rows = row_ids_of(reader)
    assert len(rows) == len(set(rows)) == 83 // num_lanes * num_lanes
    assert set(rows) <= set(range(83))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 100])
def test_evaluation_reads_each_row_exactly_once(shards, world_size):
    steps = global_rows(
        shards, world_size, num_lanes=world_size, batch_size=4 * world_size, pad=True, shuffle=False
    )
    rows = [row for step in steps for row in step["row_ids"]]
    assert sorted(row for row in rows if row >= 0) == list(range(83))
    assert len(rows) == -(-83 // world_size) * world_size


def test_padding_rows_look_nothing_up(shards):
    reader = open_shards(shards, rank=9, world_size=10, num_lanes=10, batch_size=90, pad=True, shuffle=False)
    (batch,) = reader.epoch(0)
    assert batch.row_ids.tolist() == [81, 82] + [-1] * 7
    assert (batch.ids[2:] == -1).all()


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_same_lanes_make_the_same_global_batches_on_any_number_of_ranks(shards, world_size):
    alone = global_rows(shards, 1, num_lanes=4, oov_dropout=0.5)
    assert global_rows(shards, world_size, num_lanes=4, oov_dropout=0.5) == alone


def test_strata_cover_the_global_batch_evenly(shards):
    for step in global_rows(shards, 2, num_lanes=4):
        size = len(step["strata"])
        assert step["strata"] == pytest.approx([(i + 0.5) / size for i in range(size)])


def test_epochs_differ_and_repeat(shards):
    reader = open_shards(shards)
    assert epoch_of(reader, 0) == epoch_of(reader, 0)
    assert row_ids_of(reader, 0) != row_ids_of(reader, 1)
    assert next(reader.epoch(0)).noise_seed != next(reader.epoch(1)).noise_seed


def test_two_iterators_of_one_reader_do_not_disturb_each_other(shards):
    reader = open_shards(shards)
    pairs = list(zip(reader.epoch(0), reader.epoch(0), strict=True))
    assert len(pairs) == reader.batches_per_epoch
    assert all(contents(a) == contents(b) for a, b in pairs)


def test_without_shuffle_rows_come_as_they_are_stored(shards):
    assert row_ids_of(open_shards(shards, shuffle=False)) == list(range(83))


def test_the_number_of_batches_is_known_and_the_last_smaller_one_kept(shards):
    reader = open_shards(shards, num_lanes=2)
    sizes = [batch.num_rows for batch in reader.epoch(0)]
    assert (reader.num_rows, reader.rows_per_lane, reader.batches_per_epoch) == (83, 41, 11)
    assert sizes == [8] * 10 + [2]


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_resumes_behind_any_batch(shards, shuffle):
    reader = open_shards(shards, num_lanes=2, shuffle=shuffle, shuffle_rows=7)
    whole = epoch_of(reader, epoch=4)
    for done, batch in enumerate(whole):
        cursor = batch[-1]
        assert cursor.epoch == 4
        assert epoch_of(reader, 4, cursor.rows_per_lane) == whole[done + 1 :]


def test_a_resume_may_change_the_batch_size(shards):
    rows = row_ids_of(open_shards(shards))
    resumed = open_shards(shards, batch_size=5).epoch(0, start_rows_per_lane=13)
    assert [row for batch in resumed for row in batch.row_ids.tolist()] == rows[13:]


def test_a_start_behind_the_end_is_an_error(shards):
    with pytest.raises(ValueError, match=r"row 84 of lanes with 83 rows.*cursor"):
        open_shards(shards).epoch(0, start_rows_per_lane=84)


def test_rows_encoded_while_reading_make_the_same_batches(tmp_path):
    (tmp_path / "encoded").mkdir()
    encoded = write_shards(tmp_path / "encoded", [83])
    pq.write_table(pa.table({"number": list(range(83))}), tmp_path / "raw.parquet", row_group_size=83)

    def encode(table, first_row, where):
        assert table["number"].to_pylist() == list(range(first_row, first_row + table.num_rows))
        assert where.endswith("raw.parquet, row group 0")
        return encoded_rows(first_row, first_row + table.num_rows)

    on_the_fly = open_shards(Shards(str(tmp_path)), encode=encode, columns=["number"])
    assert epoch_of(on_the_fly) == epoch_of(open_shards(encoded))


def test_a_batch_that_lanes_cannot_share_is_an_error(shards):
    with pytest.raises(ConfigError, match=r"batch of 8 rows.*3 lanes.*train\.batch_size"):
        open_shards(shards, num_lanes=3)


def test_fewer_rows_than_lanes_is_an_error_before_reading(shards):
    with pytest.raises(DataError, match="83 row"):
        open_shards(shards, num_lanes=100, world_size=100, batch_size=100)


def test_a_file_damaged_after_opening_surfaces_in_the_consumer(tmp_path):
    shards = write_shards(tmp_path, [20, 20])
    reader = open_shards(shards)
    (tmp_path / "part-000.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match=r"part-000\.parquet"):
        list(reader.epoch(0))


def test_an_error_of_the_encoder_names_file_row_group_and_rows(shards):
    def encode(table, first_row, where):
        raise KeyError("no such value")

    with pytest.raises(RuntimeError, match=r"part-000\.parquet, row group 0, rows 0 to 20.*no such value"):
        list(open_shards(shards, encode=encode, shuffle=False).epoch(0))


def test_shards_of_another_schema_are_an_error(tmp_path):
    pq.write_table(encoded_rows(0, 9).drop_columns("tags"), tmp_path / "part.parquet")
    reader = open_shards(Shards(str(tmp_path)), columns=["item", "history", "__label", "__row_id"])
    with pytest.raises(DataError, match=r"part\.parquet.*'tags'.*prepare"):
        list(reader.epoch(0))


def wait_for_threads(before):
    """Gives threads time to end; the limit is only for a failing test."""
    gc.collect()
    limit = time.monotonic() + 20
    while set(threading.enumerate()) - before:
        assert time.monotonic() < limit
        time.sleep(0.001)


@pytest.mark.parametrize("abandon", ["close", "collect", "exhaust"])
def test_no_thread_outlives_its_iterator(shards, abandon):
    before = set(threading.enumerate())
    batches = open_shards(shards, shuffle_rows=3).epoch(0)
    next(batches)
    if abandon == "close":
        batches.close()
    elif abandon == "exhaust":
        list(batches)
    del batches
    wait_for_threads(before)


def test_no_thread_outlives_an_error(shards):
    def encode(table, first_row, where):
        if first_row >= 58:
            raise KeyError("late")
        return table

    before = set(threading.enumerate())
    batches = open_shards(shards, shuffle=False, batch_size=1, encode=encode).epoch(0)
    with pytest.raises(RuntimeError, match="late") as caught:
        list(batches)
    assert caught.value.__traceback__ is not None  # frames that are kept alive keep no thread alive
    wait_for_threads(before)


def test_reading_stops_between_row_groups_when_nobody_waits(tmp_path):
    shards = write_shards(tmp_path, [5] * 12)
    groups_read, second_window, closed = [], threading.Event(), threading.Event()

    def encode(table, first_row, where):
        groups_read.append(where)
        if len(groups_read) == 7:
            second_window.set()
            assert closed.wait(20)
        return table

    before = set(threading.enumerate())
    # 25 rows are at most six intervals: the seventh is in the second window.
    batches = open_shards(shards, shuffle_rows=25, batch_size=1, encode=encode).epoch(0)
    next(batches)
    assert second_window.wait(20)
    batches.close()
    closed.set()
    wait_for_threads(before)
    assert len(groups_read) == 7
