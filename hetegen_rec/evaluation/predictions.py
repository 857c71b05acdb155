"""The scored rows of one rank, collected batch by batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hetegen_rec.evaluation.counts import FloatArray, IntArray


@dataclass(frozen=True)
class ScoredRows:
    """N rows with their probability of a click."""

    row_ids: IntArray
    """[N] index of the row in its split."""
    probabilities: FloatArray
    """[N] predicted probability of a click."""
    labels: FloatArray
    """[N] 0 or 1."""
    context: dict[str, IntArray]
    """[N] columns beside the model's input, such as `user_key`, `user_rows`, `item_rows`."""

    def problem(self) -> str | None:
        """What makes these rows impossible to evaluate, if anything."""
        outside = ~((self.probabilities >= 0.0) & (self.probabilities <= 1.0))
        if outside.any():
            value, row = self.probabilities[outside][0], self.row_ids[outside][0]
            return (
                f"{int(outside.sum())} of {len(outside)} probabilities are not within 0 and 1 (row {row}: "
                f"{value}); did training diverge? Try lower learning rates"
            )
        strange = (self.labels != 0.0) & (self.labels != 1.0)
        if strange.any():
            value, row = self.labels[strange][0], self.row_ids[strange][0]
            count = int(strange.sum())
            return f"{count} labels are neither 0 nor 1 (row {row}: {value}); prepare the data again"
        return None


class Predictions:
    """Collects scored batches of this rank; rows of padding (row id -1) are left out."""

    def __init__(self) -> None:
        self._chunks: list[ScoredRows] = []

    def add(self, probabilities: Any, labels: Any, row_ids: Any, context: Mapping[str, Any]) -> None:
        """Appends one batch.

        Args:
            probabilities: [B] array or host tensor.
            labels: [B] 0 or 1.
            row_ids: [B] index of the row in its split; negative for padding.
            context: [B] integer columns, the same names in every batch.
        """
        ids = np.asarray(row_ids, dtype=np.int64)
        real = ids >= 0
        chunk = ScoredRows(
            ids[real],
            np.asarray(probabilities, dtype=np.float64)[real],
            np.asarray(labels, dtype=np.float64)[real],
            {name: np.asarray(column, dtype=np.int64)[real] for name, column in context.items()},
        )
        self._chunks.append(chunk)
        self.__dict__.pop("rows", None)

    @cached_property
    def rows(self) -> ScoredRows:
        """All rows added so far."""
        return ScoredRows(
            _concatenate([chunk.row_ids for chunk in self._chunks], np.int64),
            _concatenate([chunk.probabilities for chunk in self._chunks], np.float64),
            _concatenate([chunk.labels for chunk in self._chunks], np.float64),
            {
                name: _concatenate([chunk.context[name] for chunk in self._chunks], np.int64)
                for name in (self._chunks[0].context if self._chunks else ())
            },
        )


def _concatenate(parts: list[Any], dtype: type) -> Any:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
