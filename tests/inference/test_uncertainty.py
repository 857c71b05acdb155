"""Rare ids are trusted less, uncertain rows get paths, and the others cost one pass."""

import math

import numpy as np
import pytest
import torch
from helpers import part_of, plain, rows_of, score
from small_log import Log, make_model

from hetegen_rec.config.inference import UncertaintyConfig
from hetegen_rec.inference.uncertainty import Uncertainty, consistent_mean, threshold_of

LOG = Log(64)
MODEL = make_model(LOG, "joint", std=0.5)
ROWS = rows_of(MODEL, LOG.batch())
PLAIN = plain(MODEL, ROWS)


def strategy(threshold=math.inf, seed=0, **config):
    settings = UncertaintyConfig(**{"paths": 4, **config})
    masks = MODEL.network.mask_tokens.detach()
    return Uncertainty(MODEL.network, LOG.statistics, masks, settings, seed, threshold)


def uncertainty():
    with torch.no_grad():
        return strategy(filter=False).first_pass(ROWS).uncertainty


def middle():
    """A threshold with half of the rows above it."""
    return float(uncertainty().median())


def test_without_filter_and_uncertain_rows_it_is_plain_to_the_last_bit():
    scored = score(strategy(filter=False), ROWS)
    assert torch.equal(scored.probabilities, PLAIN)
    assert set(scored.passes.tolist()) == {1.0}


def test_only_uncertain_rows_change_and_pay():
    scored = score(strategy(middle(), filter=False), ROWS)
    uncertain = uncertainty() > middle()
    assert 0 < uncertain.sum() < len(uncertain)
    assert torch.equal(scored.probabilities[~uncertain], PLAIN[~uncertain])
    assert (scored.probabilities[uncertain] != PLAIN[uncertain]).all()
    assert torch.equal(scored.passes, torch.where(uncertain, 5.0, 1.0))


def test_the_ensemble_takes_over_without_a_jump():
    """Just below a row's own uncertainty it counts for next to nothing, and a tenth below wholly."""
    row = int(uncertainty().argmax())
    own = float(uncertainty()[row])
    near, far, farther = (
        score(strategy(own * factor, filter=False), ROWS).probabilities[row] for factor in (0.9999, 0.9, 0.5)
    )
    assert (near - PLAIN[row]).abs() < 2e-3 * (far - PLAIN[row]).abs()
    torch.testing.assert_close(far, farther, atol=1e-6, rtol=0)


def test_the_filter_shrinks_unreliable_tokens_towards_what_stands_for_a_dropped_one(monkeypatch):
    seen = []
    original = MODEL.network.score
    monkeypatch.setattr(MODEL.network, "score", lambda t, p: seen.append(t) or original(t, p))
    score(strategy(reliable_count=3), ROWS)
    counts = (ROWS.batch.log_rate.exp() * LOG.statistics.num_rows).clamp(max=3.0)
    weight = torch.where(ROWS.present, counts / 3.0, 1.0)[..., None]
    expected = weight * ROWS.tokens + (1 - weight) * MODEL.network.mask_tokens
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=0)
    reliable = weight[..., 0] > 0.999
    assert 0 < reliable.sum() < reliable.numel()
    assert torch.equal(seen[0][reliable], ROWS.tokens[reliable])


def test_uncertainty_grows_with_rare_tokens_and_with_scores_near_the_click_rate():
    made = strategy(filter=False, reliable_count=3)
    with torch.no_grad():
        first = made.first_pass(ROWS)
    rarity = (1 - first.reliability).sum(1) / ROWS.present.sum(1)
    rate = (LOG.statistics.num_positives + 0.5) / (LOG.statistics.num_rows + 1)
    base = math.log(rate / (1 - rate))
    expected = (1 - (torch.tanh((first.logits - base) / 2)).abs()) * rarity.float()
    torch.testing.assert_close(first.uncertainty, expected, atol=1e-6, rtol=1e-5)


def test_rows_of_reliable_tokens_are_never_uncertain():
    scored = score(strategy(0.0, reliable_count=1, filter=False), ROWS)
    reliable = (ROWS.batch.log_rate.exp() * LOG.statistics.num_rows > 0.9).logical_or(~ROWS.present).all(1)
    assert reliable.sum() > 0
    assert set(scored.passes[reliable].tolist()) == {1.0}
    assert torch.equal(scored.probabilities[reliable], PLAIN[reliable])


@pytest.mark.parametrize(
    ("budget", "paths", "uncertain"), [(1.0, 4, 0), (2.8, 6, 30), (2.0, 10, 10), (1.05, 10, 0), (9.0, 4, 100)]
)
def test_the_threshold_keeps_the_budget(budget, paths, uncertain):
    values = np.random.default_rng(0).permutation(np.linspace(0.01, 0.9, 100))
    threshold = threshold_of(values, UncertaintyConfig(budget=budget, paths=paths))
    assert (values > threshold).sum() == uncertain
    assert 1 + paths * uncertain / 100 <= max(budget, 1 + paths * (uncertain == 100))


def test_equal_rows_do_not_break_the_budget():
    values = np.array([0.9] * 10 + [0.5] * 90)
    threshold = threshold_of(values, UncertaintyConfig(budget=2.0, paths=2))
    assert (values > threshold).mean() * 2 + 1 <= 2.0


def test_paths_that_agree_give_their_score_and_an_outlier_counts_less():
    agreeing = torch.full((5, 1), 0.7)
    torch.testing.assert_close(consistent_mean(agreeing), agreeing[0].sigmoid())
    mixed = torch.tensor([[0.7], [0.7], [0.7], [0.7], [-5.0]])
    assert mixed.sigmoid().mean() < consistent_mean(mixed)[0] < agreeing[0].sigmoid()


def test_the_seed_decides():
    one, again, other = (score(strategy(middle(), seed=seed), ROWS).probabilities for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_score_does_not_depend_on_who_shares_the_batch():
    made = strategy(middle())
    whole = score(made, ROWS)
    index = np.random.default_rng(0).permutation(64)[:7].tolist()
    some = score(made, part_of(ROWS, index))
    torch.testing.assert_close(some.probabilities, whole.probabilities[index], atol=1e-6, rtol=0)
    assert torch.equal(some.passes, whole.passes[index])
