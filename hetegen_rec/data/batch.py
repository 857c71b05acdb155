"""One step's rows, as the pipeline moves them: a KJT with one key per token, and what goes with it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from hetegen_rec.data.cursor import Cursor


@dataclass
class Batch(Pipelineable):
    """B rows of T tokens.

    Ids index the table of the token's field; 0 is missing, 1 is out of vocabulary.
    """

    kjt: KeyedJaggedTensor
    """One key per token, in schema order; an absent sequence position is an empty bag."""
    ids: torch.Tensor
    """[B, T] int64: the (first) id of each token, -1 where the bag is empty."""
    log_prior: torch.Tensor
    """[B, T] float32: log share of this id among the training values of its field; [B, 0] if
    nobody reads it."""
    log_rate: torch.Tensor
    """[B, T] float32: log of how often a training row looks this id's table row up, over all
    tokens that share the table; [B, 0] if nobody reads it."""
    labels: torch.Tensor
    """[B] float32: 0 or 1."""
    row_ids: torch.Tensor
    """[B] int64: index of the row in its split; -1 marks padding, which counts for nothing."""
    strata: torch.Tensor
    """[B] float32 in (0, 1): place of the row among the real ones of the global batch, to stratify
    the noise level."""
    num_real_rows: int
    """Rows of the step over all ranks that are no padding of the plan: what losses are means over. At
    least 1. Rows that a reader skipped count, and so weigh as rows without loss."""
    noise_seed: int
    """Seed of this epoch's noise; the same on every rank."""
    cursor: Cursor
    """Where the reader stood after this batch."""
    context: dict[str, torch.Tensor] = field(default_factory=dict)
    """[B] columns for evaluation, never model input: `user_key`, `user_rows`, `item_rows`,
    `timestamp` (int64), those that the schema gives. `item_rows` is -1 where the row has no item."""
    movement: torch.Tensor | None = None
    """[B, T] float32 in (0, 1]: factor on the gradient of each cell's table row, below 1 for ids that are
    held; None where none is."""

    _TENSORS = ("ids", "log_prior", "log_rate", "labels", "row_ids", "strata", "movement")

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """A copy on `device`. The context stays where it is: only the host reads it."""
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors()
        }
        return replace(self, kjt=self.kjt.to(device, non_blocking=non_blocking), **moved)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory of this batch until `stream` has passed."""
        self.kjt.record_stream(stream)
        for _, tensor in self._tensors():
            tensor.record_stream(stream)

    def pin_memory(self) -> "Batch":
        """A copy in pinned memory, from which copies to a CUDA device are asynchronous."""
        pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in self._tensors()}
        return replace(self, kjt=self.kjt.pin_memory(), **pinned)

    @property
    def num_rows(self) -> int:
        """Rows of this batch, padding included."""
        return self.labels.shape[0]

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that are there, by name."""
        found = ((name, getattr(self, name)) for name in self._TENSORS)
        return ((name, tensor) for name, tensor in found if tensor is not None)
