"""What memory and cores of this machine can do at most, measured beside the steps; what a step needs."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.throughput.stopwatch import Workload

_SIZE = 1024  # of square matrices: 4 MiB each
_PRODUCTS = 4
_GATHERS = 4
_PASSES = 3  # over a looked-up row: read, and read and written by the update


@dataclass(frozen=True)
class Limits:
    """One measurement, with the threads that a step has too."""

    gather_bytes_per_second: float
    """Table rows gathered by the ids of one batch; only what is read counts."""
    gemm_flops_per_second: float
    """Products of square float32 matrices."""
    batch_bytes: int
    """Of the table rows that one batch looks up."""


@dataclass(frozen=True)
class Bound:
    """What a step of a variant cannot be faster than while it is made of the same products and lookups."""

    limits: Limits
    flops: float
    """Operations in matrix products of a step."""

    @property
    def seconds(self) -> float:
        """A step that did these and its lookups and nothing else, one after the other."""
        lookups = _PASSES * self.limits.batch_bytes / self.limits.gather_bytes_per_second
        return lookups + self.flops / self.limits.gemm_flops_per_second


class LimitsProbe:
    """Measures the limits once for each call."""

    def __init__(self, ids: Tensor, table_rows: int, dim: int) -> None:
        """Makes a table as large as those of the model together.

        Args:
            ids: [N] rows of it that one batch looks up.
            table_rows: its rows.
            dim: its width.
        """
        self._ids = ids
        self._table = torch.rand(table_rows, dim)
        self._matrix = torch.rand(_SIZE, _SIZE)
        self._gathered = torch.empty(len(ids), dim)

    def measure(self) -> Limits:
        """The median of a few tries of each."""
        gather = statistics.median(self._gathers())
        product = statistics.median(self._products())
        size = self._gathered.nbytes
        return Limits(size / gather, 2.0 * _SIZE**3 / product, size)

    def _gathers(self) -> Iterator[float]:
        for _ in range(_GATHERS):
            start = time.perf_counter()
            torch.index_select(self._table, 0, self._ids, out=self._gathered)
            yield time.perf_counter() - start

    def _products(self) -> Iterator[float]:
        for _ in range(_PRODUCTS):
            start = time.perf_counter()
            torch.mm(self._matrix, self._matrix)
            yield time.perf_counter() - start


def combine(limits: list[Limits]) -> Limits:
    """Medians over the repeats."""
    return Limits(
        statistics.median(one.gather_bytes_per_second for one in limits),
        statistics.median(one.gemm_flops_per_second for one in limits),
        limits[0].batch_bytes,
    )


def count_flops(workload: Workload) -> float:
    """Operations in matrix products of one turn; two for a multiplication and an addition. A collective."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # the counter does not know the fused attention of CPUs
        workload.turn()
    return float(counter.get_total_flops())
