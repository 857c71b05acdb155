"""Exact metrics over rows that are spread over ranks, in O(rows / ranks) memory.

Rows move once. For everything that depends on the order of scores each rank comes to own a range of
scores, so that a global AUC is the pairs within the ranges plus the pairs across them; for GAUC each
rank comes to own a share of the users. The numbers do not depend on the number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from hetegen_rec.config.run import EvaluationConfig
from hetegen_rec.evaluation import metrics
from hetegen_rec.evaluation.counts import FloatArray, IntArray, ScoreCounts, starts_of_runs, sum_runs
from hetegen_rec.evaluation.errors import EvaluationError
from hetegen_rec.evaluation.exchange import Ranks
from hetegen_rec.evaluation.predictions import Predictions, ScoredRows
from hetegen_rec.evaluation.slices import MISSING_USER, Slice, make_slices


def evaluate_predictions(
    predictions: Predictions,
    group: dist.ProcessGroup | None,
    config: EvaluationConfig,
    head_items_threshold: int | None = None,
    temperature: float | None = None,
) -> dict[str, Any]:
    """Evaluates one split. A collective of the group.

    Args:
        predictions: the rows that this rank scored; over all ranks every row once.
        group: a gloo group of all ranks; None for one process.
        config: slices and bins.
        head_items_threshold: from `slices.head_threshold`; None leaves out head and tail items.
        temperature: fitted on another split; adds the log loss after scaling by it.

    Returns:
        The same on every rank, ready for JSON, None for what is not defined: `n`, `positives`, `auc`,
        `log_loss`, `normalized_entropy`, `calibration`, `gauc`, `gauc_users`, `gauc_rows` (None
        without user keys), `temperature` (fitted on these rows), `log_loss_scaled` (with
        `temperature` only), `slices` (name -> title, n, positives, auc, log_loss), `roc`,
        `calibration_bins`.

    Raises:
        EvaluationError: on every rank, if a rank holds probabilities or labels that are none, if
            ranks hold other context columns, or if there is no row at all.
    """
    ranks = Ranks(group)
    rows = _agree(predictions.rows, ranks)
    slices = make_slices(rows.context, config, head_items_threshold)
    owned = _own_scores(rows, slices, ranks)
    ranges = _Ranges.of(owned.of_all(), ranks)
    return {
        **_summary(ranges),
        **_gauc(rows, ranks),
        **_temperatures(ranges, temperature),
        "slices": {
            part.name: {"title": part.title, **_slice_summary(_Ranges.of(owned.of_slice(i), ranks))}
            for i, part in enumerate(slices)
        },
        "roc": _roc(ranges),
        "calibration_bins": _calibration_bins(ranges, config.calibration_bins),
    }


def _agree(rows: ScoredRows, ranks: Ranks) -> ScoredRows:
    """Raises every rank's problem on every rank; gives a rank without rows the others' columns."""
    names = tuple(sorted(rows.context)) if len(rows.row_ids) else None
    views = ranks.gather((names, rows.problem()))
    for rank, (_, problem) in enumerate(views):
        if problem:
            raise EvaluationError(f"rank {rank}: {problem}")
    held = {view[0] for view in views if view[0] is not None}
    if not held:
        raise EvaluationError("there is no row to evaluate; is the split empty?")
    if len(held) > 1:
        raise EvaluationError(f"ranks hold different context columns: {sorted(held)}")
    if names is None:
        return ScoredRows(
            rows.row_ids,
            rows.probabilities,
            rows.labels,
            {name: np.zeros(0, np.int64) for name in held.pop()},
        )
    return rows


@dataclass(frozen=True)
class _OwnedScores:
    """The rows of a range of scores; equal ones are one entry with a count."""

    scores: FloatArray
    codes: IntArray
    """Bit 0 is the label, bit i + 1 membership in slice i."""
    counts: IntArray

    def of_all(self) -> ScoreCounts:
        return ScoreCounts.of_rows(self.scores, self.codes & 1, self.counts)

    def of_slice(self, index: int) -> ScoreCounts:
        inside = (self.codes >> (index + 1)) & 1 == 1
        return ScoreCounts.of_rows(self.scores[inside], self.codes[inside] & 1, self.counts[inside])


def _own_scores(rows: ScoredRows, slices: Sequence[Slice], ranks: Ranks) -> _OwnedScores:
    codes = rows.labels.astype(np.int64)
    for index, part in enumerate(slices):
        codes |= part.mask.astype(np.int64) << (index + 1)
    # Counting equal rows before they travel keeps a constant score from filling up one rank.
    order = np.lexsort((codes, rows.probabilities))
    scores, codes = rows.probabilities[order], codes[order]
    starts = starts_of_runs(scores, codes)
    scores, codes, counts = scores[starts], codes[starts], sum_runs(np.ones(len(scores), np.int64), starts)
    return _OwnedScores(*ranks.exchange([scores, codes, counts], ranks.owners_of_scores(scores)))


@dataclass(frozen=True)
class _Totals:
    """What one rank's range of scores adds to the whole."""

    num_positives: int
    num_negatives: int
    log_loss_sum: float
    score_sum: float

    @property
    def num_rows(self) -> int:
        return self.num_positives + self.num_negatives


