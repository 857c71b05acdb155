"""Counts what a rank hands to collectives: bytes that TorchRec exchanges, by the rank they are for."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

Bytes = NDArray[np.float64]


class CountedCalls:
    """Bytes that this rank hands to each rank, by collective, while it counts.

    What TorchRec calls `torch.distributed` for is counted. Numbers that ranks tell each other before an
    exchange are not, nor are all-reduces.
    """

    def __init__(self, world_size: int) -> None:
        self._size = world_size
        self.ids: Bytes = np.zeros(world_size)
        """[W] of ids and lengths."""
        self.vectors: list[list[float]] = []
        """[W] each: of exchanges of looked-up rows and of gradients, in order."""

    @property
    def sum_of_vectors(self) -> Bytes:
        """[W] of looked-up rows and of gradients, in all."""
        return np.sum([np.zeros(self._size), *map(np.array, self.vectors)], axis=0)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Context in which calls are counted."""
        counters: dict[str, Callable[[dict[str, Any]], None]] = {
            "all_to_all_single": self._all_to_all,
            "reduce_scatter_tensor": lambda call: self._alike(call, call["input"].nbytes, shared=True),
            "all_gather_into_tensor": lambda call: self._alike(call, call["input_tensor"].nbytes),
        }
        before = {name: getattr(dist, name) for name in counters}
        for name, count in counters.items():
            setattr(dist, name, _calling(count, before[name]))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(dist, name, function)

    def _all_to_all(self, call: dict[str, Any]) -> None:
        splits, tensor = call.get("input_split_sizes"), call["input"]
        if splits is None:  # how much is to come, a number a tensor: not what is to come
            return
        sizes = self._by_rank(call, np.array(splits, dtype=float) * tensor.element_size())
        if tensor.dtype in (torch.int32, torch.int64):
            self.ids += sizes
        else:
            self.vectors.append(sizes.tolist())

    def _alike(self, call: dict[str, Any], size: float, *, shared: bool = False) -> None:
        peers = dist.get_world_size(call["group"])
        self.vectors.append(self._by_rank(call, np.full(peers, size / peers if shared else size)).tolist())

    def _by_rank(self, call: dict[str, Any], sizes: Bytes) -> Bytes:
        found = np.zeros(self._size)
        found[dist.get_process_group_ranks(call["group"])] = sizes
        return found


def _calling(count: Callable[[dict[str, Any]], None], function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)

    def call(*positional: Any, **named: Any) -> Any:
        count(signature.bind(*positional, **named).arguments)
        return function(*positional, **named)

    return call
