"""Paths that drop unfamiliar cells: nothing where all is familiar, weighted by confidence where not."""

import numpy as np
import pytest
import torch
from helpers import part_of, plain, rows_of, score
from small_log import SCHEMA, TOKENS, Log, column, make_model

from hetegen_rec.config.inference import FeaturePathsConfig
from hetegen_rec.data.sketch import CombinationCounts
from hetegen_rec.inference.feature_paths import FeaturePaths

LOG = Log(64)
MODEL = make_model(LOG, "joint", std=0.5)
NAMES = SCHEMA.field_names
NEW = 30
"""An id of table `item` that none of the familiar rows holds."""


def counts_of(ids, order=2):
    counts = CombinationCounts(SCHEMA, len(ids), order=order, most_sets=100, memory_bytes=1 << 20, depth=2)
    counts.add(ids.numpy())
    return counts


def strategy(paths=3, seed=0, ids=None, order=2, **config):
    counts = counts_of(LOG.batch().ids if ids is None else ids, order)
    settings = FeaturePathsConfig(paths=paths, **config)
    return FeaturePaths(MODEL.network, counts, MODEL.network.mask_tokens.detach(), SCHEMA, settings, seed)


def familiar_rows():
    """A few rows, and the ids of a log in which they came thirty times."""
    rows = part_of(rows_of(MODEL, LOG.batch()), list(range(5)))
    return rows, rows.batch.ids.repeat(30, 1)


def test_without_paths_it_is_plain_to_the_last_bit():
    rows = rows_of(MODEL, LOG.batch())
    scored = score(strategy(paths=0), rows)
    assert torch.equal(scored.probabilities, plain(MODEL, rows))
    assert set(scored.passes.tolist()) == {1.0}


def test_familiar_rows_cost_one_pass_and_are_scored_as_they_are():
    rows, ids = familiar_rows()
    scored = score(strategy(ids=ids), rows)
    torch.testing.assert_close(scored.probabilities, plain(MODEL, rows), atol=1e-6, rtol=0)
    assert set(scored.passes.tolist()) == {1.0}


def test_a_new_value_is_dropped_on_every_path_that_is_weighted_by_what_it_keeps():
    rows, ids = familiar_rows()
    item = column("item")
    rows.batch.ids[2, item] = NEW
    made = strategy(ids=ids, paths=3, order=1)
    scored = score(made, rows)
    masked = part_of(rows, [2])
    masked.tokens[0, item] = MODEL.network.mask_tokens[item]
    confidence = 1.0 - 1.0 / len(NAMES)  # of the full path: one field of all was never seen
    full, dropped = plain(MODEL, rows)[2], plain(MODEL, masked)[0]
    expected = (confidence * full + 3 * dropped) / (confidence + 3)
    assert (full - dropped).abs() > 1e-3
    torch.testing.assert_close(scored.probabilities[2], expected, atol=1e-5, rtol=0)
    assert scored.passes.tolist() == [1.0, 1.0, 4.0, 1.0, 1.0]


def test_a_row_of_which_nothing_was_ever_seen_keeps_its_score():
    rows, ids = familiar_rows()
    scored = score(strategy(ids=ids + 50), rows)
    torch.testing.assert_close(scored.probabilities, plain(MODEL, rows), atol=1e-6, rtol=0)


def test_a_dropped_sequence_goes_as_a_whole(monkeypatch):
    rows, ids = familiar_rows()
    (row,) = (rows.batch.ids[:, column("history:1")] >= 0).nonzero()[:1, 0].tolist()
    span = [place for place, token in enumerate(SCHEMA.tokens) if token.field == "history"]
    rows.batch.ids[row, span[0]] = NEW
    seen = []
    original = MODEL.network.score
    monkeypatch.setattr(MODEL.network, "score", lambda t, p: seen.append((t, p)) or original(t, p))
    score(strategy(ids=ids, paths=1, order=1), rows)
    (tokens, present) = seen[1]
    there = present[0, span]
    assert there.sum() > 1
    assert torch.equal(tokens[0, span][there], MODEL.network.mask_tokens[span][there])
    absent = [place for place in span if not present[0, place]]
    assert not tokens[0, absent].any()


