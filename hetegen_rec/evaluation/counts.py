"""Clicks counted by score: the sufficient statistic of every metric that does not look at users.

Counts over a range of scores are exact and add up, so ranks that each own a range can compute the
same numbers as one process that holds all rows.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]

Number = TypeVar("Number", np.float64, np.int64)

PROBABILITY_FLOOR = 1e-7
"""Logarithms see probabilities no nearer than this to 0 and 1, as the public leaderboards do."""


@dataclass(frozen=True)
class ScoreCounts:
    """How often each distinct score was given to a click and to a non-click."""

    scores: FloatArray
    """[U] distinct scores, ascending."""
    positives: IntArray
    """[U] clicks with that score."""
    negatives: IntArray
    """[U] non-clicks with that score."""

    @classmethod
    def of_rows(
        cls,
        scores: npt.NDArray[np.floating],
        labels: npt.NDArray[np.number],
        weights: IntArray | None = None,
    ) -> "ScoreCounts":
        """Counts rows.

        Args:
            scores: [N] finite scores.
            labels: [N] 0 or 1.
            weights: [N] times that each row stands for; once if left out.
        """
        order = np.argsort(scores, kind="stable")
        ordered = np.asarray(scores, dtype=np.float64)[order]
        times = np.ones(len(order), np.int64) if weights is None else weights[order]
        clicks = times * is_click(labels)[order]
        starts = starts_of_runs(ordered)
        positives = sum_runs(clicks, starts)
        return cls(ordered[starts], positives, sum_runs(times, starts) - positives)

    @cached_property
    def num_positives(self) -> int:
        """Clicks over all scores."""
        return int(self.positives.sum())

    @cached_property
    def num_negatives(self) -> int:
        """Non-clicks over all scores."""
        return int(self.negatives.sum())

    @property
    def num_rows(self) -> int:
        """Rows over all scores."""
        return self.num_positives + self.num_negatives

    def ordered_pairs(self, negatives_below: int = 0) -> float:
        """Pairs of a click of this range and a non-click that scores lower; a tie counts half.

        Args:
            negatives_below: non-clicks in the ranges of lower scores.
        """
        below = negatives_below + np.cumsum(self.negatives) - self.negatives
        return float((self.positives * (below + 0.5 * self.negatives)).sum())

    def log_loss_sum(self) -> float:
        """Cross-entropy in nats, summed over rows; the scores are probabilities."""
        clipped = np.clip(self.scores, PROBABILITY_FLOOR, 1.0 - PROBABILITY_FLOOR)
        return -float((self.positives * np.log(clipped) + self.negatives * np.log1p(-clipped)).sum())

    def score_sum(self) -> float:
        """The scores summed over rows."""
        return float(((self.positives + self.negatives) * self.scores).sum())

    def bin_sums(self, num_bins: int, rows_below: int, num_rows: int) -> FloatArray:
        """Sums over bins that hold equally many of all rows; equal scores share a bin.

        Args:
            num_bins: bins over the whole of the rows.
            rows_below: rows in the ranges of lower scores.
            num_rows: rows in all ranges.

        Returns:
            [num_bins, 3]: rows, sum of the scores, clicks.
        """
        rows = self.positives + self.negatives
        middle = rows_below + np.cumsum(rows) - rows / 2
        bins = np.minimum((middle * num_bins / max(num_rows, 1)).astype(np.int64), num_bins - 1)
        columns = (rows, rows * self.scores, self.positives)
        return np.stack([np.bincount(bins, column, num_bins) for column in columns], axis=1)

    def roc_points(
        self, num_cells: int, above: tuple[int, int], totals: tuple[int, int]
    ) -> tuple[IntArray, IntArray, IntArray]:
        """Points of the ROC curve, at most one per cell of equal length along the curve.

        Args:
            num_cells: cells over the whole curve, whose length is |x| + |y| = 2.
            above: clicks and non-clicks in the ranges of higher scores.
            totals: clicks and non-clicks in all ranges; both positive.

        Returns:
            Cell, clicks and non-clicks at or above the point's threshold, from the highest score
            down; of the points in a cell the last.
        """
        clicks = above[0] + np.cumsum(self.positives[::-1])
        others = above[1] + np.cumsum(self.negatives[::-1])
        cells = ((clicks / totals[0] + others / totals[1]) * (num_cells / 2)).astype(np.int64)
        last = np.flatnonzero(np.diff(cells, append=-1))
        return cells[last], clicks[last], others[last]


def is_click(labels: npt.NDArray[np.number]) -> npt.NDArray[np.bool_]:
    """Which of the labels are 1."""
    return np.asarray(labels, dtype=np.float64) > 0.0


def starts_of_runs(*keys: npt.NDArray[np.generic]) -> IntArray:
    """Where runs of equal keys start in sorted arrays of the same length [N]."""
    if not len(keys[0]):
        return np.zeros(0, np.int64)
    changed = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    return np.concatenate([[0], np.flatnonzero(changed) + 1])


def sum_runs(values: npt.NDArray[Number], starts: IntArray) -> npt.NDArray[Number]:
    """Sums of the runs that begin at `starts`."""
    if not len(starts):
        return values[:0]
    return np.add.reduceat(values, starts)
