"""Cursors: what becomes of them on other lanes, and on their way through a checkpoint."""

import json

import pytest

from hetegen_rec.data.cursor import Cursor, Served
from hetegen_rec.data.errors import DataError


@pytest.mark.parametrize(
    ("served", "expected"),
    [
        ((), (Served(3, 0),)),
        ((Served(3, 10),), (Served(3, 10),)),
        ((Served(2, 10),), (Served(2, 10), Served(3, 0))),
        ((Served(2, 10), Served(3, 5)), (Served(2, 10), Served(3, 5))),
        ((Served(3, 10), Served(2, 5)), (Served(3, 10), Served(2, 5), Served(3, 0))),
        ((Served(2, 0), Served(4, 0)), (Served(3, 0),)),
        ((Served(3, 10), Served(2, 0)), (Served(3, 10),)),
    ],
    ids=[
        "a fresh epoch",
        "the same lanes",
        "other lanes",
        "the newest lanes",
        "older lanes",
        "starts without a row",
        "a restart without a row",
    ],
)
def test_on_lanes_goes_on_with_the_newest_lanes_or_adds_new_ones(served, expected):
    assert Cursor(1, served).on_lanes(3) == Cursor(1, expected)


def test_rows_count_over_all_lanes_and_grow_with_every_advance():
    cursor = Cursor(2).on_lanes(2).advanced(10).advanced(10).on_lanes(3).advanced(4)
    assert cursor == Cursor(2, (Served(2, 20), Served(3, 4)))
    assert cursor.rows_per_lane == 24


@pytest.mark.parametrize("cursor", [Cursor(), Cursor(3, (Served(2, 1000), Served(3, 200)))])
def test_a_cursor_survives_json(cursor):
    assert Cursor.from_json(json.loads(json.dumps(cursor.as_json()))) == cursor


@pytest.mark.parametrize(
    "values",
    [
        None,
        {},
        {"epoch": 1},
        {"epoch": -1, "served": []},
        {"epoch": "first", "served": []},
        {"epoch": 0, "served": [{"lanes": 2}]},
        {"epoch": 0, "served": [{"lanes": 0, "rows_per_lane": 3}]},
        {"epoch": 0, "served": [{"lanes": 2, "rows_per_lane": -3}]},
    ],
)
def test_anything_else_is_an_error(values):
    with pytest.raises(DataError, match="no position in the training rows"):
        Cursor.from_json(values)
