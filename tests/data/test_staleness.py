"""How stale ids are, and what becomes of the rows behind them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from small_log import SCHEMA, Log, column

from hetegen_rec.data.batching import Batcher
from hetegen_rec.data.cursor import Cursor
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.staleness import Staleness, id_cells

TABLES = [owner.name for owner in SCHEMA.table_owners]


def seen(*ids: int, num_ids: int = 6) -> dict[str, np.ndarray]:
    return {"user": np.isin(np.arange(num_ids), ids)}


def ages(staleness: Staleness) -> list[int]:
    return staleness.by_table["user"].tolist()


def test_an_id_ages_by_one_a_period_until_it_is_seen_again() -> None:
    staleness = Staleness({})
    course = []
    for ids in ((2, 3), (2,), (), (3,)):
        staleness = staleness.after(seen(*ids))
        course.append(ages(staleness))
    assert [step[2] for step in course] == [0, 0, 1, 2]
    assert [step[3] for step in course] == [0, 1, 2, 0]
    assert not any(step[:2] != [0, 0] for step in course)  # the reserved ids


def test_ids_that_came_later_are_fresh() -> None:
    older = Staleness({}).after(seen(2)).after(seen(2))
    grown = older.after(seen(2, 7, num_ids=8))
    assert ages(grown) == [0, 0, 0, 3, 3, 3, 1, 0]


def test_the_longest_absence_does_not_wrap() -> None:
    staleness = Staleness({"user": np.full(4, np.iinfo(np.uint16).max, np.uint16)})
    assert ages(staleness.after(seen(3, num_ids=4)))[2:] == [np.iinfo(np.uint16).max, 0]


def test_it_comes_back_from_disk(tmp_path: Path) -> None:
    staleness = Staleness({"user": np.arange(5, dtype=np.uint16), "item": np.zeros(3, np.uint16)})
    staleness.save(tmp_path / "staleness")
    back = Staleness.load(tmp_path / "staleness").by_table
    assert {table: found.tolist() for table, found in back.items()} == {
        "user": [0, 1, 2, 3, 4],
        "item": [0, 0, 0],
    }
    with pytest.raises(DataError, match="no staleness of ids"):
        Staleness.load(tmp_path)


def test_ids_of_every_field_are_told_by_the_table_that_they_index() -> None:
    rows = pa.table(
        {
            "user": pa.array([2, 0], pa.int32()),
            "history": pa.array([[5, 1, 6], []], pa.list_(pa.int32())),
            "genres": pa.array([[3], [0]], pa.list_(pa.int32())),
            "item": pa.array([1, 7], pa.int32()),
            "hour": pa.array([4, 4], pa.int32()),
            "place": pa.array([0, 1], pa.int32()),
        }
    )
    found = [
        (cells.table, row, cell)
        for cells in id_cells(rows, SCHEMA)
        for row, cell in zip(cells.rows.tolist(), cells.ids.tolist(), strict=True)
    ]
    assert sorted(found) == [
        ("genres", 0, 3),
        ("hour", 0, 4),
        ("hour", 1, 4),
        ("item", 0, 5),
        ("item", 0, 6),
        ("item", 1, 7),
        ("user", 0, 2),
    ]


def test_a_batch_carries_the_factor_of_every_cell() -> None:
    log = Log()
    movement = {
        table: np.linspace(0.1, 1.0, log.statistics.table_rows(table), dtype=np.float32) for table in TABLES
    }
    batcher = Batcher(SCHEMA, log.statistics, movement=movement)
    batch = batcher.make(log.table, np.zeros(log.table.num_rows, np.float32), 1, Cursor(), log.table.num_rows)
    assert batch.movement is not None
    ids, factors = batch.ids.numpy(), batch.movement.numpy()
    for key, table in (("user", "user"), ("history:1", "item"), ("item", "item")):
        there = ids[:, column(key)] >= 0
        assert there.any()
        expected = movement[table][ids[there, column(key)]]
        np.testing.assert_array_equal(factors[there, column(key)], expected)
    bags = log.table["genres"].to_pylist()
    means = [np.mean(movement["genres"][bag]) for bag in bags]
    np.testing.assert_allclose(factors[:, column("genres")], means, rtol=1e-6)


def test_a_batch_without_held_ids_carries_nothing() -> None:
    assert Log().batch().movement is None
