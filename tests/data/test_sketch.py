"""Counts of combinations: never too low, additive, bounded, exact where there is room, found to be stale."""

from collections import Counter
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.sketch import CombinationCounts, choose_sets

SCHEMA = Schema.model_validate(
    {
        "label": "click",
        "fields": [
            {"name": "user", "kind": "id"},
            {"name": "history", "kind": "sequence", "table": "item", "max_length": 2},
            {"name": "item", "kind": "id"},
            {"name": "hour", "kind": "categorical"},
        ],
    }
)
FIRST_TOKENS = [0, 1, 3, 4]
ROOM = 1 << 22


def rows(num_rows: int, num_values: int = 20, seed: int = 0) -> NDArray[np.int64]:
    """Ids [B, T] with heavy repetition; -1 where there is no item in the history."""
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.zipf(1.5, (num_rows, 5)), num_values).astype(np.int64)
    ids[:, 1:3][rng.random((num_rows, 2)) < 0.2] = -1
    return ids


def counts_of(num_rows: int, memory: int = ROOM, depth: int = 3, order: int = 3) -> CombinationCounts:
    return CombinationCounts(SCHEMA, num_rows, order=order, most_sets=100, memory_bytes=memory, depth=depth)


def true_counts(ids: NDArray[np.int64], sets: list[tuple[int, ...]]) -> NDArray[np.int64]:
    """[B, C]: how often each row's combinations stand in the rows themselves."""
    columns = []
    for fields in sets:
        values = [tuple(row) for row in ids[:, [FIRST_TOKENS[field] for field in fields]].tolist()]
        seen = Counter(values)
        columns.append([seen[value] for value in values])
    return np.array(columns).T


@given(seed=st.integers(0, 1000), width=st.integers(1, 64), depth=st.integers(1, 4))
def test_estimates_are_never_too_low(seed, width, depth):
    ids = rows(200, seed=seed)
    counts = counts_of(200, memory=4 * 14 * depth * width, depth=depth)
    counts.add(ids)
    assert counts.counters.shape == (14, depth, width)
    assert (counts.estimate(ids) >= true_counts(ids, counts.sets)).all()


def test_with_room_every_order_is_exact_and_unseen_is_zero():
    ids = rows(500)
    counts = counts_of(500)
    counts.add(ids)
    np.testing.assert_array_equal(counts.estimate(ids), true_counts(ids, counts.sets))
    unseen = np.full((1, 5), 99)
    assert not counts.estimate(unseen).any()


def test_shares_add_up_to_one_pass():
    ids = rows(3000)
    whole, one, other = counts_of(3000, memory=1 << 16), counts_of(3000, 1 << 16), counts_of(3000, 1 << 16)
    whole.add(ids)
    one.add(ids[:1234])
    other.add(ids[1234:])
    np.testing.assert_array_equal(one.counters + other.counters, whole.counters)


@pytest.mark.parametrize("memory", [1 << 14, 1 << 20])
def test_memory_is_bounded(memory):
    assert counts_of(10**6, memory=memory).counters.nbytes <= memory


def test_no_counter_is_kept_for_rows_that_there_are_not():
    assert counts_of(10).counters.shape == (14, 3, 80)


def test_too_little_memory_is_refused():
    with pytest.raises(ConfigError, match="feature_paths"):
        counts_of(10, memory=4)


def test_more_rows_than_a_counter_holds_are_refused():
    with pytest.raises(DataError, match="4,294,967,296 training rows"):
        counts_of(1 << 32)


@pytest.mark.parametrize(("num_fields", "order", "most"), [(1, 1, 1), (4, 2, 6), (5, 3, 10), (12, 3, 220)])
def test_all_sets_are_taken_where_they_fit(num_fields, order, most):
    expected = list(combinations(range(num_fields), order))
    assert choose_sets(num_fields, order, most) == expected
    assert len(expected) == comb(num_fields, order) <= most


@pytest.mark.parametrize(("num_fields", "order", "most"), [(12, 2, 40), (39, 3, 256), (39, 2, 10), (7, 1, 3)])
def test_a_choice_of_sets_treats_all_fields_alike(num_fields, order, most):
    sets = choose_sets(num_fields, order, most)
    assert len(set(sets)) == len(sets) <= max(most, num_fields)
    assert len(sets) > max(most, num_fields) - num_fields
    uses = Counter(field for fields in sets for field in fields)
    assert len(uses) == num_fields
    assert len(set(uses.values())) == 1


def stored(path: Path) -> CombinationCounts:
    counts = counts_of(100)
    counts.add(rows(100))
    counts.save(path, "rows of today")
    return counts


def test_what_is_stored_is_taken_over(tmp_path):
    counts = stored(tmp_path / "sketch.npz")
    again = counts_of(100)
    assert again.load(tmp_path / "sketch.npz", "rows of today")
    np.testing.assert_array_equal(again.counters, counts.counters)
    assert [path.name for path in tmp_path.iterdir()] == ["sketch.npz"]


@pytest.mark.parametrize(
    ("fingerprint", "wanted"),
    [
        ("rows of tomorrow", {}),
        ("rows of today", {"order": 2}),
        ("rows of today", {"depth": 2}),
        ("rows of today", {"memory": 1 << 10}),
    ],
)
def test_what_is_stale_is_not(fingerprint, wanted, tmp_path):
    stored(tmp_path / "sketch.npz")
    counts = counts_of(100, **wanted)
    assert not counts.load(tmp_path / "sketch.npz", fingerprint)
    assert not counts.counters.any()


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "empty"])
def test_what_is_damaged_is_not(damage, tmp_path):
    path = tmp_path / "sketch.npz"
    stored(path)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:-100], "empty": b""}.get(damage, content))
    if damage == "gone":
        path.unlink()
    counts = counts_of(100)
    assert not counts.load(path, "rows of today")
    assert not counts.counters.any()