@dataclass(frozen=True)
class _Ranges:
    """This rank's range of scores, and what lies in the others'."""

    own: ScoreCounts
    ranks: Ranks
    by_rank: list[_Totals]

    @classmethod
    def of(cls, own: ScoreCounts, ranks: Ranks) -> "_Ranges":
        totals = _Totals(own.num_positives, own.num_negatives, own.log_loss_sum(), own.score_sum())
        return cls(own, ranks, ranks.gather(totals))

    @property
    def below(self) -> _Totals:
        return _add(self.by_rank[: self.ranks.rank])

    @property
    def above(self) -> _Totals:
        return _add(self.by_rank[self.ranks.rank + 1 :])

    @property
    def all(self) -> _Totals:
        return _add(self.by_rank)

    def auc(self) -> float | None:
        pairs = sum(self.ranks.gather(self.own.ordered_pairs(self.below.num_negatives)))
        return metrics.auc_of_pairs(pairs, self.all.num_positives, self.all.num_negatives)

    def log_loss(self) -> float | None:
        return metrics.ratio(self.all.log_loss_sum, self.all.num_rows)


def _add(parts: Sequence[_Totals]) -> _Totals:
    return _Totals(
        sum(part.num_positives for part in parts),
        sum(part.num_negatives for part in parts),
        sum(part.log_loss_sum for part in parts),
        sum(part.score_sum for part in parts),
    )


def _slice_summary(ranges: _Ranges) -> dict[str, Any]:
    return {
        "n": ranges.all.num_rows,
        "positives": ranges.all.num_positives,
        "auc": ranges.auc(),
        "log_loss": ranges.log_loss(),
    }


def _summary(ranges: _Ranges) -> dict[str, Any]:
    totals = ranges.all
    return {
        **_slice_summary(ranges),
        "normalized_entropy": metrics.normalize_entropy(
            ranges.log_loss(), totals.num_positives, totals.num_rows
        ),
        "calibration": metrics.ratio(totals.score_sum, totals.num_positives),
    }


def _gauc(rows: ScoredRows, ranks: Ranks) -> dict[str, Any]:
    if "user_key" not in rows.context:
        return {"gauc": None, "gauc_users": None, "gauc_rows": None}
    given = rows.context["user_key"] != MISSING_USER
    keys = rows.context["user_key"][given]
    columns = [rows.probabilities[given], rows.labels[given].astype(np.int8), keys]
    owned = ranks.exchange(columns, ranks.owners_of_users(keys))
    result = metrics.average_user_auc(ranks.gather(metrics.user_auc_sums(*owned)))
    return {"gauc": result.value, "gauc_users": result.users, "gauc_rows": result.rows}


def _temperatures(ranges: _Ranges, given: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"temperature": None}
    if ranges.all.num_positives and ranges.all.num_negatives:

        def slope_at(inverse: float) -> tuple[float, float]:
            parts = ranges.ranks.gather(metrics.temperature_slope(ranges.own, inverse))
            return sum(part[0] for part in parts), sum(part[1] for part in parts)

        found["temperature"] = metrics.solve_temperature(slope_at)
    if given is not None:
        own = ranges.own
        scaled = ScoreCounts(metrics.scale_probabilities(own.scores, given), own.positives, own.negatives)
        loss = sum(ranges.ranks.gather(scaled.log_loss_sum()))
        found["log_loss_scaled"] = metrics.ratio(loss, ranges.all.num_rows)
    return found


def _roc(ranges: _Ranges) -> dict[str, Any] | None:
    totals = ranges.all.num_positives, ranges.all.num_negatives
    if not all(totals):
        return None
    above = ranges.above.num_positives, ranges.above.num_negatives
    points = ranges.own.roc_points(metrics.roc_cells(metrics.MAX_ROC_POINTS), above, totals)
    by_rank = reversed(ranges.ranks.gather(points))
    cells, clicks, others = (np.concatenate(column) for column in zip(*by_rank, strict=True))
    last = np.flatnonzero(np.diff(cells, append=-1))
    return metrics.roc_of_points(clicks[last], others[last], totals)._asdict()


def _calibration_bins(ranges: _Ranges, num_bins: int) -> list[dict[str, Any]]:
    own = ranges.own.bin_sums(num_bins, ranges.below.num_rows, ranges.all.num_rows)
    sums = np.sum(ranges.ranks.gather(own), axis=0)
    return [one._asdict() for one in metrics.bins_of_sums(sums)]
