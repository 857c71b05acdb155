"""Row plans: equal lanes, every row once, windows that stand alone."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.data.raw import DataError, RowGroup
from hetegen_rec.data.row_plan import RowPlan, lanes_of

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)


def groups_of(sizes):
    firsts = np.cumsum([0, *sizes])
    return [
        RowGroup(path=f"part-{i // 2}.parquet", index=i % 2, num_rows=size, first_row=int(firsts[i]))
        for i, size in enumerate(sizes)
    ]


def plan_of(sizes, **changes):
    arguments = {"num_lanes": 1, "seed": 0, "epoch": 0, "shuffle": True, "window_rows": 16, "pad": False}
    return RowPlan(groups_of(sizes), **{**arguments, **changes})


def rows_of(window):
    rows = []
    for interval in window.intervals:
        first = interval.group.first_row
        rows += range(first + interval.start, first + interval.stop)
    rows = rows if window.order is None else [rows[i] for i in window.order]
    return rows + [-1] * window.num_padding


def lane_rows(plan, lane):
    return [row for index in range(plan.num_windows) for row in rows_of(plan.window(lane, index))]


def epoch_rows(plan):
    return [row for lane in range(plan.num_lanes) for row in lane_rows(plan, lane)]


@given(SIZES, st.integers(1, 5), st.integers(1, 50), st.booleans(), st.integers(0, 3))
def test_training_reads_every_row_at_most_once_and_drops_less_than_a_row_a_lane(
    sizes, num_lanes, window_rows, shuffle, epoch
):
    num_lanes = min(num_lanes, sum(sizes))
    plan = plan_of(sizes, num_lanes=num_lanes, window_rows=window_rows, shuffle=shuffle, epoch=epoch)
    lanes = [lane_rows(plan, lane) for lane in range(num_lanes)]
    rows = list(chain.from_iterable(lanes))
    assert {len(lane) for lane in lanes} == {sum(sizes) // num_lanes}
    assert len(set(rows)) == len(rows) > sum(sizes) - num_lanes
    assert set(rows) <= set(range(sum(sizes)))


@given(SIZES, st.integers(1, 60), st.integers(1, 50), st.booleans())
def test_padding_keeps_every_row_exactly_once_in_equal_lanes(sizes, num_lanes, window_rows, shuffle):
    plan = plan_of(sizes, num_lanes=num_lanes, window_rows=window_rows, shuffle=shuffle, pad=True)
    lanes = [lane_rows(plan, lane) for lane in range(num_lanes)]
    assert {len(lane) for lane in lanes} == {-(-sum(sizes) // num_lanes)}
    assert sorted(row for row in chain.from_iterable(lanes) if row >= 0) == list(range(sum(sizes)))


@given(SIZES, st.integers(1, 50))
def test_without_shuffle_rows_keep_their_order(sizes, window_rows):
    plan = plan_of(sizes, shuffle=False, window_rows=window_rows)
    assert epoch_rows(plan) == list(range(sum(sizes)))


def test_intervals_lie_within_their_groups_and_are_never_empty():
    plan = plan_of([5, 0, 7, 1, 0, 9], num_lanes=3, window_rows=4)
    windows = [plan.window(lane, index) for lane in range(3) for index in range(plan.num_windows)]
    intervals = [interval for window in windows for interval in window.intervals]
    assert all(0 <= i.start < i.stop <= i.group.num_rows for i in intervals)


def test_a_plan_is_a_function_of_seed_and_epoch():
    orders = {(s, e): tuple(epoch_rows(plan_of([30, 30], seed=s, epoch=e))) for s in (0, 1) for e in (0, 1)}
    assert len(set(orders.values())) == 4
    assert orders[1, 1] == tuple(epoch_rows(plan_of([30, 30], seed=1, epoch=1)))


def test_a_single_row_group_leaves_out_other_rows_in_every_epoch():
    read = [frozenset(epoch_rows(plan_of([11], num_lanes=2, epoch=epoch))) for epoch in range(40)]
    assert len(set(read)) > 5


def test_rows_are_shuffled_within_a_window():
    (rows,) = [rows_of(plan_of([1000], window_rows=1000).window(0, 0))]
    displacement = np.abs(np.array(rows) - np.arange(1000))
    assert displacement.mean() > 100


def test_windows_of_different_lanes_and_positions_are_shuffled_differently():
    plan = plan_of([400], num_lanes=2, window_rows=100)
    orders = {tuple(plan.window(lane, index).order) for lane in range(2) for index in range(2)}
    assert len(orders) == 4


def test_a_hundred_million_rows_plan_at_once():
    plan = plan_of([65_536] * 1600, num_lanes=16, window_rows=1_000_000)
    window = plan.window(7, plan.num_windows - 1)
    assert sum(i.num_rows for i in window.intervals) == len(window.order)
    assert len(window.intervals) < 20


def test_fewer_rows_than_lanes_is_an_error_in_training():
    with pytest.raises(DataError, match=r"part-0\.parquet.*3 row\(s\) cannot be shared by 4 lanes"):
        plan_of([1, 2], num_lanes=4)


@pytest.mark.parametrize("pad", [True, False])
def test_no_rows_is_an_error(pad):
    with pytest.raises(DataError, match="no rows"):
        plan_of([0, 0], pad=pad)


def test_ranks_share_lanes_in_order():
    assert [list(lanes_of(rank, 2, 4)) for rank in range(2)] == [[0, 1], [2, 3]]


def test_lanes_that_ranks_cannot_share_are_an_error():
    with pytest.raises(ConfigError, match=r"data\.lanes: 4.*3 ranks.*multiple of 3"):
        lanes_of(0, 3, 4)
