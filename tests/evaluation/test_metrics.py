import numpy as np
import plain_metrics
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetegen_rec.evaluation import metrics


def slow_auc(scores, labels):
    clicks = [s for s, y in zip(scores, labels, strict=True) if y]
    others = [s for s, y in zip(scores, labels, strict=True) if not y]
    if not clicks or not others:
        return None
    wins = sum((c > o) + 0.5 * (c == o) for c in clicks for o in others)
    return wins / len(clicks) / len(others)


def slow_gauc(scores, labels, users):
    values, sizes = [], []
    for user in sorted(set(users)):
        of_user = [i for i, other in enumerate(users) if other == user]
        value = slow_auc([scores[i] for i in of_user], [labels[i] for i in of_user])
        if value is not None:
            values.append(value)
            sizes.append(len(of_user))
    return (np.average(values, weights=sizes) if values else None), len(values), sum(sizes)


rows_with_ties = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1), st.integers(-2, 2)), max_size=40)


def columns(rows):
    scores = np.array([row[0] / 7 for row in rows], dtype=np.float64)
    return scores, np.array([row[1] for row in rows]), np.array([row[2] for row in rows], dtype=np.int64)


def same(value, expected):
    return value is expected if expected is None else value == pytest.approx(expected, abs=1e-12)


@given(rows_with_ties)
@settings(deadline=None)
def test_auc_and_gauc_equal_the_definition_with_ties(rows):
    scores, labels, users = columns(rows)
    assert same(metrics.auc(scores, labels), slow_auc(scores, labels))
    value, num_users, num_rows = slow_gauc(scores, labels, users)
    result = plain_metrics.gauc(scores, labels, users)
    assert same(result.value, value)
    assert (result.users, result.rows) == (num_users, num_rows)


def test_a_weight_is_a_repeated_row():
    rng = np.random.default_rng(0)
    scores, labels, weights = rng.random(50), rng.integers(0, 2, 50), rng.integers(0, 4, 50)
    repeated = metrics.auc(np.repeat(scores, weights), np.repeat(labels, weights))
    assert metrics.auc(scores, labels, weights) == pytest.approx(repeated, abs=1e-12)


def test_log_loss_calibration_and_normalized_entropy_by_hand():
    probabilities, labels = np.array([0.8, 0.4, 0.1, 0.3]), np.array([1, 0, 0, 1])
    loss = -np.mean(np.log([0.8, 0.6, 0.9, 0.3]))
    assert plain_metrics.log_loss(probabilities, labels) == pytest.approx(loss)
    assert plain_metrics.calibration(probabilities, labels) == pytest.approx(0.4 / 0.5)
    assert plain_metrics.normalized_entropy(probabilities, labels) == pytest.approx(loss / np.log(2))


def test_predicting_the_click_rate_has_normalized_entropy_one():
    labels = np.array([1, 0, 0, 0, 0])
    assert plain_metrics.normalized_entropy(np.full(5, 0.2), labels) == pytest.approx(1.0)


def test_certain_mistakes_cost_a_finite_loss():
    assert plain_metrics.log_loss(np.array([1.0, 0.0]), np.array([0, 1])) == pytest.approx(-np.log(1e-7))


@pytest.mark.parametrize("labels", [[], [0, 0], [1, 1]])
def test_what_needs_both_classes_is_none_without_them(labels):
    labels = np.array(labels)
    scores = np.linspace(0.2, 0.7, len(labels))
    assert metrics.auc(scores, labels) is None
    assert plain_metrics.normalized_entropy(scores, labels) is None
    assert plain_metrics.roc_curve(scores, labels) is None
    assert plain_metrics.fit_temperature(scores, labels) is None
    assert plain_metrics.gauc(scores, labels, np.arange(len(labels))) == (None, 0, 0)


def test_no_rows_and_no_clicks_are_none():
    nothing = np.zeros(0)
    assert plain_metrics.log_loss(nothing, nothing) is None
    assert plain_metrics.calibration(np.array([0.5]), np.array([0])) is None
    assert plain_metrics.calibration_bins(nothing, nothing, 10) == []


def test_calibration_bins_hold_equally_many_rows_and_all_of_them():
    rng = np.random.default_rng(1)
    probabilities = rng.random(1000)
    labels = (rng.random(1000) < probabilities).astype(int)
    bins = plain_metrics.calibration_bins(probabilities, labels, 10)
    assert [one.rows for one in bins] == [100] * 10
    assert sum(one.rows * one.click_rate for one in bins) == pytest.approx(labels.sum())
    first = np.sort(probabilities)[:100]
    assert bins[0].mean_probability == pytest.approx(first.mean())


def test_equal_scores_share_one_calibration_bin():
    bins = plain_metrics.calibration_bins(np.full(30, 0.25), np.arange(30) % 2, 10)
    assert len(bins) == 1
    assert bins[0].rows == 30
    assert bins[0].mean_probability == pytest.approx(0.25)
    assert bins[0].click_rate == pytest.approx(0.5)


def test_the_thinned_roc_curve_keeps_its_ends_and_its_area():
    rng = np.random.default_rng(2)
    labels = rng.random(20_000) < 0.05
    scores = rng.normal(size=20_000) + 2 * labels
    curve = plain_metrics.roc_curve(scores, labels)
    x, y = map(np.array, curve)
    assert len(x) <= 200
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert (np.diff(x) >= 0).all()
    assert (np.diff(y) >= 0).all()
    assert np.trapezoid(y, x) == pytest.approx(metrics.auc(scores, labels), abs=1e-3)


def test_a_short_roc_curve_is_complete():
    curve = plain_metrics.roc_curve(np.array([0.9, 0.8, 0.1]), np.array([1, 0, 1]))
    assert curve.false_positive_rates == [0, 0, 1, 1]
    assert curve.true_positive_rates == [0, 0.5, 0.5, 1]


def test_relative_improvement_is_over_chance():
    assert metrics.relative_improvement(0.8, 0.75) == pytest.approx(0.2)
    assert metrics.relative_improvement(0.8, 0.5) is None
    assert metrics.relative_improvement(None, 0.7) is None


@pytest.mark.parametrize("overconfidence", [0.4, 1.0, 3.0])
def test_temperature_undoes_a_scaling_of_the_logits(overconfidence):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=40_000)
    labels = rng.random(40_000) < 1 / (1 + np.exp(-logits))
    scaled = 1 / (1 + np.exp(-logits * overconfidence))
    temperature = plain_metrics.fit_temperature(scaled, labels)
    assert temperature == pytest.approx(overconfidence, rel=0.05)
    best = plain_metrics.log_loss(metrics.scale_probabilities(scaled, temperature), labels)
    for other in (0.97, 1.03):
        worse = plain_metrics.log_loss(metrics.scale_probabilities(scaled, temperature * other), labels)
        assert worse > best


def test_temperature_stays_within_its_bounds():
    perfect = plain_metrics.fit_temperature(np.array([0.4, 0.6]), np.array([0, 1]))
    reversed_ = plain_metrics.fit_temperature(np.array([0.4, 0.6]), np.array([1, 0]))
    assert (perfect, reversed_) == (pytest.approx(0.01), pytest.approx(100))
