import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetegen_rec.data.sources import SourceError, synthetic
from hetegen_rec.data.sources.synthetic import CHUNK_ROWS, Process


@pytest.fixture(scope="module")
def log():
    process = Process(rows=3 * CHUNK_ROWS, id_cardinality=2_000, seed=0)
    return pa.concat_tables([process.chunk(index) for index in range(3)])


def column(log, name):
    return log[name].to_numpy()


def auc(labels, scores):
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores)] = np.arange(1, len(scores) + 1)
    positives = labels.sum()
    pairs = positives * (len(labels) - positives)
    return (ranks[labels == 1].sum() - positives * (positives + 1) / 2) / pairs


def information(left, right):
    """Mutual information in nats of two integer arrays, by counting."""
    joint = np.zeros((left.max() + 1, right.max() + 1))
    np.add.at(joint, (left, right), 1 / len(left))
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return (joint[seen] * np.log(joint[seen] / independent[seen])).sum()


def codes(log, name):
    return np.unique(column(log, name), return_inverse=True)[1]


def read(directory, split):
    return pq.read_table(directory / split)


def test_shards_hold_the_log_in_order_of_time_with_an_80_10_10_split(tmp_path):
    process = Process(rows=2 * CHUNK_ROWS + 1_000, id_cardinality=50, seed=3)
    synthetic.write(process, tmp_path)
    splits = {split: read(tmp_path, split) for split in ("train", "valid", "test")}
    expected = pa.concat_tables([process.chunk(index) for index in range(3)])
    assert pa.concat_tables(splits.values()).equals(expected)
    assert splits["train"].num_rows == process.rows * 8 // 10
    assert len(list((tmp_path / "train").iterdir())) == 4
    assert (np.diff(column(expected, "timestamp")) > 0).all()


def test_row_groups_are_no_longer_than_a_chunk(tmp_path):
    synthetic.write(Process(rows=5 * CHUNK_ROWS, id_cardinality=50, seed=0), tmp_path)
    for shard in tmp_path.glob("*/*.parquet"):
        metadata = pq.read_metadata(shard)
        groups = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        assert 0 < min(groups) <= max(groups) <= CHUNK_ROWS


@settings(deadline=None, max_examples=10)
@given(
    rows=st.integers(10, 2 * CHUNK_ROWS),
    cardinality=st.integers(1, 10**12),
    seed=st.integers(0, 2**70),
)
def test_any_process_makes_valid_rows_and_a_longer_log_begins_with_the_shorter(rows, cardinality, seed):
    short = Process(rows, cardinality, seed).chunk(0)
    longer = Process(rows + 1_000, cardinality, seed).chunk(0)
    short.validate(full=True)
    assert short.num_rows == min(rows, CHUNK_ROWS)
    assert longer.slice(0, short.num_rows).equals(short)
    history = short["history"].combine_chunks().flatten().to_numpy()
    for ids in (column(short, "user_id"), column(short, "item_id"), history):
        assert ((ids >= 0) & (ids < cardinality)).all()


def test_seeds_and_chunks_differ():
    process = Process(rows=2 * CHUNK_ROWS, id_cardinality=1_000, seed=0)
    other = Process(rows=2 * CHUNK_ROWS, id_cardinality=1_000, seed=1)
    for another in (process.chunk(1), other.chunk(0)):
        assert not another["random_number"].equals(process.chunk(0)["random_number"])
    item, user = column(process.chunk(0), "item_id"), column(process.chunk(0), "user_id")
    assert (process.integer(0, user, 16) != other.integer(0, user, 16)).mean() > 0.5
    assert not np.array_equal(process.normal(8, item), other.normal(8, item))


def test_labels_follow_the_true_probability(log):
    labels, probability = column(log, "label"), column(log, "true_probability")
    for low, high in [(0.0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1.0)]:
        part = (probability >= low) & (probability < high)
        deviation = labels[part].mean() - probability[part].mean()
        assert abs(deviation) < 4 * np.sqrt(0.25 / part.sum())
    assert 0.8 < auc(labels, probability) < 0.92
    assert 0.1 < labels.mean() < 0.3


