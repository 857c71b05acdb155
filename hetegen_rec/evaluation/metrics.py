"""Metrics of click probabilities: exact, ties handled, None where a value is not defined.

Labels are 0 or 1 and arrays have shape [N] throughout. Beside `auc` these are parts:
`hetegen_rec.evaluation.gather` puts them together over rows that are spread over ranks.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from hetegen_rec.evaluation.counts import (
    PROBABILITY_FLOOR,
    FloatArray,
    IntArray,
    ScoreCounts,
    is_click,
    starts_of_runs,
    sum_runs,
)

Scores: TypeAlias = npt.NDArray[np.floating]
Labels: TypeAlias = npt.NDArray[np.number]

MAX_ROC_POINTS = 200
_MAX_TEMPERATURE = 100.0
_NEWTON_STEPS = 60


class GroupedAUC(NamedTuple):
    """GAUC and what it rests on."""

    value: float | None
    """AUC within a user, averaged over users with weight by rows; None if no user counts."""
    users: int
    """Users with both classes, the ones that count."""
    rows: int
    """Rows of these users."""


class CalibrationBin(NamedTuple):
    """Rows of neighbouring scores."""

    rows: int
    mean_probability: float
    click_rate: float


class RocCurve(NamedTuple):
    """Points from (0, 0) to (1, 1)."""

    false_positive_rates: list[float]
    true_positive_rates: list[float]


def auc(scores: Scores, labels: Labels, weights: IntArray | None = None) -> float | None:
    """Probability that a click scores above a non-click, a tie counting half; None with one class."""
    counts = ScoreCounts.of_rows(scores, labels, weights)
    return auc_of_pairs(counts.ordered_pairs(), counts.num_positives, counts.num_negatives)


def auc_of_pairs(ordered_pairs: float, num_positives: int, num_negatives: int) -> float | None:
    """AUC from the number of rightly ordered pairs; None if there is no pair at all."""
    if not num_positives or not num_negatives:
        return None
    return ordered_pairs / num_positives / num_negatives


def normalize_entropy(loss: float | None, num_positives: int, num_rows: int) -> float | None:
    """`loss` in nats over the entropy of the click rate; None with one class."""
    if loss is None or not 0 < num_positives < num_rows:
        return None
    rate = num_positives / num_rows
    return loss / -(rate * math.log(rate) + (1.0 - rate) * math.log1p(-rate))


def user_auc_sums(
    scores: Scores, labels: Labels, user_keys: npt.NDArray[np.integer]
) -> tuple[float, int, int]:
    """What GAUC adds up over users: sum of rows x AUC, rows, and users with both classes."""
    order = np.lexsort((scores, user_keys))
    keys, ordered, clicks = user_keys[order], scores[order], is_click(labels)[order].astype(np.int64)
    ties = starts_of_runs(keys, ordered)
    positives, negatives = sum_runs(clicks, ties), sum_runs(1 - clicks, ties)
    users = starts_of_runs(keys[ties])
    user_positives, user_negatives = sum_runs(positives, users), sum_runs(negatives, users)
    below = np.cumsum(negatives) - negatives
    tie_counts = np.diff(users, append=len(ties))
    below -= np.repeat(below[users], tie_counts)
    pairs = sum_runs(positives * (below + 0.5 * negatives), users)
    all_pairs = user_positives.astype(np.float64) * user_negatives.astype(np.float64)
    both = all_pairs > 0
    rows = (user_positives + user_negatives)[both]
    weighted = rows * pairs[both] / all_pairs[both]
    return float(weighted.sum()), int(rows.sum()), int(both.sum())


def average_user_auc(parts: list[tuple[float, int, int]]) -> GroupedAUC:
    """GAUC over disjoint sets of users from their `user_auc_sums`."""
    rows = sum(part[1] for part in parts)
    users = sum(part[2] for part in parts)
    return GroupedAUC(ratio(math.fsum(part[0] for part in parts), rows), users, rows)


def bins_of_sums(sums: FloatArray) -> list[CalibrationBin]:
    """Means of the bins from their [num_bins, 3] sums."""
    return [
        CalibrationBin(int(rows), float(score_sum / rows), float(clicks / rows))
        for rows, score_sum, clicks in sums
        if rows
    ]


def roc_cells(max_points: int) -> int:
    """Cells along the curve that leave room for the origin and for (1, 1), which has its own cell."""
    return max_points - 2


def roc_of_points(clicks: IntArray, others: IntArray, totals: tuple[int, int]) -> RocCurve:
    """The curve through the origin and points given as counts at or above their threshold."""
    return RocCurve([0.0, *(others / totals[1]).tolist()], [0.0, *(clicks / totals[0]).tolist()])


def relative_improvement(value: float | None, base: float | None) -> float | None:
    """RI = (AUC - 0.5) / (AUC of the base - 0.5) - 1; None if the base is no better than chance."""
    if value is None or base is None or base <= 0.5:
        return None
    return (value - 0.5) / (base - 0.5) - 1.0


def to_logits(probabilities: Scores) -> FloatArray:
    """Log-odds of probabilities, finite for 0 and 1 too."""
    clipped = np.clip(probabilities.astype(np.float64), PROBABILITY_FLOOR, 1.0 - PROBABILITY_FLOOR)
    logits: FloatArray = np.log(clipped) - np.log1p(-clipped)
    return logits


def scale_probabilities(probabilities: Scores, temperature: float) -> FloatArray:
    """Probabilities after division of their logits by a temperature."""
    return _sigmoid(to_logits(probabilities) / temperature)


def temperature_slope(counts: ScoreCounts, inverse: float) -> tuple[float, float]:
    """First and second derivative of the summed log loss by the inverse temperature."""
    logits = to_logits(counts.scores)
    scaled = _sigmoid(logits * inverse)
    rows = counts.positives + counts.negatives
    slope = (rows * scaled - counts.positives) * logits
    curvature = rows * scaled * (1.0 - scaled) * logits**2
    return float(slope.sum()), float(curvature.sum())


def solve_temperature(slope_at: Callable[[float], tuple[float, float]]) -> float:
    """Finds where the slope by the inverse temperature vanishes.

    The log loss is convex in the inverse temperature, so Newton's method inside a shrinking bracket
    cannot miss.
    """
    low, high = 1.0 / _MAX_TEMPERATURE, _MAX_TEMPERATURE
    if slope_at(low)[0] >= 0.0:
        return 1.0 / low
    if slope_at(high)[0] <= 0.0:
        return 1.0 / high
    inverse = 1.0
    for _ in range(_NEWTON_STEPS):
        slope, curvature = slope_at(inverse)
        if slope > 0.0:
            high = inverse
        else:
            low = inverse
        step = inverse - slope / curvature if curvature > 0.0 else low
        proposal = step if low < step < high else math.sqrt(low * high)
        if abs(proposal - inverse) <= 1e-12 * inverse:
            return 1.0 / proposal
        inverse = proposal
    return 1.0 / inverse


def _sigmoid(logits: FloatArray) -> FloatArray:
    # exp of a negative number only: no overflow for large logits of either sign.
    small = np.exp(-np.abs(logits))
    values: FloatArray = np.where(logits >= 0, 1.0, small) / (1.0 + small)
    return values


def ratio(numerator: float, denominator: float) -> float | None:
    """A quotient, or None where the denominator is zero."""
    return numerator / denominator if denominator else None
