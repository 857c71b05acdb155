"""Row plans: equal lanes, every row once, also over restarts on other lanes; windows that stand alone."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.data.cursor import Cursor, Served
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.raw import RowGroup
from hetegen_rec.data.row_plan import RowPlan, lanes_of

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)


def groups_of(sizes):
    firsts = np.cumsum([0, *sizes])
    return [
        RowGroup(path=f"part-{i // 2}.parquet", index=i % 2, num_rows=size, first_row=int(firsts[i]))
        for i, size in enumerate(sizes)
    ]


def plan_of(sizes, *, num_lanes=1, epoch=0, served=(), **changes):
    cursor = Cursor(epoch, served or (Served(num_lanes, 0),))
    return RowPlan(groups_of(sizes), cursor, **{"seed": 0, "shuffle": True, "window_rows": 16, **changes})


def rows_of(window):
    rows = []
    for interval in window.intervals:
        first = interval.group.first_row
        rows += range(first + interval.start, first + interval.stop)
    return rows if window.order is None else [rows[i] for i in window.order]


def lane_rows(plan, lane, start=0):
    """What a lane hands out from a position on, -1 for padding."""
    rows = []
    for piece in plan.pieces(lane, start):
        found = [-1] * piece.stop if piece.window is None else rows_of(plan.window(*piece.window))
        rows += found[piece.start : piece.stop]
    return rows


def epoch_rows(plan, start=0):
    return [row for lane in range(plan.lanes.num_lanes) for row in lane_rows(plan, lane, start)]


def real(rows):
    return [row for row in rows if row >= 0]


@given(SIZES, st.integers(1, 60), st.integers(1, 50), st.booleans(), st.integers(0, 3))
def test_every_row_is_read_exactly_once_in_equal_lanes(sizes, num_lanes, window_rows, shuffle, epoch):
    plan = plan_of(sizes, num_lanes=num_lanes, window_rows=window_rows, shuffle=shuffle, epoch=epoch)
    lanes = [lane_rows(plan, lane) for lane in range(num_lanes)]
    assert {len(lane) for lane in lanes} == {-(-sum(sizes) // num_lanes)}
    assert sorted(real(chain.from_iterable(lanes))) == list(range(sum(sizes)))


@given(SIZES, st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=1, max_size=5), st.data())
def test_every_row_is_read_exactly_once_over_all_cuts_of_an_epoch(sizes, cuts, data):
    shuffle, window_rows = data.draw(st.booleans()), data.draw(st.integers(1, 50))
    served, read = (), []
    for num_lanes, part in cuts:
        plan = plan_of(
            sizes, served=(*served, Served(num_lanes, 0)), shuffle=shuffle, window_rows=window_rows
        )
        rows_per_lane = int(part * plan.lanes.rows_per_lane)
        lanes = [lane_rows(plan, lane) for lane in range(num_lanes)]
        assert {len(lane) for lane in lanes} == {plan.lanes.rows_per_lane}
        read += [row for lane in lanes for row in lane[:rows_per_lane]]
        served = (*served, Served(num_lanes, rows_per_lane))
    rest = epoch_rows(plan, start=served[-1].rows_per_lane)
    assert sorted(real(read + rest)) == list(range(sum(sizes)))


@given(SIZES, st.integers(1, 5), st.integers(1, 5), st.integers(1, 20))
def test_a_start_within_lanes_is_where_the_whole_lanes_were(sizes, before, num_lanes, window_rows):
    start = -(-sum(sizes) // before) // 2
    plan = plan_of(sizes, served=(Served(before, start), Served(num_lanes, 0)), window_rows=window_rows)
    for lane in range(num_lanes):
        whole = lane_rows(plan, lane)
        assert all(lane_rows(plan, lane, start) == whole[start:] for start in range(len(whole) + 1))


def test_a_cut_of_which_nothing_was_handed_out_changes_nothing():
    plans = [
        plan_of([83], served=(Served(4, 7), Served(num_lanes, 0), Served(4, 0))) for num_lanes in (1, 3, 20)
    ]
    expected = epoch_rows(plan_of([83], num_lanes=4), start=7)
    assert [epoch_rows(plan) for plan in plans] == [expected] * 3


def test_an_epoch_that_is_read_to_its_end_leaves_nothing_for_other_lanes():
    plan = plan_of([83], served=(Served(4, 21), Served(3, 0)))
    assert plan.lanes.rows_per_lane == 0
    assert epoch_rows(plan) == []


@pytest.mark.parametrize(
    ("served", "message"),
    [
        ((Served(2, 42),), "row 42 of each of 2 lanes, but these have 41 rows"),
        ((Served(2, 30), Served(3, 8)), "row 8 of each of 3 lanes, but these have 7 rows"),
        ((Served(2, 42), Served(3, 0)), "row 42 of each of 2 lanes, but these have 41 rows"),
    ],
    ids=["first cut", "second cut", "first cut of two"],
)
def test_a_position_behind_the_rows_is_an_error(served, message):
    with pytest.raises(DataError, match=message):
        plan_of([40, 41], served=served)


@given(SIZES, st.integers(1, 50))
def test_without_shuffle_rows_keep_their_order(sizes, window_rows):
    plan = plan_of(sizes, shuffle=False, window_rows=window_rows)
    assert epoch_rows(plan) == list(range(sum(sizes)))


def windows_of(plan):
    pieces = [piece for lane in range(plan.lanes.num_lanes) for piece in plan.pieces(lane)]
    return [plan.window(*piece.window) for piece in pieces if piece.window]


def test_intervals_lie_within_their_groups_and_are_never_empty():
    windows = windows_of(plan_of([5, 0, 7, 1, 0, 9], num_lanes=3, window_rows=4))
    intervals = [interval for window in windows for interval in window.intervals]
    assert all(0 <= i.start < i.stop <= i.group.num_rows for i in intervals)


def test_a_plan_is_a_function_of_seed_and_epoch():
    orders = {(s, e): tuple(epoch_rows(plan_of([30, 30], seed=s, epoch=e))) for s in (0, 1) for e in (0, 1)}
    assert len(set(orders.values())) == 4
    assert orders[1, 1] == tuple(epoch_rows(plan_of([30, 30], seed=1, epoch=1)))


def test_rows_are_shuffled_within_a_window():
    (rows,) = [rows_of(plan_of([1000], window_rows=1000).window(0, 0))]
    displacement = np.abs(np.array(rows) - np.arange(1000))
    assert displacement.mean() > 100


def test_windows_of_different_lanes_and_positions_are_shuffled_differently():
    orders = {tuple(window.order) for window in windows_of(plan_of([400], num_lanes=2, window_rows=100))}
    assert len(orders) == 4


def test_a_hundred_billion_rows_plan_at_once():
    plan = plan_of([10**8] * 1000, served=[Served(16 + i, 10**8) for i in range(5)], window_rows=1_000_000)
    pieces = plan.pieces(7)
    window = plan.window(*next(pieces).window)
    assert sum(interval.num_rows for interval in window.intervals) == len(window.order)
    assert len(window.intervals) <= 2
    assert sum(len(plan.lanes.share(lane)) for lane in range(20)) <= sum(range(16, 21))


def test_no_rows_is_an_error():
    with pytest.raises(DataError, match=r"part-0\.parquet.*no rows"):
        plan_of([0, 0])


def test_ranks_share_lanes_in_order():
    assert [list(lanes_of(rank, 2, 4)) for rank in range(2)] == [[0, 1], [2, 3]]


def test_lanes_that_ranks_cannot_share_are_an_error():
    with pytest.raises(ConfigError, match=r"data\.lanes: 4.*3 ranks.*multiple of 3"):
        lanes_of(0, 3, 4)