def test_true_probability_follows_the_documented_formula(log):
    process = Process(rows=3 * CHUNK_ROWS, id_cardinality=2_000, seed=0)
    user, item = column(log, "user_id"), column(log, "item_id")
    taste, cluster = process.integer(0, user, 16), item % 16
    fits = column(log, "intent") // 4 == cluster
    known = -3.2 + 1.2 * (cluster == taste) + 2.2 * fits + 0.6 * process.normal(3, user)
    probability = column(log, "true_probability")
    appeal = (np.log(probability / (1 - probability)) - known) / 0.8
    # What remains is the appeal: 0.8 of the item plus 0.6 of the moment, and half of the price.
    moment = (appeal - 0.8 * process.normal(8, item)) / 0.6
    assert abs(moment.mean()) < 0.03
    assert abs(moment.std() - 1) < 0.03
    price = np.log(column(log, "price"))
    known_price = ~np.isnan(price)
    noise = (price - 2 - 0.6 * appeal)[known_price]
    assert abs(noise.std() - 0.4) < 0.02


def test_ids_are_zipf(log):
    counts = np.bincount(column(log, "user_id"), minlength=2_000)
    shares = counts / counts.sum()
    expected = np.diff(np.log(np.arange(1, 2_002))) / np.log(2_001)
    np.testing.assert_allclose(shares[:5], expected[:5], rtol=0.1)
    assert abs(shares[1_000:].sum() - expected[1_000:].sum()) < 0.01


def test_easy_field_is_a_function_of_another_field(log):
    pairs = {
        (row["category"], row["department"]) for row in log.select(["category", "department"]).to_pylist()
    }
    assert synthetic.EASY_FIELDS == ("department",)
    assert len(pairs) == len({category for category, _ in pairs})


def test_hard_field_is_partly_predictable_and_decides_clicks(log):
    assert synthetic.HARD_FIELDS == ("intent",)
    intent, segment = codes(log, "intent"), codes(log, "segment")
    entropy = np.log(synthetic.NUM_VALUES)
    assert 0.05 * entropy < information(intent, segment) < 0.5 * entropy
    fits = column(log, "intent") // 4 == column(log, "item_id") % 16
    labels = column(log, "label")
    assert labels[fits].mean() > 3 * labels[~fits].mean()


def test_noise_fields_tell_nothing(log):
    assert synthetic.NOISE_FIELDS == ("random_code", "random_number")
    random_code = codes(log, "random_code")
    quantile = np.digitize(column(log, "random_number"), [-1.0, 0.0, 1.0])
    for noise in (random_code, quantile):
        for name in ("segment", "intent", "category", "label"):
            other = codes(log, name)
            # Mean of the estimate under independence, by the chi-squared distribution, doubled.
            chance = noise.max() * other.max() / (2 * len(other))
            assert information(noise, other) < 2 * chance + 1e-4
    assert np.bincount(random_code).min() > 0.9 * len(random_code) / synthetic.NUM_RANDOM_CODES


def test_attributes_follow_users_and_items(log):
    process = Process(rows=3 * CHUNK_ROWS, id_cardinality=2_000, seed=0)
    taste = process.integer(0, column(log, "user_id"), 16)
    assert 0.88 < (codes(log, "segment") == taste).mean() < 0.93
    assert 0.93 < (column(log, "category") // 4 == column(log, "item_id") % 16).mean() < 0.97
    for owner, owned in [("user_id", "city"), ("item_id", "tags")]:
        pairs = {(row[owner], str(row[owned])) for row in log.select([owner, owned]).to_pylist()}
        assert len(pairs) == len({of for of, _ in pairs})


def test_lists_are_ragged_and_bounded(log):
    tags, history = log["tags"].to_pylist(), log["history"].to_pylist()
    assert {len(row) for row in tags} == set(range(synthetic.MAX_TAGS + 1))
    assert {len(row) for row in history} == set(range(synthetic.MAX_HISTORY + 1))
    assert all(len(set(row)) == len(row) for row in tags)


def test_history_holds_items_of_the_users_taste(log):
    process = Process(rows=3 * CHUNK_ROWS, id_cardinality=2_000, seed=0)
    taste = process.integer(0, column(log, "user_id"), 16)
    history = log["history"].combine_chunks()
    items = history.flatten().to_numpy()
    of_taste = items % 16 == np.repeat(taste, history.value_lengths().to_numpy())
    assert 0.78 < of_taste.mean() < 0.85


def test_some_prices_are_missing(log):
    assert 0.04 < log["price"].null_count / log.num_rows < 0.06


def test_too_few_rows_are_refused_by_key():
    with pytest.raises(SourceError, match=r"data\.source\.rows: 9.*10 or more"):
        Process(rows=9, id_cardinality=5, seed=0)


def test_the_smallest_log_fills_every_split(tmp_path):
    synthetic.write(Process(rows=10, id_cardinality=1, seed=0), tmp_path)
    assert [read(tmp_path, split).num_rows for split in ("train", "valid", "test")] == [8, 1, 1]
