"""The processes that share one evaluation, and how rows move between them.

Collectives run on host tensors of a gloo group. With one process nothing is sent.
"""

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from hetegen_rec.evaluation.counts import FloatArray, IntArray

T = TypeVar("T")

_SAMPLES_PER_RANK = 64


class Ranks:
    """The ranks of an evaluation, seen from one of them."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """Args: group: a gloo group; None for one process alone."""
        self._group = group
        self.size = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        # gloo refuses inference tensors, and an evaluation is easily called under inference_mode.
        with torch.inference_mode(False):
            dist.all_gather_object(values, value, group=self._group)
        return values

    def exchange(
        self, columns: list[npt.NDArray[Any]], destinations: npt.NDArray[np.integer]
    ) -> list[npt.NDArray[Any]]:
        """Sends every row to its destination rank.

        Args:
            columns: arrays of shape [N].
            destinations: [N] rank that shall own the row.

        Returns:
            The columns of the rows that this rank owns now, in order of sender.
        """
        if self.size == 1:
            return columns
        order = np.argsort(destinations, kind="stable")
        sent = np.bincount(destinations, minlength=self.size)
        with torch.inference_mode(False):
            received = self._swap(torch.from_numpy(sent), [1] * self.size, [1] * self.size)
            sizes = (received.tolist(), sent.tolist())
            return [self._swap(torch.from_numpy(column[order]), *sizes).numpy() for column in columns]

    def _swap(self, rows: torch.Tensor, received: list[int], sent: list[int]) -> torch.Tensor:
        arrived = rows.new_empty(sum(received))
        dist.all_to_all_single(arrived, rows, received, sent, group=self._group)
        return arrived

    def owners_of_scores(self, ordered: FloatArray) -> IntArray:
        """Cuts the scores into one range a rank, about equally full; equal scores share an owner.

        Args:
            ordered: [N] this rank's scores, ascending.

        Returns:
            [N] owner of each score; a higher rank owns higher scores.
        """
        if self.size == 1:
            return np.zeros(len(ordered), np.int64)
        places = np.linspace(0, max(len(ordered) - 1, 0), _SAMPLES_PER_RANK).astype(np.int64)
        samples = np.sort(np.concatenate(self.gather(ordered[places] if len(ordered) else ordered)))
        cuts = np.arange(1, self.size) * len(samples) // self.size
        bounds = samples[cuts] if len(samples) else samples
        return np.searchsorted(bounds, ordered, side="right").astype(np.int64)

    def owners_of_users(self, keys: IntArray) -> IntArray:
        """[N] owner of each user; keys are already hashes, so their remainders are spread evenly."""
        return (keys.view(np.uint64) % np.uint64(self.size)).astype(np.int64)
