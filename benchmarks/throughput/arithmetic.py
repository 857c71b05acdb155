"""From the times of all turns to what a table says."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from benchmarks.throughput.stopwatch import Turn

Typical: TypeAlias = Literal["median", "mean"]
"""What stands for the steps of a repeat. A median passes over stalls, which in a loop on batches in memory
come from outside; a mean counts them, as they belong to a reader."""


@dataclass(frozen=True)
class Ratio:
    """Of two variants over the repeats: the median, and the least and the most."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Summary:
    """One variant over all repeats. Times are seconds."""

    seconds_per_step: list[float]
    """Of each repeat: the median or the mean of its steps."""
    cpu_seconds: float
    """Median over the repeats, of one process."""
    p50: float
    """Of single steps, all repeats together; likewise the next two."""
    p90: float
    p99: float
    num_steps: int
    rows_per_step: int

    @property
    def step(self) -> float:
        """Seconds of a step, the median over the repeats."""
        return statistics.median(self.seconds_per_step)

    @property
    def rows_per_second(self) -> float:
        """By the median over the repeats."""
        return self.rows_per_step / self.step

    def ratio_to(self, base: "Summary") -> Ratio:
        """Time of a step, relative to that of another in the same repeat."""
        pairs = zip(self.seconds_per_step, base.seconds_per_step, strict=True)
        ratios = [mine / other for mine, other in pairs]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def summarise(turns: Sequence[Turn], rows_per_step: int, typical: Typical) -> Summary:
    """The turns of one variant, one a repeat."""
    of_repeat = statistics.median if typical == "median" else statistics.mean
    steps = [seconds for turn in turns for seconds in turn.seconds]
    p50, p90, p99 = (float(value) for value in np.percentile(steps, [50, 90, 99]))
    return Summary(
        seconds_per_step=[of_repeat(turn.seconds) for turn in turns],
        cpu_seconds=statistics.median(turn.cpu_seconds for turn in turns),
        p50=p50,
        p90=p90,
        p99=p99,
        num_steps=len(steps),
        rows_per_step=rows_per_step,
    )
