import json
import math
import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetegen_rec.config import Schema
from hetegen_rec.data import accumulators
from hetegen_rec.data.accumulators import DistinctSketch, Histogram
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.hashing import mix64
from hetegen_rec.data.statistics import Accumulator, FieldStatistics, Statistics
from hetegen_rec.data.summary import KeptTable, summarise_table
from hetegen_rec.data.vocabulary import ExactVocabulary, TableIdentity

SCHEMA = Schema.model_validate(
    {
        "label": "y",
        "fields": [
            {"name": "item", "kind": "id", "min_count": 2},
            {"name": "user", "kind": "id", "vocabulary": "hash", "hash_size": 5},
            {"name": "price", "kind": "numeric", "num_buckets": 2},
            {"name": "tags", "kind": "multi_valued", "max_length": 2},
            {"name": "history", "kind": "sequence", "table": "item", "max_length": 2},
        ],
    }
)
TYPES = pa.schema(
    [
        ("y", pa.int8()),
        ("item", pa.int64()),
        ("user", pa.string()),
        ("price", pa.float64()),
        ("tags", pa.list_(pa.string())),
        ("history", pa.list_(pa.int64())),
    ]
)
ROW = st.fixed_dictionaries(
    {
        "y": st.integers(0, 1),
        "item": st.none() | st.integers(0, 5),
        "user": st.none() | st.text(max_size=2),
        "price": st.none() | st.floats(allow_nan=True),
        "tags": st.none() | st.lists(st.none() | st.sampled_from("abc"), max_size=4),
        "history": st.none() | st.lists(st.integers(0, 8), max_size=4),
    }
)


def table_of(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, TYPES)


def count(tables: list[pa.Table], schema: Schema = SCHEMA) -> Accumulator:
    accumulator, first_row = Accumulator(schema), 0
    for table in tables:
        accumulator.add(table, first_row, "here")
        first_row += len(table)
    return accumulator


def summarise(
    parts: list[Accumulator],
    schema: Schema = SCHEMA,
    older: tuple[Statistics, dict] | None = None,
) -> tuple[Statistics, dict]:
    """What `prepare` does with the counts of several ranks, and with the ids of older data."""
    fields, vocabularies = {}, {}
    for owner in schema.table_owners:
        merged, *others = [pickle.loads(pickle.dumps(part.of_table(owner.name))) for part in parts]
        for other in others:
            for name, counted in merged.items():
                counted.merge(other[name])
        vocabularies[owner.name], found = summarise_table(
            schema, owner.name, merged, older and kept_table(owner.name, *older)
        )
        fields.update({field.name: field for field in found})
    num_rows, num_positives = sum(p.num_rows for p in parts), sum(p.num_positives for p in parts)
    ordered = {name: fields[name] for name in schema.field_names}
    return Statistics(num_rows, num_positives, ordered), vocabularies


def kept_table(table: str, statistics: Statistics, vocabularies: dict) -> KeptTable:
    vocabulary = vocabularies[table]
    values = vocabulary and vocabulary.values.slice(0, vocabulary.num_kept)
    return KeptTable("older", statistics.fields[table], statistics.table_identities[table], values)


def statistics_of(rows: list[dict]) -> Statistics:
    return summarise([count([table_of(rows)])])[0]


def row(**values: object) -> dict:
    return {"y": 0, "item": None, "user": None, "price": None, "tags": None, "history": None} | values


@settings(max_examples=40, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=30), st.integers(0, 30), st.integers(0, 30))
def test_merged_counts_are_those_of_one_pass(rows, first_cut, second_cut) -> None:
    a, b = sorted((first_cut, second_cut))
    whole, vocabularies = summarise([count([table_of(rows)])])
    parts = [count([table_of(part)]) for part in (rows[b:], rows[:a], rows[a:b])]
    merged, merged_vocabularies = summarise(parts)
    assert merged.fingerprint == whole.fingerprint
    for name, field in whole.fields.items():
        assert merged.fields[name].counts.tolist() == field.counts.tolist()
    for name in ("item", "tags"):
        assert merged_vocabularies[name].values.equals(vocabularies[name].values)


@settings(max_examples=40, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=20))
def test_counts_add_up(rows) -> None:
    statistics = statistics_of(rows)
    assert statistics.num_rows == len(rows)
    assert statistics.num_positives == sum(r["y"] for r in rows)
    for field in statistics.fields.values():
        missing = 0 if field.name == "history" else field.num_missing
        assert field.counts[0] == missing
        assert field.counts[1] == field.num_out_of_vocabulary
        assert field.counts.sum() == field.num_values + missing
        assert len(field.counts) == field.num_ids == statistics.table_rows(field.table)
        assert 0 <= field.entropy <= math.log(max(field.num_ids - 2, 1)) + 1e-9
        assert np.isfinite(statistics.log_prior(field.name)).all()


