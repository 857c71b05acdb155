"""Times steps by when their batches are taken.

In a pipeline that is full one batch is taken a step, so the time between two of them is that of a whole step,
whatever happens inside it; nothing in the code under test has to know that it is timed.
"""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from hetegen_rec.data.batch import Batch


@dataclass(frozen=True)
class Turn:
    """What one turn of a variant took on this rank."""

    seconds: list[float]
    """Of each timed step, that is of `batch_size` rows over all ranks."""
    cpu_seconds: float
    """A step, over all threads of this process."""

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Turn":
        """The inverse of `save`."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class Workload(Protocol):
    """Something that can be measured over and over again."""

    def turn(self) -> Turn:
        """Carries out and times some steps, as many each time. A collective."""


class Stopwatch:
    """Notes when batches are taken."""

    def __init__(self) -> None:
        self._wall: list[float] = []
        self._cpu: list[float] = []

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches."""
        iterator = iter(batches)
        while True:
            self._wall.append(time.perf_counter())
            self._cpu.append(time.process_time())
            try:
                batch = next(iterator)
            except StopIteration:
                return
            yield batch

    def read(self, skip: int) -> Turn:
        """The steps between batches taken, without the first ones; and starts anew."""
        wall, cpu = self._wall[skip:], self._cpu[skip:]
        self._wall, self._cpu = [], []
        seconds = [end - start for start, end in pairwise(wall)]
        return Turn(seconds, (cpu[-1] - cpu[0]) / len(seconds))
