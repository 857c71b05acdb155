"""A log cut into periods: every row once, in its time, whatever the ranks and files."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from alone import Alone
from raw_log import FEATURES, World
from timed_log import NUM_ROWS, timed_config, timed_rows, write_log

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.run import RunConfig
from hetegen_rec.data import periods
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.listing import find_files
from hetegen_rec.data.periods import Periods, cut_periods
from hetegen_rec.data.raw import expand_paths


def cut(config: RunConfig, directory: Path, ranks: int = 1) -> Periods:
    if ranks == 1:
        return cut_periods(config, directory, Alone())
    results = World(ranks).run(lambda workers: cut_periods(config, directory, workers))
    assert all(result == results[0] for result in results), results
    return results[0]


def times_in(patterns: list[str]) -> list[int]:
    tables = [pq.read_table(path, columns=["at"], partitioning=None) for path in expand_paths(patterns)]
    return [time for table in tables for time in table["at"].to_pylist()]


def test_files_that_appear_while_the_ranks_look_are_of_the_next_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_log(tmp_path)
    config = timed_config(tmp_path, periods=4)
    early = find_files(config)
    pq.write_table(timed_rows(np.arange(40)), tmp_path / "train" / "b.parquet")
    seen = [early]  # by who looks first; all others see the new file
    monkeypatch.setattr(periods, "find_files", lambda config: seen.pop() if seen else find_files(config))
    found = cut(config, tmp_path / "periods", ranks=2)
    assert sum(one.num_rows for one in found.periods) == NUM_ROWS


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_are_shared_out_equally_and_none_is_lost(tmp_path: Path, ranks: int) -> None:
    write_log(tmp_path)
    found = cut(timed_config(tmp_path, periods=5, valid_share=0.25), tmp_path / "periods", ranks)
    assert [(one.early_rows, one.late_rows) for one in found.periods] == [(30, 10)] * 5
    everything = [time for one in found.periods for time in times_in(found.files(one.number))]
    assert sorted(everything) == list(range(1000, 1000 + 10 * NUM_ROWS, 10))
    for one in found.periods:
        early, late = times_in(found.files(one.number, "early")), times_in(found.files(one.number, "late"))
        assert one.start <= min(early) <= max(early) < one.late_from <= min(late) <= max(late) < one.end


def test_what_validates_a_period_is_trained_on_with_the_next(tmp_path: Path) -> None:
    write_log(tmp_path)
    found = cut(timed_config(tmp_path, periods=4, valid_share=0.2), tmp_path / "periods")
    new = [Counter(times_in(found.new_files(number))) for number in (1, 2, 3)]
    for number in (1, 2, 3):
        assert Counter(times_in(found.files_up_to(number))) == sum(new[:number], Counter())
        held_out = times_in(found.files(number, "late"))
        assert not set(held_out) & set(sum(new[:number], Counter()))
        assert number == 3 or set(held_out) < set(new[number])


def test_periods_of_equal_time_in_a_log_without_order(tmp_path: Path) -> None:
    times = np.random.default_rng(0).permutation(NUM_ROWS) + 5000
    write_log(tmp_path, times)
    found = cut(timed_config(tmp_path, period_length=60), tmp_path / "periods")
    bounds = [(5000, 5054, 5060), (5060, 5114, 5120), (5120, 5174, 5180), (5180, 5234, 5200)]
    assert [(one.start, one.late_from) for one in found.periods] == [bound[:2] for bound in bounds]
    assert [one.num_rows for one in found.periods] == [60, 60, 60, 20]
    assert sorted(times_in(found.files(4))) == list(
        range(5180, 5200)
    )  # cut off in the middle, all of it early


def test_a_row_keeps_all_its_values(tmp_path: Path) -> None:
    log = write_log(tmp_path)
    found = cut(timed_config(tmp_path, periods=4), tmp_path / "periods", ranks=2)
    paths = expand_paths([pattern for one in found.periods for pattern in found.files(one.number)])
    copied = {}
    for path in paths:
        copied |= {row["at"]: row for row in pq.read_table(path, partitioning=None).to_pylist()}
    for row in log.to_pylist():
        other = copied[row["at"]]
        assert {**other, "price": pytest.approx(row["price"])} == row


def test_periods_are_found_in_a_directory_called_what_a_glob_is(tmp_path: Path) -> None:
    write_log(tmp_path)
    found = cut(timed_config(tmp_path, periods=4), tmp_path / "periods[1]*")
    assert sum(len(times_in(found.files(one.number))) for one in found.periods) == NUM_ROWS


def test_nothing_is_cut_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_log(tmp_path)
    config = timed_config(tmp_path, periods=4)
    found = cut(config, tmp_path / "periods")
    monkeypatch.setattr(periods, "list_groups", None)
    assert cut(config, tmp_path / "periods") == found


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"periods": 5}, "incremental.periods"), ({"periods": 4, "valid_share": 0.3}, "valid_share")],
)
def test_periods_cut_for_something_else_are_refused(
    tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    write_log(tmp_path)
    cut(timed_config(tmp_path, periods=4), tmp_path / "periods")
    with pytest.raises(DataError, match=f"{named}.*--fresh"):
        cut(timed_config(tmp_path, **changed), tmp_path / "periods")


def test_newer_raw_files_are_noticed(tmp_path: Path) -> None:
    write_log(tmp_path)
    config = timed_config(tmp_path, periods=4)
    cut(config, tmp_path / "periods")
    pq.write_table(timed_rows(np.arange(5) + 9000), tmp_path / "test" / "more.parquet")
    with pytest.raises(DataError, match="the raw files changed"):
        cut(config, tmp_path / "periods")


@pytest.mark.parametrize(
    ("times", "incremental", "error", "message"),
    [
        (np.arange(NUM_ROWS) % 3, {}, DataError, "too few different times"),
        (np.arange(NUM_ROWS), {"period_length": 150}, ConfigError, "into 2 period"),
        (np.arange(NUM_ROWS) * 1000, {"period_length": 2}, ConfigError, "unit of the timestamp column"),
        (
            np.arange(NUM_ROWS) ** 4,
            {"period_length": 50_000_000},
            DataError,
            "period 4 of 32.* has no late rows",
        ),
    ],
    ids=["few times", "one period", "wrong unit", "a gap"],
)
def test_logs_that_make_no_periods_are_refused(
    tmp_path: Path, times: np.ndarray, incremental: dict[str, Any], error: type[Exception], message: str
) -> None:
    write_log(tmp_path, times)
    with pytest.raises(error, match=message):
        cut(timed_config(tmp_path, **incremental), tmp_path / "periods")
    assert not (tmp_path / "periods").exists()
    assert not list(tmp_path.glob(".periods*"))


def test_a_row_without_a_time_is_named(tmp_path: Path) -> None:
    log = write_log(tmp_path)
    at = pa.array([*range(20), None, *range(139)])
    broken = log.slice(0, 160).set_column(log.column_names.index("at"), "at", at)
    pq.write_table(broken, tmp_path / "train" / "part.parquet")
    with pytest.raises(DataError, match="row 20 of the split has no time"):
        cut(timed_config(tmp_path), tmp_path / "periods")


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_files_with_times_in_different_units_are_refused(tmp_path: Path, policy: str) -> None:
    write_log(tmp_path)
    newer = timed_rows(np.arange(20) + 9000)
    place = newer.column_names.index("at")
    newer = newer.set_column(place, "at", newer["at"].cast(pa.timestamp("ms")))
    pq.write_table(newer, tmp_path / "test" / "part.parquet")
    config = timed_config(tmp_path, periods=4)
    data = config.data.model_copy(update={"on_bad_shard": policy})
    message = r"'at': .*train/part\.parquet stores integer, .*test/part\.parquet stores timestamp\[ms\]"
    with pytest.raises(DataError, match=message):
        cut(config.model_copy(update={"data": data}), tmp_path / "periods")


def test_a_schema_without_a_timestamp_is_refused(tmp_path: Path) -> None:
    write_log(tmp_path)
    with pytest.raises(ConfigError, match=r"features\.timestamp"):
        cut(timed_config(tmp_path, FEATURES), tmp_path / "periods")


def test_row_groups_that_cannot_be_used_are_left_out_if_wanted(tmp_path: Path) -> None:
    log = write_log(tmp_path)
    at = pa.array([*range(1000, 1200, 10), None, *range(1210, 2600, 10)])
    broken = log.slice(0, 160).set_column(log.column_names.index("at"), "at", at)
    pq.write_table(broken, tmp_path / "train" / "part.parquet", row_group_size=16)
    config = timed_config(tmp_path, periods=4)
    data = config.data.model_copy(update={"on_bad_shard": "skip"})
    found = cut(config.model_copy(update={"data": data}), tmp_path / "periods")
    assert sum(one.num_rows for one in found.periods) == NUM_ROWS - 16
