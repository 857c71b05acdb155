"""Where a stage stands: everything that a resumed run needs beside weights and optimizer state."""

import math
from dataclasses import dataclass, field
from typing import Any

from hetegen_rec.data.cursor import Cursor


@dataclass
class StageState:
    """As of the last trained batch. Noise, shuffle and dropout are functions of it and have no state."""

    step: int = 0
    """Steps taken."""
    cursor: Cursor = field(default_factory=Cursor)
    """Where the reader of the training rows goes on."""
    batches: int = 0
    """Batches trained in the epoch of the cursor."""
    evaluation_due: bool = False
    """Whether a part of an epoch was trained to its end and not evaluated yet."""
    best_auc: float = -math.inf
    """Best validation AUC so far."""
    evaluations_without_gain: int = 0
    """Evaluations since then."""
    skipped_steps: int = 0
    """Steps left out because a loss or gradient was not finite."""
    skipped_rows: int = 0
    """Training rows that could not be read and were left out, over all ranks, once for every time."""
    seconds: float = 0.0
    """Time spent training and evaluating, over all attempts."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        best = None if math.isinf(self.best_auc) else self.best_auc
        return {**vars(self), "cursor": self.cursor.as_json(), "best_auc": best}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "StageState":
        """The state that `as_json` described."""
        best = -math.inf if values["best_auc"] is None else values["best_auc"]
        return cls(**{**values, "cursor": Cursor.from_json(values["cursor"]), "best_auc": best})
