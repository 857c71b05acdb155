import pytest

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.expected import expected_statistics, values_per_row

SCHEMA = Schema.model_validate(
    {
        "label": "label",
        "fields": [
            {"name": "user", "kind": "id", "vocabulary": "hash", "hash_size": 2 * 10**9},
            {"name": "item", "kind": "id"},
            {"name": "genres", "kind": "multi_valued", "max_length": 3},
            {"name": "price", "kind": "numeric", "num_buckets": 8},
            {"name": "history", "kind": "sequence", "table": "item", "max_length": 4},
        ],
    }
)
EXPECTED = {"item": 1000, "genres": 20}


def test_tables_are_as_large_as_the_schema_says() -> None:
    statistics = expected_statistics(SCHEMA, EXPECTED)
    sizes = {field.name: statistics.table_rows(field.name) for field in SCHEMA.table_owners}
    assert sizes == {"user": 2 * 10**9 + 2, "item": 1002, "genres": 22, "price": 10}


def test_lists_are_taken_to_be_full() -> None:
    found = values_per_row(SCHEMA, expected_statistics(SCHEMA, EXPECTED))
    assert found == {"user": 1.0, "item": 1.0, "genres": 3.0, "price": 1.0, "history": 4.0}


def test_an_unknown_vocabulary_is_named_with_the_key_to_set() -> None:
    with pytest.raises(ConfigError, match=r"field item .*plan\.expected_values\.item, take"):
        expected_statistics(SCHEMA, {"genres": 20})
    with pytest.raises(ConfigError, match=r"fields item, genres .*plan\.expected_values\.item and so on"):
        expected_statistics(SCHEMA, {})
