"""What a test-time strategy is given, and what it gives back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hetegen_rec.data.batch import Batch


@dataclass(frozen=True)
class Rows:
    """Looked-up rows, on the device of the network."""

    tokens: Tensor
    """[B, T, D]: table rows, projected."""
    batch: Batch
    """The batch that they belong to."""

    @property
    def present(self) -> Tensor:
        """[B, T] bool: False for positions that do not exist."""
        return self.batch.ids >= 0


@dataclass(frozen=True)
class Scored:
    """What a strategy makes of rows."""

    probabilities: Tensor
    """[B]: of a click."""
    passes: Tensor
    """[B] float: passes of the network that the row took."""


class Strategy(Protocol):
    """Scores looked-up rows by passes of the replicated network, without a collective.

    Nothing may depend on which rows stand in a batch together: scores are the same on any number of ranks.
    """

    @property
    def settings(self) -> Mapping[str, float]:
        """What evaluation.json tells of it, besides its name and cost."""
        ...

    def score(self, rows: Rows) -> Scored:
        """Scores every row."""
        ...


def every_row(rows: Rows, passes: float) -> Tensor:
    """[B]: the same number of passes for every row."""
    return torch.full((rows.tokens.shape[0],), passes, device=rows.tokens.device)