def test_the_vocabulary_counts_targets_and_histories_together() -> None:
    rows = [
        row(item=1, history=[7, 8]),
        row(item=1, history=[7]),
        row(item=2),
        row(item=3, history=[9, 9, 3]),
    ]
    statistics, vocabularies = summarise([count([table_of(rows)])])
    # The first 9 lies outside the two kept positions of the last history.
    assert vocabularies["item"].values.to_pylist() == [1, 3, 7, 2, 8, 9]
    assert statistics.fields["item"].num_ids == 2 + 3  # 7 was never a target, 2 is rarer than min_count
    assert statistics.fields["item"].counts.tolist() == [0, 1, 2, 1, 0]
    assert statistics.fields["history"].counts.tolist() == [0, 2, 0, 1, 2]
    assert statistics.fields["item"].cardinality == 3
    assert vocabularies["item"].rows_of(vocabularies["item"].positions(pa.array([2, 7, 4]))).tolist() == [
        1,
        0,
        0,
    ]


def test_priors_and_rates_are_logs_of_shares() -> None:
    rows = [row(item=1, history=[2, 2]), row(item=1, history=[2]), row(item=2), row()]
    statistics = statistics_of(rows)
    assert np.exp(statistics.log_prior("item")) == pytest.approx([0.5 / 3, 0.5 / 3, 1 / 3, 2 / 3])
    assert np.exp(statistics.log_prior("history")) == pytest.approx([0.5 / 3, 0.5 / 3, 1, 0.5 / 3])
    assert np.exp(statistics.log_rate("item")) == pytest.approx([1 / 4, 0.5 / 4, 4 / 4, 2 / 4])
    assert statistics.log_prior("item").dtype == statistics.log_rate("item").dtype == np.float32


def test_rates_under_dropout_move_lookups_to_the_out_of_vocabulary_row() -> None:
    rows = [row(item=1, history=[2, 2]), row(item=1, history=[2]), row(item=2), row()]
    rates = np.exp(statistics_of(rows).log_rate("item", oov_dropout=4.0))
    # The ids were looked up 4 and 2 times, of which 4 * 4/8 and 2 * 4/6 go; 2 * 2/6 stay of the second.
    assert rates == pytest.approx([1 / 4, (2 + 4 / 3) / 4, 2 / 4, (2 / 3) / 4])
    assert np.exp(statistics_of(rows).log_rate("item", 1e6)[2:]) == pytest.approx([0.5 / 4] * 2)


def test_entropy_is_that_of_the_ids() -> None:
    rows = [row(item=item) for item in (1, 1, 2, 2, 9)]
    assert statistics_of(rows).fields["item"].entropy == pytest.approx(math.log(2))


def test_entropy_under_dropout_is_that_of_the_values_that_keep_their_id() -> None:
    statistics = statistics_of([row(item=item) for item in (1, 1, 1, 1, 2, 2, 3, 3)])
    # The ids were seen 4, 2 and 2 times, of which n^2 / (4 + n) stay: 2, 2/3 and 2/3.
    expected = -(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2))
    assert statistics.entropy("item", oov_dropout=4.0) == pytest.approx(expected)
    # Nearly all are dropped: n^2 of each stay, 16, 4 and 4 of 24.
    limit = -(2 / 3 * math.log(2 / 3) + 2 / 6 * math.log(1 / 6))
    assert statistics.entropy("item", oov_dropout=1e9) == pytest.approx(limit)
    assert statistics.entropy("item") == statistics.fields["item"].entropy


def test_saved_statistics_load_memory_mapped_and_equal(tmp_path) -> None:
    statistics = statistics_of([row(item=1, price=2.0), row(item=1, price=3.0)])
    statistics.save(tmp_path)
    loaded = Statistics.load(tmp_path)
    assert loaded.fingerprint == statistics.fingerprint
    assert isinstance(loaded.fields["item"].counts, np.memmap)
    assert loaded.fields["price"].bucket_edges.tolist() == [3.0]
    assert loaded.log_rate("item").tolist() == statistics.log_rate("item").tolist()
    with pytest.raises(DataError, match="run prepare first"):
        Statistics.load(tmp_path / "elsewhere")


def test_other_data_have_another_fingerprint() -> None:
    fingerprints = {statistics_of([row(item=i), row(item=i), row(item=3)]).fingerprint for i in (1, 2)}
    assert len(fingerprints) == 2


