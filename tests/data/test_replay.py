"""Rows with stale ids are found, chosen and copied."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from alone import Alone
from hypothesis import given
from hypothesis import strategies as st
from raw_log import World
from timed_log import timed_config, timed_rows

from hetegen_rec.config.incremental import IncrementalConfig
from hetegen_rec.data.prepare import prepare
from hetegen_rec.data.raw import expand_paths, list_row_groups
from hetegen_rec.data.replay import (
    Replay,
    ReplayWriter,
    StaleRows,
    choose_rows,
    read_replay,
    weights,
)
from hetegen_rec.data.staleness import Staleness
from hetegen_rec.data.workers import Workers

USERS = 30


def stale_rows(*rows: list[int]) -> StaleRows:
    starts = np.cumsum([0, *(len(ids) for ids in rows)])
    return StaleRows(np.arange(len(rows)), starts, np.array([one for ids in rows for one in ids], np.int64))


def test_an_id_that_went_lately_is_worth_more() -> None:
    ages = np.array([0, 1, 2, 4], np.uint16)
    np.testing.assert_allclose(weights(ages, "inverse", 0.1), [0.0, 1.1, 0.6, 0.35])
    np.testing.assert_allclose(weights(ages, "exponential", 0.0), [0.0, *np.exp([-1.0, -2.0, -4.0])])
    assert weights(np.array([65535], np.uint16), "exponential", 0.0) > 0


@pytest.mark.parametrize(
    ("rows", "num_rows", "expected"),
    [
        ([[0], [1, 2], [3]], 1, [1]),
        ([[0, 1], [1, 2, 3], [0]], 2, [1, 2]),  # 0 covers as little anew as 2 does, and is older
        (
            [[0, 1], [0], [1], [1]],
            3,
            [0, 1, 3],
        ),  # all covered by the first; then as often each, later rows first
        ([[0], [1]], 5, [0, 1]),
        ([], 5, []),
    ],
    ids=["most ids", "what is covered counts no more", "equal shares", "fewer than wanted", "none"],
)
def test_rows_are_chosen_for_what_they_cover(
    rows: list[list[int]], num_rows: int, expected: list[int]
) -> None:
    assert choose_rows(stale_rows(*rows), np.ones(4), num_rows).tolist() == expected


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True), min_size=1, max_size=25),
    st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0]), min_size=10, max_size=10),
    st.integers(1, 12),
)
def test_the_lazy_choice_is_greedy_and_then_equal(
    rows: list[list[int]], worth: list[float], num_rows: int
) -> None:
    chosen = choose_rows(stale_rows(*rows), np.array(worth), num_rows).tolist()
    assert len(set(chosen)) == len(chosen) == min(num_rows, len(rows))
    if len(rows) <= num_rows:
        return
    left, held = list(range(len(rows))), Counter()
    for place in chosen:
        gains = {other: sum(worth[one] for one in rows[other] if not held[one]) for other in left}
        if max(gains.values()):
            assert gains[place] == max(gains.values())
        else:
            least = min(held[one] for other in left for one in rows[other])
            assert min(held[one] for one in rows[place]) == least
        left.remove(place)
        held.update(rows[place])


def test_many_rows_of_one_id_are_chosen_in_no_time() -> None:
    rows = 50_000  # by looking at all rows for each of them it would be hours
    stale = StaleRows(np.arange(rows), np.arange(rows + 1), np.zeros(rows, np.int64))
    assert choose_rows(stale, np.ones(1), rows - 1).tolist() == [rows - 1, *range(rows - 2, 0, -1)]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Prepared earlier rows of all users, and new rows of the first half of them, elsewhere the same."""
    for split, size in {"train": 120, "valid": 20, "test": 20}.items():
        (tmp_path / split).mkdir()
        pq.write_table(timed_rows(np.arange(size)), tmp_path / split / "part.parquet", row_group_size=16)
    rows = timed_rows(np.arange(400), seed=1)
    few = [int(user.split()[1]) < USERS // 2 for user in rows["user"].to_pylist()]
    (tmp_path / "new").mkdir()
    pq.write_table(rows.filter(few), tmp_path / "new" / "part.parquet")
    prepare(timed_config(tmp_path), Alone())
    return tmp_path


def write(log: Path, workers: Workers, num_rows: int, name: str = "replay") -> Replay:
    config = timed_config(log)
    writer = ReplayWriter(config.features, config.data.prepared_dir, 16, workers)
    staleness = writer.age(Staleness({}), list_row_groups([f"{log}/new/*.parquet"]))
    candidates = list_row_groups([f"{log}/train/*.parquet"])
    incremental = IncrementalConfig(replay_rows=num_rows)
    return writer.write(log / name, staleness, candidates, incremental)


def test_replayed_are_rows_of_users_who_stayed_away(log: Path) -> None:
    replay = write(log, Alone(), 10)
    rows = [row for path in expand_paths(replay.files) for row in pq.read_table(path).to_pylist()]
    assert len(rows) == replay.summary.rows == 10
    candidates = pq.read_table(log / "train" / "part.parquet").to_pylist()
    assert all(row in candidates for row in rows)
    away = {row["user"] for row in candidates if int(row["user"].split()[1]) >= USERS // 2}
    assert len({row["user"] for row in rows} & away) >= min(9, len(away))
    assert replay.summary.candidates == 120
    assert replay.summary.covered_ids <= replay.summary.stale_ids
    staleness = Staleness.load(replay.staleness_dir)
    assert set(np.unique(staleness.by_table["user"])) == {0, 1}


def test_any_number_of_ranks_chooses_the_same_rows(log: Path) -> None:
    alone = write(log, Alone(), 10)
    both = World(2).run(lambda workers: write(log, workers, 10, "of_two"))
    assert [replay.summary for replay in both] == [alone.summary] * 2
    files = [sorted(expand_paths(replay.files)) for replay in (alone, both[0])]
    times = [
        sorted(time for path in paths for time in pq.read_table(path)["at"].to_pylist()) for paths in files
    ]
    assert times[0] == times[1]
    assert read_replay(log / "of_two") == both[0]


def test_where_no_id_is_stale_nothing_is_replayed(log: Path) -> None:
    config = timed_config(log)
    writer = ReplayWriter(config.features, config.data.prepared_dir, 16, Alone())
    groups = list_row_groups([f"{log}/train/*.parquet"])
    replay = writer.write(log / "replay", writer.age(Staleness({}), groups), groups, config.incremental)
    assert replay.files == []
    assert replay.summary.with_stale_ids == 0
