import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetegen_rec.config.run import EvaluationConfig
from hetegen_rec.data.batching import NO_ITEM
from hetegen_rec.evaluation.slices import head_threshold, make_slices


def masks(context, threshold=10, **config):
    columns = {name: np.array(column, dtype=np.int64) for name, column in context.items()}
    return {
        part.name: part.mask.tolist() for part in make_slices(columns, EvaluationConfig(**config), threshold)
    }


def test_users_are_new_cold_or_warm_by_their_training_rows():
    found = masks({"user_rows": [0, 1, 3, 4, 900]}, cold_user_rows=3)
    assert found == {
        "new_users": [True, False, False, False, False],
        "cold_users": [False, True, True, False, False],
        "warm_users": [False, False, False, True, True],
    }


def test_a_missing_user_is_in_no_slice():
    found = masks({"user_rows": [0, 0], "user_key": [0, 5]})
    assert found["new_users"] == [False, True]


def test_items_are_head_or_tail_and_unseen_ones_belong_to_the_tail():
    found = masks({"item_rows": [0, 9, 10]})
    assert found == {
        "unseen_items": [True, False, False],
        "tail_items": [True, True, False],
        "head_items": [False, False, True],
    }
    assert set(masks({"item_rows": [0]}, threshold=None)) == {"unseen_items"}


def test_a_missing_item_is_in_no_slice():
    found = masks({"item_rows": [NO_ITEM, 0, 10]}) | masks({"item_rows": [NO_ITEM, 10]}, threshold=0)
    assert not any(mask[0] for mask in found.values())
    assert masks({"item_rows": [NO_ITEM, 0]})["unseen_items"] == [False, True]
    assert masks({"item_rows": [NO_ITEM, 0]})["tail_items"] == [False, True]


def test_no_context_no_slices():
    assert masks({"timestamp": [1, 2]}) == {}


@pytest.mark.parametrize(
    ("counts", "share", "threshold"),
    [
        ([50, 30, 15, 5], 0.8, 30),
        ([50, 30, 15, 5], 0.81, 15),
        ([7, 1, 1, 1], 0.7, 7),
        ([4, 4, 4], 0.5, 4),
        ([3, 0, 0], 1.0, 3),
        ([5, 2], 0.0, 6),
        ([0, 0], 0.8, 1),
        ([], 0.8, 1),
    ],
)
def test_the_head_is_the_fewest_items_that_cover_the_share(counts, share, threshold):
    assert head_threshold(np.array(counts, dtype=np.int64), share) == threshold


@given(st.lists(st.integers(0, 50), min_size=1), st.floats(0.01, 1.0))
def test_the_head_covers_the_share_and_would_not_without_its_smallest_count(counts, share):
    counts = np.array(counts)
    threshold = head_threshold(counts, share)
    total = counts.sum()
    assert counts[counts >= threshold].sum() >= share * total - 1e-6
    if total:
        assert counts[counts > threshold].sum() < share * total + 1e-6