def test_columns_of_two_types_name_both_places() -> None:
    accumulator = count([table_of([row(item=1)])])
    strings = table_of([row()]).set_column(1, "item", pa.array(["1"]))
    with pytest.raises(DataError, match=r"there: column 'item' .* string values, but here holds integer"):
        accumulator.add(strings, 1, "there")
    history = table_of([row()]).set_column(5, "history", pa.array([["1"]]))
    mixed = count([table_of([row(item=1)]), history])
    with pytest.raises(DataError, match="share table 'item' hold values of different types"):
        summarise([mixed])


def test_too_many_distinct_values_suggest_hashing(monkeypatch) -> None:
    monkeypatch.setattr(accumulators, "MAX_DISTINCT", 10)
    accumulator = count([table_of([row(item=i) for i in range(11)])])
    with pytest.raises(DataError, match=r"'item' has more than 10 distinct values .* `vocabulary: hash`"):
        summarise([accumulator])


def histogram(numbers: list[float]) -> Histogram:
    counted = Histogram()
    counted.add(pa.array(numbers, pa.float64()))
    return counted


def test_infinities_stay_the_outermost_cells_of_a_coarse_histogram(monkeypatch) -> None:
    monkeypatch.setattr(accumulators, "MAX_CELLS", 64)
    starts = histogram([float("inf"), *range(100), float("-inf")]).starts.tolist()
    assert len(starts) <= 64
    assert (starts[0], starts[-1]) == (float("-inf"), float("inf"))
    assert starts == sorted(starts)


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=60), st.integers(0, 60), st.integers(2, 8))
def test_histograms_of_too_many_numbers_merge_exactly_and_have_exact_buckets(
    numbers, cut, num_buckets
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accumulators, "MAX_CELLS", 8)
        whole = histogram(numbers)
        merged = histogram(numbers[cut:] or numbers[:1])
        if numbers[cut:]:
            merged.merge(histogram(numbers[:cut] or numbers[:0]))
        else:
            merged = whole
    assert len(whole.starts) <= 8
    assert merged.starts.tolist() == whole.starts.tolist()
    assert merged.counts.tolist() == whole.counts.tolist()
    edges = whole.edges(num_buckets)
    assert len(edges) < num_buckets
    assert (np.diff(edges) > 0).all()
    of_cells = np.bincount(
        np.searchsorted(edges, whole.starts, side="right"), whole.counts, minlength=len(edges) + 1
    )
    of_numbers = np.bincount(np.searchsorted(edges, numbers, side="right"), minlength=len(edges) + 1)
    assert of_cells.tolist() == of_numbers.tolist()


def test_a_fine_histogram_takes_the_coarser_cells_of_another(monkeypatch) -> None:
    monkeypatch.setattr(accumulators, "MAX_CELLS", 8)
    few, many = [1 + 1 / 4096], [1 + i / 1024 for i in range(9)]
    merged = histogram(few)
    merged.merge(histogram(many))
    assert merged.starts.tolist() == histogram(few + many).starts.tolist()


def test_buckets_of_continuous_numbers_are_even() -> None:
    numbers = np.random.default_rng(0).lognormal(size=200_000)
    edges = histogram(numbers).edges(32)
    counts = np.bincount(np.searchsorted(edges, numbers, side="right"))
    assert len(edges) == 31
    assert counts.max() / counts.min() < 1.05


def test_few_numbers_have_a_bucket_each() -> None:
    assert histogram([0.0] * 90 + [1.0, 5.0, 2.0]).edges(4).tolist() == [1.0, 2.0, 5.0]


def test_cardinality_sketches_are_exact_when_small_and_close_when_large() -> None:
    small, left, right = DistinctSketch(), DistinctSketch(), DistinctSketch()
    small.add(mix64(np.repeat(np.arange(1000), 3), 0))
    assert small.estimate == 1000
    left.add(mix64(np.arange(300_000), 0))
    right.add(mix64(np.arange(200_000, 500_000), 0))
    left.add(right.hashes)
    assert left.estimate == pytest.approx(500_000, rel=0.02)


def test_vocabulary_lookup_survives_equal_hashes(monkeypatch) -> None:
    counts = {"a": pa.table({"value": pa.array(["x", "y"], pa.large_string()), "count": [2, 1]})}
    vocabulary = ExactVocabulary.build(counts, "a", 1)
    monkeypatch.setattr(
        "hetegen_rec.data.vocabulary.hash_strings",
        lambda values, salt: np.full(len(values), vocabulary._sorted_keys[0]),
    )
    strangers = pa.array(["p", "q"], pa.large_string())
    assert vocabulary.lookup(strangers).tolist() == [1, 1]


