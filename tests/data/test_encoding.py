import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetegen_rec.config import Schema
from hetegen_rec.data.encoded_rows import encoded_schema
from hetegen_rec.data.encoding import Encoder, required_columns, vocabulary_path
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.hashing import hash_bucket_torch, mix64_torch, salt_of
from hetegen_rec.data.statistics import Accumulator, Statistics
from hetegen_rec.data.summary import summarise_table

SCHEMA = Schema.model_validate(
    {
        "label": "y",
        "timestamp": "when",
        "user": "user",
        "item": "item",
        "fields": [
            {"name": "item", "kind": "id", "min_count": 2},
            {"name": "user", "kind": "id"},
            {"name": "place", "kind": "categorical", "vocabulary": "hash", "hash_size": 50},
            {"name": "price", "kind": "numeric", "num_buckets": 2},
            {"name": "tags", "kind": "multi_valued", "max_length": 2},
            {"name": "history", "kind": "sequence", "table": "item", "max_length": 3},
        ],
    }
)
TYPES = pa.schema(
    [
        ("y", pa.int8()),
        ("when", pa.int64()),
        ("item", pa.int64()),
        ("user", pa.string()),
        ("place", pa.int64()),
        ("price", pa.float64()),
        ("tags", pa.list_(pa.string())),
        ("history", pa.list_(pa.int64())),
    ]
)
NOTHING: dict = dict.fromkeys(TYPES.names) | {"y": 0}
TRAINING = [
    NOTHING | {"item": 5, "user": "ann", "place": 1, "price": 1.0, "tags": ["a", "b"], "history": [5]},
    NOTHING | {"item": 5, "user": "ann", "place": 2, "price": 2.0, "tags": ["a"]},
    NOTHING | {"item": 6, "user": "bob", "place": 2, "price": 3.0},
    NOTHING | {"item": 7, "user": None, "history": [7, 7]},
]


def table_of(*rows: dict) -> pa.Table:
    return pa.Table.from_pylist([NOTHING | row for row in rows], TYPES)


def encoder_of(training: pa.Table, schema: Schema = SCHEMA) -> Encoder:
    accumulator = Accumulator(schema)
    accumulator.add(training, 0, "training")
    fields, vocabularies = {}, {}
    for owner in schema.table_owners:
        vocabulary, found = summarise_table(schema, owner.name, accumulator.of_table(owner.name))
        fields.update({field.name: field for field in found})
        if vocabulary is not None:
            vocabularies[owner.name] = vocabulary
    return Encoder(schema, Statistics(accumulator.num_rows, 0, fields), vocabularies)


ENCODER = encoder_of(table_of(*TRAINING))


def encode(*rows: dict) -> dict[str, list]:
    return ENCODER.encode(table_of(*rows), 100, "here").to_pydict()


def test_values_missing_values_and_strangers_get_their_ids() -> None:
    encoded = encode({"item": 5}, {"item": 7}, {"item": 6}, {"item": 99}, {"item": None})
    assert encoded["item"] == [2, 3, 1, 1, 0]  # by count: 5 (3), 7 (3); 6 is too rare, 99 unknown


def test_an_empty_string_is_a_value_and_nan_is_missing() -> None:
    assert encode({"user": ""})["user"] == [1]
    assert encode({"price": float("nan")})["price"] == [0]


def test_numbers_fall_into_buckets_and_none_is_out_of_vocabulary() -> None:
    encoded = encode(*({"price": p} for p in (-9.0, 1.0, 1.9, 2.0, 1e300, float("inf"))))
    assert encoded["price"] == [2, 2, 2, 3, 3, 3]


def test_lists_keep_the_first_values_and_sequences_the_latest_most_recent_first() -> None:
    encoded = encode(
        {"tags": ["x", "b", "a"], "history": [5, 7, 99, 5]},
        {"tags": [], "history": []},
        {"tags": [None, "a"], "history": [None, 7]},
        {"tags": None, "history": None},
    )
    assert encoded["tags"] == [[1, 3], [0], [2], [0]]
    assert encoded["history"] == [[2, 1, 3], [], [3], []]


def test_context_columns_know_training_rows_of_raw_values() -> None:
    encoded = encode(
        {"user": "ann", "item": 6, "when": 7}, {"user": "eve", "item": 99}, {}, {"user": "ann", "item": 7}
    )
    assert encoded["__user_rows"] == [2, 0, 0, 2]
    assert encoded["__item_rows"] == [1, 0, 0, 1]  # below min_count too; histories do not count
    assert encoded["__timestamp"] == [7, 0, 0, 0]
    keys = encoded["__user_key"]
    assert keys[0] == keys[3]
    assert keys[2] == 0
    assert len(set(keys)) == 3
    assert encoded["__row_id"] == [100, 101, 102, 103]
    assert encoded["__label"] == [0.0] * 4


