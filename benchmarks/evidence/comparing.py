"""How sure a difference between two methods is: paired tests, corrected for their number, and ranks."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mpmath  # type: ignore[import-untyped]

LEVEL = 0.05


class Spread(NamedTuple):
    """Mean and standard deviation over seeds."""

    mean: float
    deviation: float
    """Of the sample; 0 of one value."""
    num_seeds: int


def spread_of(values: Sequence[float]) -> Spread | None:
    """Mean and deviation; None without values."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(statistics.mean(values), deviation, len(values))


def paired_p_value(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of Student's paired t-test: how likely so large a mean is if the true one is zero.

    Args:
        differences: one value a seed.

    Returns:
        None for fewer than two seeds.
    """
    if len(differences) < 2:
        return None
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    if deviation == 0.0:
        return 0.0 if mean else 1.0
    freedom = len(differences) - 1
    t_squared = mean**2 * len(differences) / deviation**2
    # P(|T| > t) is the regularised incomplete beta function at freedom / (freedom + t^2).
    return float(mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t_squared), regularized=True))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number (Holm 1979): the chance of any false finding stays bounded."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def ranks(values: Mapping[str, float]) -> dict[str, float]:
    """1 for the highest value; equal ones share the mean of their ranks."""
    return {
        name: 1 + sum(other > value for other in values.values()) + (_ties(values, value) - 1) / 2
        for name, value in values.items()
    }


def _ties(values: Mapping[str, float], value: float) -> int:
    return sum(other == value for other in values.values())