def test_priors_under_dropout_are_shares_of_the_values_that_keep_their_id():
    counts = np.array([3, 5, 8, 2], np.int64)
    field = FieldStatistics("item", 10, 3, 5, 4, 4, 0.5, counts)
    statistics = Statistics(18, 9, {"item": field})
    kept = np.array([8 * 8 / 10, 2 * 2 / 4])
    np.testing.assert_allclose(np.exp(statistics.log_prior("item", 2.0)[2:]), kept / kept.sum(), rtol=1e-6)


def test_kept_ids_stay_and_new_ones_follow_by_frequency() -> None:
    older = summarise([count([table_of([row(item=i, tags=["a"]) for i in (7, 7, 5, 5, 5, 9)])])])
    assert older[1]["item"].values.to_pylist() == [5, 7, 9]  # 9 is rarer than min_count
    rows = [row(item=i, tags=["b"]) for i in (1, 9, 9, 9, 4, 4, 7)]
    statistics, vocabularies = summarise([count([table_of(rows)])], older=older)
    assert vocabularies["item"].lookup(pa.array([5, 7, 9, 4, 1])).tolist() == [2, 3, 4, 5, 1]
    assert statistics.fields["item"].counts.tolist() == [0, 1, 0, 1, 3, 2]
    assert vocabularies["tags"].values.to_pylist() == ["a", "b"]


@settings(max_examples=40, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=20), st.lists(ROW, min_size=1, max_size=20), st.integers(0, 20))
def test_data_with_kept_ids_count_the_new_rows_only_and_do_so_on_any_number_of_ranks(
    older_rows, rows, cut
) -> None:
    older = summarise([count([table_of(older_rows)])])
    statistics, vocabularies = summarise([count([table_of(rows)])], older=older)
    parts = [count([table_of(rows[:cut])]), count([table_of(rows[cut:])])]
    assert summarise(parts, older=older)[0].fingerprint == statistics.fingerprint
    for name, field in statistics.fields.items():
        missing = 0 if name == "history" else field.num_missing
        assert field.counts.sum() == field.num_values + missing
        for dropout in (0.0, 5.0):
            assert np.isfinite(statistics.log_prior(name, dropout)).all()
            assert np.isfinite(statistics.log_rate(field.table, dropout)).all()
    for table, old in older[0].table_identities.items():
        new = statistics.table_identities[table]
        assert new == old or new.grown_from(old)
        if table in ("item", "tags"):
            num_old = older[1][table].num_kept
            kept = older[1][table].values.slice(0, num_old)
            assert vocabularies[table].lookup(kept).tolist() == list(range(2, 2 + num_old))
    edges = [of.fields["price"].bucket_edges.tolist() for of in (statistics, older[0])]
    assert edges[0] == edges[1]


def test_identities_tell_which_ids_mean_the_same() -> None:
    def identity(items: list[int], older: tuple[Statistics, dict] | None = None) -> tuple:
        found = summarise([count([table_of([row(item=i) for i in items * 2])])], older=older)
        return found, found[0].table_identities["item"]

    first, of_first = identity([1, 1, 2])
    second, of_second = identity([3], older=first)
    _, of_third = identity([4, 3], older=second)
    assert of_third.grown_from(of_second)
    assert of_third.grown_from(of_first)
    assert not of_first.grown_from(of_third)
    assert not of_third.grown_from(of_third)
    assert identity([2, 2, 1])[1] != of_first  # the same values in another order
    assert identity([1, 1, 1, 2])[1] == of_first  # other counts, the same ids
    assert identity([2], older=first)[1] == of_first
    assert not identity([1, 1, 1, 2, 2, 3])[1].grown_from(of_second)
    assert TableIdentity.from_json(json.loads(json.dumps(of_third.as_json()))) == of_third
    assert TableIdentity.from_json(of_third.as_json()).grown_from(of_first)


def test_kept_ids_of_another_type_name_field_and_directory() -> None:
    older = summarise([count([table_of([row(item=1)])])])
    strings = table_of([row()]).set_column(1, "item", pa.array(["1"]))
    with pytest.raises(DataError, match=r"'item' holds string values.*keep_ids_of: older.* integer values"):
        summarise([count([strings])], older=older)


def test_a_field_without_values_keeps_the_type_of_its_older_ones() -> None:
    older = summarise([count([table_of([row(item=1), row(item=1)])])])
    statistics, vocabularies = summarise([count([table_of([row()])])], older=older)
    assert statistics.fields["item"].value_type == "integer"
    assert vocabularies["item"].lookup(pa.array([1])).tolist() == [2]