def test_whole_floats_that_their_type_tells_apart_are_integers() -> None:
    doubles = table_of({}, {}).set_column(
        TYPES.get_field_index("place"), "place", pa.array([5.0, 2.0**53 - 1])
    )
    assert (
        ENCODER.encode(doubles, 0, "here")["place"].to_pylist()
        == encode({"place": 5}, {"place": 2**53 - 1})["place"]
    )


def test_hashed_ids_are_those_that_torch_computes() -> None:
    values = [1, -5, 2**62]
    encoded = encode(*({"place": v} for v in values))
    hashes = mix64_torch(torch.tensor(values), salt_of("place"))
    assert encoded["place"] == (2 + hash_bucket_torch(hashes, 50)).tolist()


def test_encoded_tables_have_the_columns_and_types_that_batches_expect() -> None:
    table = ENCODER.encode(table_of(*TRAINING), 0, "here")
    expected = encoded_schema(SCHEMA)
    assert set(table.column_names) == set(expected.names)
    assert all(table.schema.field(name).type == expected.field(name).type for name in expected.names)
    assert len(ENCODER.encode(table_of(), 0, "here")) == 0


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.none() | st.text(max_size=12), min_size=1, max_size=30),
    st.lists(st.none() | st.text(max_size=12), max_size=30),
)
def test_every_training_string_has_its_own_id_and_every_other_is_unknown(training, other) -> None:
    schema = Schema.model_validate({"label": "y", "fields": [{"name": "s", "kind": "categorical"}]})

    def strings(values: list) -> pa.Table:
        return pa.table({"y": np.zeros(len(values)), "s": pa.array(values, pa.string())})

    encoder = encoder_of(strings(training), schema)
    ids = dict(zip(training, encoder.encode(strings(training), 0, "here")["s"].to_pylist(), strict=True))
    known = {value for value in training if value is not None}
    assert sorted(ids[value] for value in known) == list(range(2, 2 + len(known)))
    for value, found in zip(other, encoder.encode(strings(other), 0, "here")["s"].to_pylist(), strict=True):
        assert found == (0 if value is None else ids.get(value, 1))


@pytest.mark.parametrize(
    "values",
    [
        pa.array([5, 7, None], pa.int32()),
        pa.array([5, 7, None], pa.uint64()),
        pa.array([5.0, 7.0, float("nan")]),
        pa.array([5, 7, None], pa.int16()).dictionary_encode(),
    ],
    ids=lambda values: str(values.type),
)
def test_storage_types_do_not_change_ids(values) -> None:
    table = table_of({}, {}, {}).set_column(TYPES.get_field_index("item"), "item", values)
    assert ENCODER.encode(table, 0, "here")["item"].to_pylist() == [2, 3, 0]


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["ann", "bob", None], pa.large_string()),
        pa.array(["ann", "bob", None]).dictionary_encode(),
        pa.array(["ann", "bob", None], pa.string_view()),
    ],
    ids=lambda values: str(values.type),
)
def test_string_types_do_not_change_ids(values) -> None:
    table = table_of({}, {}, {}).set_column(TYPES.get_field_index("user"), "user", values)
    assert ENCODER.encode(table, 0, "here")["user"].to_pylist() == [2, 3, 0]


def test_list_types_do_not_change_ids() -> None:
    for kind in (pa.large_list(pa.large_string()), pa.list_(pa.string(), 2)):
        values = pa.array([["a", "b"], ["b", None], None], kind)
        table = table_of({}, {}, {}).set_column(TYPES.get_field_index("tags"), "tags", values)
        assert ENCODER.encode(table, 0, "here")["tags"].to_pylist() == [[2, 3], [3], [0]]


