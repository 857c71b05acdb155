"""The feature schema: which combinations of keys are fields, and which tokens they become."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hetegen_rec.config import Field, Schema, Token
from hetegen_rec.config.schema import NUM_RESERVED_IDS, ReservedId


def field(**keys: Any) -> Field:
    return Field.model_validate({"name": "f", "kind": "id", **keys})


def schema(*fields: dict[str, Any], **keys: Any) -> Schema:
    return Schema.model_validate({"label": "click", "fields": list(fields), **keys})


USER = {"name": "user", "kind": "id"}
ITEM = {"name": "item", "kind": "id"}
HISTORY = {"name": "history", "kind": "sequence", "table": "item", "max_length": 3}
GENRES = {"name": "genres", "kind": "multi_valued"}


def test_missing_and_unknown_values_have_the_first_two_ids():
    assert (ReservedId.MISSING, ReservedId.OUT_OF_VOCABULARY, NUM_RESERVED_IDS) == (0, 1, 2)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"kind": "id"}, {"vocabulary": "vocab", "min_count": 1, "max_length": None}),
        ({"kind": "numeric"}, {"vocabulary": "buckets", "num_buckets": 32, "min_count": None}),
        ({"kind": "numeric", "vocabulary": "vocab"}, {"min_count": 1, "num_buckets": None}),
        ({"kind": "multi_valued"}, {"vocabulary": "vocab", "max_length": 16}),
        ({"kind": "sequence", "table": "item"}, {"vocabulary": None, "max_length": 20}),
        ({"vocabulary": "hash", "hash_size": 100}, {"min_count": None, "hash_size": 100}),
    ],
)
def test_defaults_follow_the_kind_and_the_vocabulary(keys, expected):
    made = field(**keys)
    assert {key: getattr(made, key) for key in expected} == expected


def test_column_is_the_name_unless_given():
    assert field().column == "f"
    assert field(column="raw name").column == "raw name"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": ["id"]}, "Input should be 'id', "),
        ({"name": "a b"}, "letters, digits and underscores"),
        ({"name": "1st"}, "must not start with a digit"),
        ({"kind": "sequence"}, "a sequence needs `table`"),
        ({"kind": "sequence", "table": "item", "vocabulary": "hash"}, "`vocabulary` is that of the field"),
        ({"kind": "id", "dim": 6}, "`dim: 6` must be a multiple of 4"),
        ({"kind": "sequence", "table": "item", "dim": 8}, "`dim` belongs to the field"),
        ({"table": "item"}, "`table` is for kind `sequence` only"),
        ({"max_length": 3}, "`max_length` is for kinds"),
        ({"vocabulary": "buckets"}, "`vocabulary: buckets` needs kind `numeric`"),
        ({"vocabulary": "hash"}, "needs `hash_size`"),
        ({"hash_size": 100}, "`hash_size` is for `vocabulary: hash` only"),
        ({"vocabulary": "hash", "hash_size": 2**31 - 2}, "must be at most 2147483645, as ids have 32 bits"),
        ({"num_buckets": 4}, "`num_buckets` is for `vocabulary: buckets` only"),
        ({"vocabulary": "hash", "hash_size": 9, "min_count": 2}, "`min_count` is for `vocabulary: vocab`"),
    ],
)
def test_contradictions_of_a_field_are_errors(keys, message):
    with pytest.raises(ValidationError, match=message):
        field(**keys)


@given(
    kind=st.sampled_from(["id", "categorical", "numeric", "multi_valued", "sequence"]),
    vocabulary=st.sampled_from([None, "vocab", "hash", "buckets"]),
    numbers=st.dictionaries(
        st.sampled_from(["min_count", "hash_size", "num_buckets", "max_length", "dim"]), st.integers(1, 99)
    ),
    table=st.sampled_from([None, "item"]),
)
def test_whatever_is_accepted_can_be_saved_and_read_again(kind, vocabulary, numbers, table):
    keys = {"name": "f", "kind": kind, "vocabulary": vocabulary, "table": table, **numbers}
    try:
        made = Field.model_validate(keys)
    except ValidationError:
        return
    assert Field.model_validate(made.model_dump(mode="json")) == made
    assert (made.table is not None) == (kind == "sequence")
    assert made.list_length == (made.max_length or 1)


def test_tokens_stand_in_schema_order_with_one_for_each_place_of_a_sequence():
    made = schema(USER, HISTORY, GENRES, ITEM)
    assert made.tokens == (
        Token("user", "user"),
        Token("history:0", "history", 0),
        Token("history:1", "history", 1),
        Token("history:2", "history", 2),
        Token("genres", "genres"),
        Token("item", "item"),
    )


def test_sequence_shares_the_table_of_its_items():
    made = schema(USER, HISTORY, ITEM)
    assert [owner.name for owner in made.table_owners] == ["user", "item"]
    assert [token.key for token in made.tokens_on("item")] == ["history:0", "history:1", "history:2", "item"]
    assert made.field("history").table_name == "item"


@pytest.mark.parametrize(
    ("fields", "keys", "message"),
    [
        ([], {}, "`fields` is empty"),
        ([USER, USER], {}, "field name 'user' stands twice"),
        ([{**USER, "column": "click"}], {}, "reads the label column 'click'"),
        ([USER, HISTORY], {}, r"shares table 'item', which must be .*\(fields: user, history\)"),
        ([GENRES, {**HISTORY, "table": "genres"}], {}, "shares table 'genres'"),
        ([USER], {"user": "member"}, r"`user: member` must name .*\(fields: user\)"),
        ([USER, GENRES], {"item": "genres"}, "`item: genres` must name an `id` or `categorical` field"),
    ],
)
def test_contradictions_between_fields_are_errors(fields, keys, message):
    with pytest.raises(ValidationError, match=message):
        schema(*fields, **keys)


def test_a_span_covers_the_tokens_of_its_field_only() -> None:
    built = schema(
        {"name": "item", "kind": "id"},
        {"name": "history", "kind": "sequence", "table": "item", "max_length": 3},
        {"name": "genres", "kind": "multi_valued"},
    )
    assert [built.span(name) for name in built.field_names] == [(0, 1), (1, 4), (4, 5)]
