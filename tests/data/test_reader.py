"""Readers: every row once, the same global batches for any number of ranks, resume, errors."""

import gc
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from encoded_shards import NUM_IDS, Shards, encoded_rows, open_shards, write_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.data.cursor import Cursor, Served
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.reader import _steps

START = Cursor()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """83 rows in row groups of uneven sizes."""
    return write_shards(tmp_path_factory.mktemp("encoded"), [20, 0, 31, 7, 1, 24])


def contents(batch):
    """Everything of a batch that can be compared."""
    lists = [getattr(batch, name).tolist() for name in ("ids", "labels", "row_ids", "strata")]
    return (*lists, batch.kjt.values().tolist(), batch.kjt.lengths().tolist(), batch.noise_seed, batch.cursor)


def epoch_of(reader, cursor=START):
    return [contents(batch) for batch in reader.epoch(cursor)]


def row_ids_of(reader, epoch=0):
    return [row for batch in reader.epoch(Cursor(epoch)) for row in batch.row_ids.tolist()]


def global_steps(shards, world_size, cursor=START, **changes):
    """The batches of all ranks, in order of rank, for each step."""
    ranks = [
        list(open_shards(shards, rank=rank, world_size=world_size, **changes).epoch(cursor))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    return list(zip(*ranks, strict=True))


def global_rows(shards, world_size, **changes):
    """For each step the rows of all ranks' batches, in order of rank."""
    return [
        {
            "row_ids": torch.cat([batch.row_ids for batch in step]).tolist(),
            "ids": torch.cat([batch.ids for batch in step]).tolist(),
            "strata": torch.cat([batch.strata for batch in step]).tolist(),
            "num_real_rows": {batch.num_real_rows for batch in step},
            "cursors": {batch.cursor for batch in step},
        }
        for step in global_steps(shards, world_size, **changes)
    ]


def row_ids_of_step(step):
    return torch.cat([batch.row_ids for batch in step]).tolist()


def real(rows):
    return [row for row in rows if row >= 0]


def test_batches_hold_what_their_rows_hold(shards):
    for batch in open_shards(shards).epoch(START):
        rows = batch.row_ids.tolist()
        assert batch.labels.tolist() == [float(row % 2) for row in rows]
        assert batch.ids[:, 0].tolist() == [row % NUM_IDS for row in rows]
        assert batch.kjt["history:0"].lengths().tolist() == [int(row % 4 > 0) for row in rows]
        assert batch.kjt["tags"].values().tolist() == [row % 7 for row in rows]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 40), st.booleans())