def test_values_behind_a_null_list_are_left_out() -> None:
    offsets, hidden = pa.array([0, 1, 3, 5], pa.int32()), pa.array([False, True, False])
    values = pa.ListArray.from_arrays(offsets, pa.array(["a", "b", "b", "b", "a"]), mask=hidden)
    table = table_of({}, {}, {}).set_column(TYPES.get_field_index("tags"), "tags", values)
    assert ENCODER.encode(table, 0, "here")["tags"].to_pylist() == [[2], [0], [3, 2]]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "item",
            pa.array([[1]]),
            r"here: column 'item' of id field 'item': expected integers or strings, found",
        ),
        ("item", pa.array(["5"]), "here: column 'item' .* holds string values, but the training rows"),
        ("item", pa.array([5.5]), "here: column 'item' .* whole numbers only"),
        (
            "item",
            pa.array([2.0**53]),
            r"row 100 .* double column .* below 2\*\*53 .* write int64, with nulls",
        ),
        ("item", pa.array([-(2.0**24)], pa.float32()), r"a float column .* below 2\*\*24"),
        ("item", pa.array([2048.0]).cast(pa.float16()), r"a halffloat column .* below 2\*\*11"),
        (
            "price",
            pa.array(["9"]),
            "here: column 'price' of numeric field 'price': expected numbers, found str",
        ),
        (
            "tags",
            pa.array(["a"]),
            "here: column 'tags' of multi_valued field 'tags': expected lists, found str",
        ),
        ("history", pa.array([[1.5]]), "here: column 'history' .* whole numbers only"),
        ("when", pa.array(["noon"]), "here: timestamp column 'when': expected integers or timestamps"),
        ("y", pa.array([2]), r"here: label column 'y': row 100 of the split holds 2, expected 0 or 1"),
        ("y", pa.array([None], pa.int8()), "row 100 of the split holds None"),
        ("y", pa.array([float("nan")]), "row 100 of the split holds nan"),
        ("y", pa.array([1700000000000000001]), "row 100 of the split holds 1700000000000000001, expected 0"),
        ("y", pa.array(["1"]), "label column 'y': expected 0 and 1 as numbers or booleans, found string"),
    ],
)
def test_wrong_columns_are_named_with_what_was_expected_and_found(column, values, message) -> None:
    table = table_of({}).set_column(TYPES.get_field_index(column), column, values)
    with pytest.raises(DataError, match=message):
        ENCODER.encode(table, 100, "here")


def test_a_missing_column_is_named_with_its_key() -> None:
    table = table_of({}).drop_columns(["place"])
    with pytest.raises(DataError, match=r"here: no column 'place' .*features.fields, `column` of 'place'"):
        ENCODER.encode(table, 0, "here")
    assert required_columns(SCHEMA) == TYPES.names


def test_a_column_that_stands_twice_is_named_with_its_key() -> None:
    table = table_of({}).append_column("price", pa.array([1.0]))
    with pytest.raises(DataError, match=r"shard: 2 columns 'price' \(`features\.fields, "):
        ENCODER.encode(table, 0, "shard")


def test_labels_may_be_booleans_or_floats() -> None:
    for values in (pa.array([True, False]), pa.array([1.0, 0.0], pa.float32())):
        table = table_of({}, {}).set_column(0, "y", values)
        assert ENCODER.encode(table, 0, "here")["__label"].to_pylist() == [1.0, 0.0]


def test_a_loaded_encoder_encodes_the_same(tmp_path) -> None:
    ENCODER._statistics.save(tmp_path)
    for table, vocabulary in ENCODER._exact.items():
        vocabulary_path(tmp_path, table).parent.mkdir(exist_ok=True)
        vocabulary.save(vocabulary_path(tmp_path, table))
    loaded = Encoder.load(tmp_path, SCHEMA)
    rows = table_of(*TRAINING, {"item": 99, "user": "eve", "place": 9, "tags": ["z"], "history": [6]})
    assert loaded.encode(rows, 0, "here").equals(ENCODER.encode(rows, 0, "here"))
    assert pq.read_table(vocabulary_path(tmp_path, "item"))["value"].to_pylist() == [5, 7, 6]


def test_a_field_without_training_values_knows_none() -> None:
    encoder = encoder_of(table_of({}, {}))
    encoded = encoder.encode(
        table_of({"item": 1, "user": "x", "place": 3, "price": 2.0}), 0, "here"
    ).to_pydict()
    assert (encoded["item"], encoded["user"], encoded["price"]) == ([1], [1], [2])


def test_a_table_whose_owner_had_no_values_has_the_type_of_its_sequence() -> None:
    encoder = encoder_of(table_of({"history": [5, 6]}))
    assert encoder.encode(table_of({"item": 5}), 0, "new")["item"].to_pylist() == [1]
    strings = table_of({}).set_column(TYPES.get_field_index("item"), "item", pa.array(["5"]))
    with pytest.raises(DataError, match=r"field 'item' holds string values, but .* integer values"):
        encoder.encode(strings, 0, "new")
