"""Batches from encoded tables: contents against a slow reference, and table dropout."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetegen_rec.config.schema import NUM_RESERVED_IDS, Schema
from hetegen_rec.data.batching import Batcher
from hetegen_rec.data.cursor import Cursor, Served
from hetegen_rec.data.encoded_rows import encoded_schema
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.statistics import FieldStatistics, Statistics

SCHEMA = Schema.model_validate(
    {
        "label": "click",
        "timestamp": "time",
        "user": "user",
        "fields": [
            {"name": "user", "kind": "id"},
            {"name": "genres", "kind": "multi_valued", "max_length": 4},
            {"name": "item", "kind": "id"},
            {"name": "history", "kind": "sequence", "table": "item", "max_length": 3},
            {"name": "tags", "kind": "multi_valued", "max_length": 2},
            {"name": "age", "kind": "numeric"},
        ],
    }
)
NUM_IDS = {"user": 7, "genres": 5, "item": 9, "tags": 4, "age": 6}
NUM_TRAINING_ROWS = 1000
CURSOR = Cursor(2, (Served(4, 5),))


class FakeStatistics:
    """Frequencies that tell all fields, tables and ids apart."""

    def __init__(self, occurrences=None):
        self.occurrences = occurrences or {}

    def table_rows(self, table):
        return NUM_IDS[table]

    def log_prior(self, field, oov_dropout=0.0):
        place = SCHEMA.field_names.index(field)
        return -(place + 1 + np.arange(NUM_IDS[SCHEMA.field(field).table_name], dtype=np.float32) / 16)

    def lookups(self, table):
        return self.occurrences.get(table, np.arange(NUM_IDS[table]) + 1).astype(np.float64)

    def log_rate(self, table, oov_dropout=0.0):
        return np.log(np.maximum(self.lookups(table), 0.5) / NUM_TRAINING_ROWS).astype(np.float32)


def ids_of(table):
    return st.integers(0, NUM_IDS[table] - 1)


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "user": ids_of("user"),
            "genres": st.lists(ids_of("genres"), min_size=1, max_size=4),
            "item": ids_of("item"),
            "history": st.lists(ids_of("item"), max_size=3),
            "tags": st.lists(ids_of("tags"), min_size=1, max_size=2),
            "age": ids_of("age"),
            "__label": st.sampled_from([0.0, 1.0]),
        }
    ),
    min_size=1,
    max_size=20,
)


def table_of(rows, first_row_id=0):
    columns = {}
    for field in SCHEMA.fields:
        kind = pa.list_(pa.int32()) if field.is_list else pa.int32()
        columns[field.name] = pa.array([row[field.name] for row in rows], kind)
    columns["__label"] = pa.array([row["__label"] for row in rows], pa.float32())
    columns["__row_id"] = pa.array(range(first_row_id, first_row_id + len(rows)), pa.int64())
    columns["__timestamp"] = pa.array([100 + i for i in range(len(rows))], pa.int64())
    columns["__user_key"] = pa.array([row["user"] * 11 for row in rows], pa.int64())
    columns["__user_rows"] = pa.array([row["user"] for row in rows], pa.int64())
    return pa.table(columns)


def make(table, statistics=None, noise_seed=1, oov_dropout=0.0):
    strata = ((np.arange(table.num_rows) + 0.5) / table.num_rows).astype(np.float32)
    batcher = Batcher(SCHEMA, statistics or FakeStatistics(), oov_dropout)
    return batcher.make(table, strata, noise_seed, CURSOR, table.num_rows)


def bags_of(row):
    """The reference: the bag of every token of a row."""
    bags = []
    for token in SCHEMA.tokens:
        value = row[token.field]
        kind = SCHEMA.field(token.field).kind
        if kind == "sequence":
            bags.append(value[token.position : token.position + 1])
        else:
            bags.append(value if kind == "multi_valued" else [value])
    return bags


@given(ROWS)
def test_the_kjt_holds_the_bags_of_every_token(rows):
    kjt = make(table_of(rows)).kjt
    assert kjt.keys() == [token.key for token in SCHEMA.tokens]
    assert kjt.values().dtype == torch.int64
    assert kjt.lengths().dtype == torch.int32
    assert kjt.stride() == len(rows)
    expected = [bags_of(row) for row in rows]
    for index, key in enumerate(kjt.keys()):
        tensor = kjt[key]
        bags = [bag.tolist() for bag in torch.split(tensor.values(), tensor.lengths().tolist())]
        assert bags == [bags[index] for bags in expected]


@given(ROWS)
def test_ids_and_frequencies_match_a_reference(rows):
    statistics = FakeStatistics()
    batch = make(table_of(rows), statistics)
    for b, row in enumerate(rows):
        for t, (token, bag) in enumerate(zip(SCHEMA.tokens, bags_of(row), strict=True)):
            prior = statistics.log_prior(token.field)
            rate = statistics.log_rate(SCHEMA.field(token.field).table_name)
            assert batch.ids[b, t] == (bag[0] if bag else -1)
            known = [value for value in bag if value >= NUM_RESERVED_IDS] or bag
            assert batch.log_prior[b, t] == pytest.approx(np.mean(prior[known]) if bag else 0.0, rel=1e-5)
            assert batch.log_rate[b, t] == pytest.approx(np.mean(rate[bag]) if bag else 0.0, rel=1e-5)


@given(ROWS)
def test_columns_beside_the_ids_pass_through(rows):
    table = table_of(rows, first_row_id=40)
    batch = make(table, noise_seed=17)
    assert batch.labels.tolist() == table["__label"].to_pylist()
    assert batch.row_ids.tolist() == table["__row_id"].to_pylist()
    assert set(batch.context) == {"timestamp", "user_key", "user_rows"}
    assert batch.context["user_key"].tolist() == table["__user_key"].to_pylist()
    assert (batch.noise_seed, batch.cursor) == (17, CURSOR)
    assert all(0 < s < 1 for s in batch.strata.tolist())


@given(ROWS, st.integers(0, 19), st.integers(1, 20))
def test_slices_and_chunks_of_a_table_make_the_same_batch(rows, start, length):
    table = table_of(rows)
    start = min(start, len(rows) - 1)
    part = table.slice(start, length)
    copied = table_of(rows[start : start + length], first_row_id=start)
    chunked = pa.concat_tables([part.slice(0, 1), part.slice(1)])
    reference = make(copied)
    for other in (make(part), make(chunked)):
        assert torch.equal(other.ids, reference.ids)
        assert torch.equal(other.kjt.values(), reference.kjt.values())
        assert torch.equal(other.kjt.lengths(), reference.kjt.lengths())


def test_lengths_per_key_are_known_without_asking_the_tensors():
    rows = [{"user": 1, "genres": [2, 3], "item": 4, "history": [5], "tags": [2], "age": 3, "__label": 1.0}]
    kjt = make(table_of(rows)).kjt
    assert kjt._length_per_key == [1, 2, 1, 1, 0, 0, 1, 1]
    assert kjt.to(torch.device("cpu"))._length_per_key == kjt._length_per_key


def test_padding_holds_no_ids_and_no_rows():
    batcher = Batcher(SCHEMA, FakeStatistics())
    padding = batcher.padding(3)
    assert padding.schema == encoded_schema(SCHEMA)
    batch = make(padding)
    assert batch.row_ids.tolist() == [-1, -1, -1]
    assert (batch.ids == -1).all()
    assert batch.kjt.values().numel() == 0
    assert batch.kjt.lengths().tolist() == [0] * 3 * len(SCHEMA.tokens)


@given(ROWS)
def test_encoded_rows_conform_whatever_the_widths_of_their_types(rows):
    table = table_of(rows)
    wide = pa.schema([(name, pa.int64()) for name in ("user", "item", "age")])
    for field in wide:
        index = table.schema.get_field_index(field.name)
        table = table.set_column(index, field, table[field.name].cast(pa.int64()))
    batcher = Batcher(SCHEMA, FakeStatistics())
    expected = table_of(rows).cast(encoded_schema(SCHEMA))
    assert batcher.conform(table.append_column("other", table["user"]), "here") == expected


def test_no_rows_conform():
    batcher = Batcher(SCHEMA, FakeStatistics())
    assert batcher.conform(table_of([]), "here").num_rows == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("item", 9),
        ("user", -1),
        ("history", [0, 9]),
        ("tags", [1, 4]),
        ("genres", [1] * 5),
        ("age", None),
        ("tags", [1, None]),
    ],
)
def test_rows_that_are_none_of_these_statistics_do_not_conform(field, value):
    row = {"user": 1, "genres": [2], "item": 4, "history": [], "tags": [2], "age": 3, "__label": 1.0}
    table = table_of([row, {**row, field: value}])
    with pytest.raises(DataError, match=rf"here: column '{field}' holds .*prepare"):
        Batcher(SCHEMA, FakeStatistics()).conform(table, "here")


def many_rows(num_rows):
    row = {"user": 3, "genres": [2, 3], "item": 4, "history": [5, 4], "tags": [2], "age": 0, "__label": 1.0}
    return table_of([row] * num_rows)


def test_dropout_replaces_an_id_seen_n_times_with_probability_a_over_a_plus_n():
    counts = {name: np.full(num_ids, 6) for name, num_ids in NUM_IDS.items()}
    counts["genres"] = np.array([0, 0, 1, 10_000, 0])
    batch = make(many_rows(4000), FakeStatistics(counts), oov_dropout=2.0)
    dropped = (batch.ids == 1).float().mean(dim=0)
    keys = [token.key for token in SCHEMA.tokens]
    for key in ("user", "item", "history:0", "history:1", "tags"):
        assert dropped[keys.index(key)] == pytest.approx(2 / 8, abs=0.04)
    bags = batch.kjt["genres"].values().reshape(-1, 2)
    assert (bags[:, 0] == 1).float().mean() == pytest.approx(2 / 3, abs=0.04)
    assert (bags[:, 1] == 3).float().mean() > 0.99
    assert torch.equal(bags[:, 0], batch.ids[:, keys.index("genres")])


def test_dropout_spares_reserved_ids_and_always_takes_unseen_ones():
    statistics = FakeStatistics({"user": np.zeros(7)})
    batch = make(many_rows(50), statistics, oov_dropout=0.5)
    assert (batch.ids[:, 0] == 1).all()
    assert (batch.ids[:, -1] == 0).all()


def test_dropout_draws_differ_between_tokens_rows_and_seeds_but_not_between_calls():
    statistics = FakeStatistics({name: np.full(num_ids, 2) for name, num_ids in NUM_IDS.items()})
    table = many_rows(500)
    first, again, other = (make(table, statistics, seed, oov_dropout=2.0) for seed in (1, 1, 2))
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)
    user, item = first.ids[:, 0] == 1, first.ids[:, 2] == 1
    assert 0.4 < (user == item).float().mean() < 0.6


def test_dropout_depends_on_the_row_and_not_on_its_place_in_the_batch():
    statistics = FakeStatistics({name: np.full(num_ids, 2) for name, num_ids in NUM_IDS.items()})
    table = many_rows(40)
    whole = make(table, statistics, oov_dropout=2.0)
    part = make(table.slice(13, 9), statistics, oov_dropout=2.0)
    assert torch.equal(part.ids, whole.ids[13:22])


def test_frequencies_are_those_of_the_replaced_ids():
    statistics = FakeStatistics({"user": np.zeros(7)})
    batch = make(many_rows(5), statistics, oov_dropout=1.0)
    assert batch.log_prior[0, 0] == statistics.log_prior("user")[1]


def test_rows_to_score_keep_their_ids_and_have_the_frequencies_of_training_under_dropout():
    table, statistics = shared_table_log(first_id=2)
    strata = np.full(table.num_rows, 0.5, np.float32)
    batcher = Batcher(SCHEMA, statistics, 2.0, drop_ids=False)
    batch = batcher.make(table, strata, 1, CURSOR, table.num_rows)
    item = SCHEMA.span("item")[0]
    ids = torch.tensor(table["item"].to_pylist())
    assert torch.equal(batch.ids[:, item], ids)
    for name, under_dropout in (("log_prior", statistics.log_prior), ("log_rate", statistics.log_rate)):
        found = getattr(batch, name)[:, item]
        assert torch.equal(found, torch.from_numpy(under_dropout("item", 2.0))[ids])
        assert not torch.equal(found, torch.from_numpy(under_dropout("item"))[ids])


@pytest.mark.parametrize("read", [(), ("log_prior",), ("log_rate",)])
def test_frequencies_that_nobody_reads_are_left_out_and_the_rest_is_the_same(read):
    table = many_rows(5)
    strata = np.full(5, 0.5, np.float32)
    all_read = Batcher(SCHEMA, FakeStatistics(), 2.0).make(table, strata, 1, CURSOR, 5)
    batch = Batcher(SCHEMA, FakeStatistics(), 2.0, frequencies=read).make(table, strata, 1, CURSOR, 5)
    assert torch.equal(batch.ids, all_read.ids)
    assert torch.equal(batch.kjt.values(), all_read.kjt.values())
    for name in ("log_prior", "log_rate"):
        expected = getattr(all_read, name) if name in read else torch.empty(5, 0)
        assert torch.equal(getattr(batch, name), expected)


def shared_table_log(first_id):
    """60 rows whose items and histories share a table of skewed ids from `first_id` up; its statistics."""
    rng = np.random.default_rng(0)
    row = {"user": 2, "genres": [2], "tags": [2], "age": 2, "__label": 0.0}
    items = np.minimum(first_id + rng.geometric(0.4, (60, 3)) - 1, NUM_IDS["item"] - 1).tolist()
    rows = [{**row, "item": item, "history": history} for item, *history in items]
    fields = {}
    for field in SCHEMA.fields:
        ids = np.hstack([row[field.name] for row in rows])
        counts = np.bincount(ids, minlength=NUM_IDS[field.table_name])
        fields[field.name] = FieldStatistics(
            name=field.name,
            num_values=len(ids),
            num_missing=0,
            num_out_of_vocabulary=0,
            cardinality=0,
            num_ids=len(counts),
            entropy=0.0,
            counts=counts,
            table=field.table_name,
        )
    return table_of(rows), Statistics(len(rows), 0, fields)


@pytest.mark.parametrize("first_id", [0, 2], ids=["reserved ids in training", "none in training"])
@pytest.mark.parametrize("oov_dropout", [0.0, 0.5, 1.0])
def test_lookups_weighted_by_their_rate_count_every_table_row_once_in_the_mean(oov_dropout, first_id):
    table, statistics = shared_table_log(first_id)
    weights, num_epochs = np.zeros(NUM_IDS["item"]), 500
    batcher = Batcher(SCHEMA, statistics, oov_dropout)
    strata = np.full(table.num_rows, 0.5, np.float32)
    on_table = [t for t, token in enumerate(SCHEMA.tokens) if token.field in ("item", "history")]
    for epoch in range(num_epochs):
        batch = batcher.make(table, strata, epoch, Cursor(epoch), table.num_rows)
        ids, log_rate = batch.ids[:, on_table].numpy(), batch.log_rate[:, on_table].numpy()
        present = ids >= 0
        np.add.at(weights, ids[present], np.exp(-log_rate[present]) / table.num_rows)
    looked_up = statistics.lookups("item") > 0
    looked_up[1] |= oov_dropout > 0
    assert weights[looked_up] / num_epochs == pytest.approx(1.0, abs=0.1)
    assert (weights[~looked_up] == 0).all()