def test_an_epoch_reads_each_row_exactly_once(shards, num_lanes, share, shuffle_rows, shuffle):
    reader = open_shards(
        shards,
        num_lanes=num_lanes,
        batch_size=share * num_lanes,
        shuffle_rows=shuffle_rows,
        shuffle=shuffle,
    )
    rows = row_ids_of(reader)
    assert sorted(real(rows)) == list(range(83))
    assert len(rows) == -(-83 // num_lanes) * num_lanes


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 100])
def test_any_number_of_ranks_reads_each_row_exactly_once(shards, world_size):
    steps = global_steps(shards, world_size, num_lanes=world_size, batch_size=4 * world_size)
    rows = [row for step in steps for row in row_ids_of_step(step)]
    assert sorted(real(rows)) == list(range(83))
    assert len(rows) == -(-83 // world_size) * world_size


@pytest.mark.parametrize(("world_size", "num_lanes"), [(1, 1), (2, 4), (3, 3), (10, 10), (20, 40)])
def test_every_rank_knows_how_many_rows_of_a_step_are_real(shards, world_size, num_lanes):
    for step in global_steps(shards, world_size, num_lanes=num_lanes, batch_size=3 * num_lanes):
        assert {batch.num_real_rows for batch in step} == {len(real(row_ids_of_step(step)))}


def test_padding_rows_look_nothing_up(shards):
    reader = open_shards(shards, rank=9, world_size=10, num_lanes=10, batch_size=90, shuffle=False)
    (batch,) = reader.epoch(START)
    assert batch.row_ids.tolist() == [81, 82] + [-1] * 7
    assert (batch.ids[2:] == -1).all()


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_same_lanes_make_the_same_global_batches_on_any_number_of_ranks(shards, world_size):
    alone = global_rows(shards, 1, num_lanes=4, oov_dropout=0.5)
    assert global_rows(shards, world_size, num_lanes=4, oov_dropout=0.5) == alone


@pytest.mark.parametrize("num_lanes", [4, 20])
def test_strata_cover_the_real_rows_of_the_global_batch_evenly(shards, num_lanes):
    for step in global_rows(shards, 2, num_lanes=num_lanes, batch_size=3 * num_lanes):
        rows = zip(step["strata"], step["row_ids"], strict=True)
        strata = sorted(stratum for stratum, row in rows if row >= 0)
        assert strata == pytest.approx([(i + 0.5) / len(strata) for i in range(len(strata))])
        assert 0 < min(step["strata"]) <= max(step["strata"]) < 1


def test_strata_of_every_rank_cover_all_levels(shards):
    for step in global_steps(shards, 2, num_lanes=4, batch_size=32):
        for batch in step:
            strata = batch.strata[batch.row_ids >= 0]
            assert strata.mean().item() == pytest.approx(0.5, abs=0.1)
            assert strata.min() < 0.25
            assert strata.max() > 0.75


def test_epochs_differ_and_repeat(shards):
    reader = open_shards(shards)
    assert epoch_of(reader) == epoch_of(reader)
    assert row_ids_of(reader, 0) != row_ids_of(reader, 1)
    assert next(reader.epoch(START)).noise_seed != next(reader.epoch(Cursor(1))).noise_seed


def test_two_iterators_of_one_reader_do_not_disturb_each_other(shards):
    reader = open_shards(shards)
    pairs = list(zip(reader.epoch(START), reader.epoch(START), strict=True))
    assert len(pairs) == reader.batches_per_epoch
    assert all(contents(a) == contents(b) for a, b in pairs)


def test_without_shuffle_rows_come_as_they_are_stored(shards):
    assert row_ids_of(open_shards(shards, shuffle=False)) == list(range(83))


def test_the_number_of_batches_is_known_and_the_last_smaller_one_kept(shards):
    reader = open_shards(shards, num_lanes=2)
    sizes = [batch.num_rows for batch in reader.epoch(START)]
    assert (reader.num_rows, reader.batches_per_epoch) == (83, 11)
    assert sizes == [8] * 10 + [4]


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_resumes_behind_any_batch(shards, shuffle):
    reader = open_shards(shards, num_lanes=2, shuffle=shuffle, shuffle_rows=7)
    whole = epoch_of(reader, Cursor(4))
    for done, batch in enumerate(whole):
        cursor = batch[-1]
        assert cursor.epoch == 4
        assert epoch_of(reader, cursor) == whole[done + 1 :]


def test_a_resume_may_change_the_batch_size(shards):
    rows = row_ids_of(open_shards(shards))
    resumed = open_shards(shards, batch_size=5).epoch(Cursor(0, (Served(1, 13),)))
    assert [row for batch in resumed for row in batch.row_ids.tolist()] == rows[13:]


RESTARTS = st.tuples(
    st.sampled_from([(1, 1), (1, 2), (2, 2), (1, 3), (3, 3), (2, 4), (5, 5), (1, 16)]),  # ranks, lanes
    st.integers(1, 5),  # rows of a lane in a step
    st.integers(0, 12),  # steps trained before the next restart
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(RESTARTS, min_size=2, max_size=4), st.integers(1, 40), st.booleans())
def test_restarts_on_other_ranks_and_lanes_read_each_row_exactly_once(shards, starts, shuffle_rows, shuffle):
    cursor, rows = Cursor(1), []
    for number, ((world_size, num_lanes), share, num_steps) in enumerate(starts):
        changes = {"num_lanes": num_lanes, "batch_size": share * num_lanes}
        changes |= {"shuffle": shuffle, "shuffle_rows": shuffle_rows}
        steps = global_steps(shards, world_size, cursor, **changes)
        assert open_shards(shards, **changes).batches_left(cursor) == len(steps)
        if number + 1 < len(starts):
            steps = steps[:num_steps]
        for step in steps:
            (cursor,) = {batch.cursor for batch in step}
            assert {batch.num_real_rows for batch in step} == {len(real(row_ids_of_step(step)))}
            rows += row_ids_of_step(step)
    assert sorted(real(rows)) == list(range(83))
    assert list(open_shards(shards, shuffle=shuffle).epoch(cursor)) == []


@pytest.mark.parametrize("num_lanes", [2, 3, 12])
def test_a_restart_on_other_lanes_does_not_change_the_number_of_steps(shards, num_lanes):
    reader, other = (open_shards(shards, num_lanes=n, batch_size=12) for n in (4, num_lanes))
    left = [other.batches_left(batch.cursor) for batch in reader.epoch(START)]
    assert left == list(reversed(range(reader.batches_per_epoch)))


def test_noise_differs_between_steps_before_and_behind_a_restart(shards):
    before = list(open_shards(shards, num_lanes=2).epoch(START))[:4]
    behind = list(open_shards(shards, num_lanes=4).epoch(before[-1].cursor))
    steps = [batch.cursor.rows_per_lane for batch in before + behind]
    assert steps == sorted(set(steps))
    assert {batch.noise_seed for batch in before + behind} == {before[0].noise_seed}


def test_a_cursor_behind_the_end_is_an_error(shards):
    cursor = Cursor(0, (Served(1, 84),))
    with pytest.raises(DataError, match=r"row 84 of each of 1 lanes, but these have 83 rows"):
        open_shards(shards).epoch(cursor)
    with pytest.raises(DataError, match=r"row 84"):
        open_shards(shards, num_lanes=2).batches_left(cursor)


def test_rows_encoded_while_reading_make_the_same_batches(tmp_path):
    (tmp_path / "encoded").mkdir()
    encoded = write_shards(tmp_path / "encoded", [83])
    pq.write_table(pa.table({"number": list(range(83))}), tmp_path / "raw.parquet", row_group_size=83)

    def encode(table, first_row, where):
        assert table["number"].to_pylist() == list(range(first_row, first_row + table.num_rows))
        assert "raw.parquet, row group 0, rows " in where
        return encoded_rows(first_row, first_row + table.num_rows)

    on_the_fly = open_shards(Shards(str(tmp_path)), encode=encode, columns=["number"])
    assert epoch_of(on_the_fly) == epoch_of(open_shards(encoded))


def test_a_batch_that_lanes_cannot_share_is_an_error(shards):
    with pytest.raises(ConfigError, match=r"batch of 8 rows.*3 lanes.*train\.batch_size"):
        open_shards(shards, num_lanes=3)


def test_no_piece_of_a_lane_is_asked_for_before_a_step_needs_it():
    sizes = {0: [7, 1, 1, 20, 11], 1: [1, 30, 9], 2: [13, 13, 14]}
    starts = sorted(
        (sum(sizes[lane][:i]), lane, size) for lane in sizes for i, size in enumerate(sizes[lane])
    )
    asked = []

    def pieces():
        for start, lane, size in starts:
            asked.append(start)
            yield lane, pa.table({"row": [100 * lane + start + i for i in range(size)]})

    steps = []
    for step in _steps(pieces(), range(3), 6):
        steps.append([rows["row"].to_pylist() for rows in step])
        assert max(asked) < 6 * len(steps)
    for lane in range(3):
        rows = [row for step in steps for row in step[lane]]
        assert rows == list(range(100 * lane, 100 * lane + 40))
    assert [len(step[0]) for step in steps] == [6] * 6 + [4]


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
    batches = open_shards(shards, shuffle_rows=3).epoch(START)
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
    batches = open_shards(shards, shuffle=False, batch_size=1, encode=encode).epoch(START)
    with pytest.raises(DataError, match="late") as caught:
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
    batches = open_shards(shards, shuffle_rows=25, batch_size=1, encode=encode).epoch(START)
    next(batches)
    assert second_window.wait(20)
    batches.close()
    closed.set()
    wait_for_threads(before)
    assert len(groups_read) == 7