def columns_of(made, *names):
    """Confidences [B] of one combination of fields over twenty rows: see `pairs`."""
    fields = tuple(NAMES.index(name) for name in names)
    confidence = made.confidence(part_of(pairs(), list(range(20))))
    return confidence[:, made.counts.sets.index(fields)].tolist()


def pairs():
    """Twenty rows: users that come once, an hour that comes four times and one sixteen times."""
    batch = LOG.batch(0, 20)
    batch.ids[:] = 0
    batch.ids[:, column("user")] = torch.arange(20)
    batch.ids[:4, column("hour")] = 1
    return rows_of(MODEL, batch)


def test_confidence_of_a_value_is_its_count_against_what_is_enough():
    made = strategy(ids=pairs().batch.ids, order=1, reliable_count=10)
    assert columns_of(made, "user") == pytest.approx([0.1] * 20)
    assert columns_of(made, "hour") == pytest.approx([0.4] * 4 + [1.0] * 16)


def test_confidence_of_a_pair_is_its_count_against_what_its_values_let_expect():
    ids = pairs().batch.ids
    made = strategy(ids=ids, order=2, reliable_count=10)
    # Seen once, expected 1 x 4 / 20 and 1 x 16 / 20 times, and backed by the user's 0.1.
    assert columns_of(made, "user", "hour") == pytest.approx([1.1 / 1.2] * 4 + [1.1 / 1.8] * 16)
    # Seen as often as expected.
    assert columns_of(made, "item", "hour") == pytest.approx([(4 + 0.4) / (4 + 1)] * 4 + [1.0] * 16)


def test_an_unseen_pair_of_familiar_values_counts_less_the_more_it_was_to_be_expected():
    ids = torch.zeros(400, len(TOKENS), dtype=torch.int64)
    ids[:200, column("hour")] = 1
    ids[200:, column("place")] = 1  # never in an hour of 1
    ids[:20, column("item")] = 1
    made = strategy(ids=ids, order=2, reliable_count=10)
    batch = LOG.batch(0, 1)
    batch.ids[:] = 0
    batch.ids[0, [column("hour"), column("place"), column("item")]] = 1
    (confidence,) = made.confidence(rows_of(MODEL, batch)).tolist()
    names = [tuple(NAMES[field] for field in fields) for fields in made.counts.sets]
    found = dict(zip(names, confidence, strict=True))
    assert found["hour", "place"] == pytest.approx(1 / 11)
    assert found["item", "place"] == pytest.approx(1 / 11)
    assert found["user", "hour"] == 1.0


def test_every_order_has_the_same_say_on_a_field():
    shares = strategy(order=3)._shares
    torch.testing.assert_close(shares.sum(0), torch.ones(len(NAMES), dtype=torch.float64))
    torch.testing.assert_close(shares[: len(NAMES)], torch.eye(len(NAMES), dtype=torch.float64) / 3)


def test_the_seed_decides():
    rows = rows_of(MODEL, LOG.batch())
    one, again, other = (
        score(strategy(seed=seed, reliable_count=50, order=3), rows).probabilities for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_score_does_not_depend_on_who_shares_the_batch():
    rows = rows_of(MODEL, LOG.batch())
    made = strategy(order=3)
    whole = score(made, rows)
    index = np.random.default_rng(0).permutation(64)[:7].tolist()
    some = score(made, part_of(rows, index))
    torch.testing.assert_close(some.probabilities, whole.probabilities[index], atol=1e-6, rtol=0)
    assert torch.equal(some.passes, whole.passes[index])
    assert whole.passes.unique().numel() > 1
