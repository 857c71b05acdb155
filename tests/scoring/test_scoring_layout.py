"""Rows of ids in slots."""

import pyarrow as pa
from tiny_artifact import SCHEMA

from hetegen_rec.scoring.layout import Layout


def test_slots_follow_the_schema_and_lists_are_padded():
    layout = Layout(SCHEMA)
    assert layout.num_slots == 4 + 3 + 3 + 1
    assert layout.tables == ["user_id", "city", "device", "age", *["tags"] * 3, *["item_id"] * 3, "item_id"]
    columns = {
        "user_id": [2, 0],
        "city": [3, 1],
        "device": [4, 5],
        "age": [2, 2],
        "tags": [[0], [2, 3]],
        "history": [[], [7, 8, 9]],
        "item_id": [5, 6],
    }
    ids = layout.ids({name: pa.array(values) for name, values in columns.items()})
    assert ids.tolist() == [
        [2, 3, 4, 2, 0, -1, -1, -1, -1, -1, 5],
        [0, 1, 5, 2, 2, 3, -1, 7, 8, 9, 6],
    ]


def test_slices_of_encoded_columns_keep_their_rows():
    layout = Layout(SCHEMA)
    column = pa.array([1, 2, 3])
    lists = pa.array([[1], [2, 3], [4]])
    columns = {field.name: (lists if field.is_list else column).slice(1, 2) for field in SCHEMA.fields}
    assert layout.ids(columns)[:, 4:7].tolist() == [[2, 3, -1], [4, -1, -1]]
