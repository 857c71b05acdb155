"""What a test-time strategy is given, and what it gives back.

Strategies know tensors and a network that scores them, so the same ones serve a sharded model and an
artifact.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor


class Network(Protocol):
    """What scores tokens: the replicated part of a model, or what was exported of it."""

    def score(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Tokens [B, T, D] and whether each exists, [B, T] bool -> click logits [B]."""
        ...


@dataclass(frozen=True)
class Rows:
    """Looked-up rows, on the device of the network."""

    tokens: Tensor
    """[B, T, D]: table rows, projected."""
    ids: Tensor
    """[B, T] int64: the (first) id of each token, -1 where there is none."""
    log_rate: Tensor
    """[B, T] float32: log of how often a training row looks this id up (see `Batch.log_rate`)."""

    @property
    def present(self) -> Tensor:
        """[B, T] bool: False for positions that do not exist."""
        return self.ids >= 0


RowsT_contra = TypeVar("RowsT_contra", bound=Rows, contravariant=True)


@dataclass(frozen=True)
class Scored:
    """What a strategy makes of rows."""

    probabilities: Tensor
    """[B]: of a click."""
    passes: Tensor
    """[B] float: passes of the network that the row took."""


class Strategy(Protocol[RowsT_contra]):
    """Scores looked-up rows by passes of the replicated network, without a collective.

    Nothing may depend on which rows stand in a batch together, or on where a row stands in its file: equal
    rows have equal scores, on any number of ranks and in an artifact.
    """

    @property
    def settings(self) -> Mapping[str, float]:
        """What evaluation.json tells of it, besides its name and cost."""
        ...

    def score(self, rows: RowsT_contra) -> Scored:
        """Scores every row."""
        ...


def every_row(rows: Rows, passes: float) -> Tensor:
    """[B]: the same number of passes for every row."""
    return torch.full((rows.tokens.shape[0],), passes, device=rows.tokens.device)
