"""Scores batches by a strategy, and keeps account of what that costs."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hetegen_rec.data.batch import Batch
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.inference.lookup import BatchRows, Lookup
from hetegen_rec.inference.plain import Plain
from hetegen_rec.inference.strategy import Strategy


@dataclass
class Cost:
    """What the rows of one rank have cost so far, against one plain pass each."""

    rows: int = 0
    """Rows that are no padding."""
    passes: float = 0.0
    """Passes of the network that they took."""
    times: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of the strategy and of a plain pass on the same batch, lookup included, for some batches."""

    def add(self, batch: Batch, passes: Tensor) -> None:
        """Counts a batch whose rows took [B] passes."""
        real = batch.row_ids >= 0
        self.rows += int(real.sum())
        self.passes += float(passes[real].sum())

    def over_ranks(self, runtime: Runtime) -> dict[str, float]:
        """Mean passes of a row and seconds as a multiple of plain scoring, of all ranks. A collective."""
        # The first batch pays for what is set up once, unless there is no other.
        seconds, plain = (sum(column) for column in zip(*(self.times[1:] or self.times), strict=True))
        shares = runtime.gather((self.rows, self.passes, seconds, plain))
        rows, passes, seconds, plain = (sum(column) for column in zip(*shares, strict=True))
        return {
            "passes_per_row": round(passes / max(rows, 1), 4),
            "time_multiple": round(seconds / plain, 2),
        }


class StrategyScorer:
    """A strategy on a sharded model: one sharded lookup a batch, whatever the strategy then does.

    Seconds are measured on batches 1, 2, 4, 8 and so on, which are scored plainly once more for it.
    """

    def __init__(self, lookup: Lookup, name: str, strategy: Strategy[BatchRows], runtime: Runtime) -> None:
        """Args: name: of the strategy, for what is told of it."""
        self._lookup, self._name, self._strategy, self._runtime = lookup, name, strategy, runtime
        self._plain = Plain(lookup.network)
        self._cost = Cost()
        self._num_batches = 0

    def probabilities(self, batch: Batch) -> Tensor:
        """[B] click probabilities of a batch on the device of the model. A collective."""
        self._num_batches += 1
        is_timed = self._num_batches & (self._num_batches - 1) == 0
        now = self._now if is_timed else lambda: 0.0  # to ask a device for the time is to wait for it
        with self._lookup.scoring(self._runtime.device.type):
            start = now()
            rows = BatchRows.of(self._lookup.tokens(batch.kjt), batch)
            looked_up = now()
            scored = self._strategy.score(rows)
            end = now()
            if is_timed:
                self._plain.score(rows)
                plain = now() - end
                self._cost.times.append((end - start, looked_up - start + plain))
        self._cost.add(batch, scored.passes)
        return scored.probabilities

    def account(self) -> dict[str, Any]:
        """The strategy, its settings, and the mean cost since the last account. A collective."""
        cost, self._cost, self._num_batches = self._cost, Cost(), 0
        return {"strategy": self._name, **cost.over_ranks(self._runtime), **self._strategy.settings}

    def _now(self) -> float:
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize(self._runtime.device)
        return time.perf_counter()
