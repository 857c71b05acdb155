"""Whether one stage scores better than another: a paired bootstrap of the AUC difference.

Users are resampled as a whole where they are known, because the rows of a user are not independent.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from hetegen_rec.evaluation.counts import FloatArray, IntArray, is_click, starts_of_runs
from hetegen_rec.evaluation.errors import EvaluationError
from hetegen_rec.evaluation.metrics import Labels, Scores, auc_of_pairs
from hetegen_rec.evaluation.slices import MISSING_USER

NUM_RESAMPLES = 200
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether all of it lies on one side of zero."""
        return self.low > 0.0 or self.high < 0.0


@dataclass(frozen=True)
class PredictionTable:
    """The predictions of one stage on one split, sorted by row id."""

    row_ids: IntArray
    probabilities: FloatArray
    labels: FloatArray
    user_keys: IntArray | None

    @property
    def units(self) -> IntArray:
        """[N] what is resampled together: the user's key, or the row itself if there is no user."""
        if self.user_keys is None:
            return self.row_ids
        # Rows without a user stand alone: their own negative numbers, among 64-bit hashes.
        return np.where(self.user_keys == MISSING_USER, -1 - self.row_ids, self.user_keys)


def read_predictions(directory: Path) -> PredictionTable | None:
    """Reads the Parquet files of one split's predictions; None if there are none.

    Raises:
        EvaluationError: a file cannot be read, or lacks a column.
    """
    files = sorted(str(path) for path in directory.glob("*.parquet"))
    if not files:
        return None
    try:
        data = ds.dataset(files, format="parquet")
        names = ["row_id", "probability", "label"]
        names += ["user_key"] if "user_key" in data.schema.names else []
        missing = [name for name in names if name not in data.schema.names]
        if missing:
            raise EvaluationError(
                f"{directory}: predictions lack column(s) {', '.join(missing)}; predict again"
            )
        table = data.to_table(columns=names).sort_by("row_id")
    except (pa.ArrowException, OSError) as error:
        raise EvaluationError(f"{directory}: predictions cannot be read: {error}; predict again") from error
    columns: dict[str, Any] = {name: table[name].to_numpy() for name in names}
    repeated = np.flatnonzero(np.diff(columns["row_id"]) == 0)
    if len(repeated):
        row = columns["row_id"][repeated[0]]
        raise EvaluationError(
            f"{directory}: row {row} was predicted twice; remove the directory, predict again"
        )
    return PredictionTable(
        columns["row_id"].astype(np.int64),
        columns["probability"].astype(np.float64),
        columns["label"].astype(np.float64),
        columns["user_key"].astype(np.int64) if "user_key" in columns else None,
    )


def auc_difference_interval(
    stage: PredictionTable, base: PredictionTable, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval | None:
    """Percentile interval of AUC(stage) - AUC(base) over resamples of users (or rows).

    Args:
        stage: predictions of the stage.
        base: predictions of the stage it is held against, of the same rows.
        num_resamples: resamples; more give steadier bounds.
        seed: of the resampling.

    Returns:
        None if no resample has both classes.

    Raises:
        EvaluationError: the two hold different rows or labels.
    """
    if not np.array_equal(stage.row_ids, base.row_ids) or not np.array_equal(stage.labels, base.labels):
        raise EvaluationError(
            f"predictions of different rows cannot be compared ({len(stage.row_ids)} and {len(base.row_ids)} "
            "rows, or other row ids or labels); predict both stages again from the same data"
        )
    units = np.unique(stage.units, return_inverse=True)[1]
    num_units = int(units.max()) + 1
    ours, theirs = (
        _SortedScores(stage.probabilities, stage.labels),
        _SortedScores(base.probabilities, base.labels),
    )
    generator = np.random.default_rng(seed)
    differences = []
    for _ in range(num_resamples):
        drawn = np.bincount(generator.integers(num_units, size=num_units), minlength=num_units)
        times = drawn[units]
        found, reference = ours.auc(times), theirs.auc(times)
        if found is not None and reference is not None:
            differences.append(found - reference)
    if not differences:
        return None
    tail = (1.0 - CONFIDENCE) / 2.0
    return Interval(*np.quantile(differences, [tail, 1.0 - tail]).tolist())


class _SortedScores:
    """Sorts once, so that the AUC of every resample takes linear time."""

    def __init__(self, scores: Scores, labels: Labels) -> None:
        self._order = np.argsort(scores, kind="stable")
        self._clicks = is_click(labels)[self._order]
        self._ties = starts_of_runs(scores[self._order])

    def auc(self, times: IntArray) -> float | None:
        """AUC where row i stands `times[i]` times."""
        weights = times[self._order]
        positives = np.add.reduceat(weights * self._clicks, self._ties)
        negatives = np.add.reduceat(weights * ~self._clicks, self._ties)
        below = np.cumsum(negatives) - negatives
        pairs = float((positives * (below + 0.5 * negatives)).sum())
        return auc_of_pairs(pairs, int(positives.sum()), int(negatives.sum()))
