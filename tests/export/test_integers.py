"""Raw integers in the graph: the ids, and so the probabilities, of the encoder."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import tiny_values, write_config

from hetegen_rec.cli import main
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.export import ExportConfig
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.statistics import FieldStatistics, Statistics
from hetegen_rec.export.part_parity import integers_of
from hetegen_rec.export.parts import check_parts
from hetegen_rec.scoring.errors import ArtifactError
from hetegen_rec.scoring.layout import Layout
from hetegen_rec.scoring.scorer import Scorer

FIELDS = [
    {"name": "user", "kind": "id", "vocabulary": "hash", "hash_size": 97},
    {"name": "age", "kind": "numeric", "num_buckets": 8},
    {"name": "tags", "kind": "multi_valued", "vocabulary": "hash", "hash_size": 13, "max_length": 3},
    {"name": "item", "kind": "id", "vocabulary": "hash", "hash_size": 64},
    {"name": "history", "kind": "sequence", "table": "item", "max_length": 2},
]
INT64 = np.iinfo(np.int64)
ODD_ROWS = [
    {"user": INT64.min, "age": INT64.min, "tags": [INT64.max], "item": INT64.max, "history": [INT64.min]},
    {"user": -1, "age": -7, "tags": [-1, 0, 1], "item": 0, "history": [-3, -2, -1]},
    {"user": 0, "age": 10**15, "tags": [5, None, 6], "item": -(2**53) - 1, "history": [None, 4]},
    {},
    {"user": None, "age": None, "tags": [], "item": 3, "history": []},
]


def log(num_rows, seed=0):
    rng = np.random.default_rng(seed)
    users = rng.integers(INT64.min, INT64.max, num_rows)
    return pa.table(
        {
            "label": pa.array(rng.integers(0, 2, num_rows)),
            "user": pa.array(users, mask=rng.random(num_rows) < 0.1),
            "age": pa.array(rng.integers(-50, 50, num_rows), mask=rng.random(num_rows) < 0.1),
            "tags": [rng.integers(-9, 9, rng.integers(0, 5)).tolist() for _ in range(num_rows)],
            "item": pa.array(rng.integers(-40, 40, num_rows)),
            "history": [rng.integers(-40, 40, rng.integers(0, 4)).tolist() for _ in range(num_rows)],
        }
    )


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("integers")
    values = tiny_values(directory)
    values["features"] = {"label": "label", "fields": FIELDS}
    values["data"] = {"prepared_dir": str(directory / "prepared")}
    for seed, split in enumerate(("train", "valid")):
        pq.write_table(log(480, seed), directory / f"{split}.parquet")
        values["data"][split] = [str(directory / f"{split}.parquet")]
    config = str(write_config(directory, values))
    assert main(["scratch", "--config", config, "train.max_steps=2", "model.init_std=0.5"]) == 0
    artifact = str(directory / "artifact")
    wanted = ("export.raw_integers=true", "export.tables=int8", "model.init_std=0.5")
    assert main(["export", "--config", config, "--output", artifact, *wanted]) == 0
    return Scorer.load(artifact)


def in_slots(scorer, rows):
    return integers_of(Layout(scorer.artifact.manifest.features), rows)


def test_rows_have_the_probabilities_that_the_encoder_leads_to(scorer):
    rows = log(300, seed=9)
    found, expected = scorer.score_integers(*in_slots(scorer, rows)), scorer.score(rows)
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("row", ODD_ROWS, ids=str)
def test_odd_rows_do_too(row, scorer):
    columns = {"user": pa.int64(), "age": pa.int64(), "item": pa.int64()}
    schema = {
        name: columns.get(name, pa.list_(pa.int64())) for name in ("user", "age", "tags", "item", "history")
    }
    rows = pa.Table.from_pylist([row], pa.schema(schema.items()))
    found = scorer.score_integers(*in_slots(scorer, rows))
    np.testing.assert_allclose(found, scorer.score(rows), atol=1e-6, rtol=0)


def test_unsigned_integers_come_by_their_bits(scorer):
    large = np.array([2**64 - 1, 2**63, 2**63 + 12345], np.uint64)
    rows = pa.table({**{name: log(3)[name] for name in ("age", "tags", "item", "history")}, "user": large})
    values, given = in_slots(scorer, rows)
    assert values[:, 0].tolist() == large.view(np.int64).tolist()
    found = scorer.score_integers(values, given)
    np.testing.assert_allclose(found, scorer.score(rows), atol=1e-6, rtol=0)


def test_what_stands_where_nothing_is_given_does_not_matter(scorer):
    values, given = in_slots(scorer, log(50))
    noise = np.random.default_rng(0).integers(INT64.min, INT64.max, values.shape)
    found = scorer.score_integers(np.where(given, values, noise), given)
    np.testing.assert_array_equal(found, scorer.score_integers(values, given))


@pytest.mark.parametrize(
    ("of_values", "of_given"),
    [
        (np.zeros((2, 7), np.int64), np.zeros((2, 8), np.bool_)),
        (np.zeros((2, 8), np.int32), np.zeros((2, 8), np.bool_)),
        (np.zeros((2, 8), np.int64), np.zeros((1, 8), np.bool_)),
        (np.zeros((2, 8), np.int64), np.zeros((2, 8), np.uint8)),
    ],
    ids=["a slot less", "32 bits", "a row less", "bytes"],
)
def test_arrays_of_another_form_are_refused(of_values, of_given, scorer):
    with pytest.raises(DataError, match=r"give int64 and bool, both of shape \(rows, 8\)"):
        scorer.score_integers(of_values, of_given)


def test_the_gate_compares_both_ways(scorer):
    (parity,) = scorer.artifact.manifest.parity.values()
    assert parity["raw_integers"]["rows"] == 480
    assert parity["raw_integers"]["greatest_difference"] < 1e-6


def test_fractions_are_refused(scorer):
    rows = log(3).set_column(2, "age", pa.array([1.0, 2.5, 3.0]))
    with pytest.raises(ConfigError, match=r"numeric field 'age' holds 2\.5"):
        in_slots(scorer, rows)


def test_a_graph_that_was_not_exported_is_refused_with_its_key(scorer):
    with pytest.raises(ArtifactError, match=r"export\.shared_fields"):
        scorer.score_candidates({}, [{}])


def test_fields_whose_ids_are_no_function_of_integers_are_refused_by_name():
    fields = [
        *FIELDS,
        {"name": "city", "kind": "id", "vocabulary": "hash", "hash_size": 9},
        {"name": "shop", "kind": "id"},
    ]
    schema = Schema.model_validate({"label": "click", "fields": fields})
    types = {"city": "string", "age": "number"}
    statistics = Statistics(1, 0, {field.name: _statistics(field.name, types) for field in schema.fields})
    with pytest.raises(
        ConfigError, match=r"these are not: city \(strings\), shop \(vocabulary: vocab\)\. Set"
    ):
        check_parts(ExportConfig(raw_integers=True), schema, statistics)


def _statistics(name, types):
    return FieldStatistics(
        name, 1, 0, 0, 1, 3, 0.0, np.zeros(3, np.int64), value_type=types.get(name, "integer")
    )
