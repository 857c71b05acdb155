"""Scores the rows of many requests together, on one thread."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hetegen_rec.config.export import ScoringStrategy
from hetegen_rec.scoring.scorer import Scorer
from hetegen_rec.serving.bodies import Decoded
from hetegen_rec.serving.metrics import Metrics
from hetegen_rec.serving.settings import Settings


class OverloadedError(RuntimeError):
    """So many rows wait that another request would wait too long."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A request that is not scored yet."""

    rows: Decoded
    future: "Future[NDArray[np.float32]]" = field(default_factory=Future)

    @property
    def num_rows(self) -> int:
        return len(self.rows)


class Batcher:
    """Takes rows from any thread and gives each caller the probabilities of its own.

    A batch is encoded and scored by one scorer: by what `scorer()` gives when the batch begins. So a scorer
    can be replaced at any time, and no request is scored by two.
    """

    def __init__(self, scorer: Callable[[], Scorer], settings: Settings, metrics: Metrics) -> None:
        """Starts the thread.

        Args:
            scorer: tells which one to score by.
            settings: sizes and times of batches and queue.
            metrics: told of every batch.
        """
        self._scorer, self._settings, self._metrics = scorer, settings, metrics
        self._queue: deque[_Waiting] = deque()
        self._queue_rows = 0
        self._closed = False
        self._changed = threading.Condition()
        metrics.watch_queue(lambda: self._queue_rows)
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread still scores."""
        return self._thread.is_alive()

    def submit(self, rows: Decoded) -> "Future[NDArray[np.float32]]":
        """Queues rows; a future that is cancelled before they are scored spares the work.

        Returns:
            A future of [N] probabilities, or of DataError if the rows are not as in training.

        Raises:
            OverloadedError: too many rows wait.
        """
        waiting = _Waiting(rows)
        with self._changed:
            if self._closed:
                raise OverloadedError("the server is stopping")
            if self._queue and self._queue_rows + waiting.num_rows > self._settings.queue_rows:
                raise OverloadedError(f"{self._queue_rows:,} rows wait to be scored; ask again later")
            self._queue.append(waiting)
            self._queue_rows += waiting.num_rows
            self._changed.notify()
        return waiting.future

    def close(self) -> None:
        """Scores what waits, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            wanted = [one for one in batch if one.future.set_running_or_notify_cancel()]
            self._metrics.dropped.inc(len(batch) - len(wanted))
            if wanted:
                self._score(wanted)

    def _next_batch(self) -> list[_Waiting]:
        """Waits for requests, and a little for more of them; empty once closed and all are done."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            end = time.monotonic() + self._settings.batch_seconds
            while self._queue_rows < self._settings.batch_rows and not self._closed:
                if not self._changed.wait(max(0.0, end - time.monotonic())):
                    break
            return self._take()

    def _take(self) -> list[_Waiting]:
        """The oldest requests that fit into a batch, at least one if any waits."""
        batch: list[_Waiting] = []
        num_rows = 0
        while self._queue and (not batch or num_rows + self._queue[0].num_rows <= self._settings.batch_rows):
            batch.append(self._queue.popleft())
            num_rows += batch[-1].num_rows
        self._queue_rows -= num_rows
        return batch

    def _score(self, batch: list[_Waiting]) -> None:
        start, scorer = time.perf_counter(), self._scorer()
        try:
            encoded = list(chain.from_iterable(_encode(scorer, group) for group in _alike(batch)))
            if not encoded:
                return
            _answer(scorer, encoded, self._settings.strategy)
        except Exception as error:  # told by the callers; the thread has others to score
            for one in batch:
                if not one.future.done():
                    one.future.set_exception(error)
            return
        num_rows = sum(len(ids) for _, ids in encoded)
        self._metrics.batch_seconds.observe(time.perf_counter() - start)
        self._metrics.batch_rows.observe(num_rows)
        self._metrics.rows.inc(num_rows)


def _alike(batch: Sequence[_Waiting]) -> list[list[_Waiting]]:
    """The requests whose rows can be encoded together: those of JSON, and those of one Arrow schema."""
    groups: dict[pa.Schema | None, list[_Waiting]] = {}
    for one in batch:
        groups.setdefault(one.rows.schema if isinstance(one.rows, pa.Table) else None, []).append(one)
    return list(groups.values())


def _encode(scorer: Scorer, group: list[_Waiting]) -> list[tuple[_Waiting, NDArray[np.int64]]]:
    """Requests with their ids [N, S]; one with bad rows gets its error, and the others their ids.

    Encoding costs the same for one row as for dozens, so it is done for all requests at once. Only if that
    fails is each encoded alone, to find the bad one.
    """
    try:
        ids = scorer.ids(_together([one.rows for one in group]))
    except Exception as error:  # whatever is wrong with one request must not reach the others
        if len(group) > 1:
            return list(chain.from_iterable(_encode(scorer, [one]) for one in group))
        group[0].future.set_exception(error)
        return []
    ends = np.cumsum([one.num_rows for one in group])[:-1]
    return list(zip(group, np.split(ids, ends), strict=True))


def _together(parts: list[Decoded]) -> Decoded:
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], pa.Table):
        return pa.concat_tables(parts)
    return list(chain.from_iterable(parts))


def _answer(
    scorer: Scorer, encoded: list[tuple[_Waiting, NDArray[np.int64]]], strategy: ScoringStrategy
) -> None:
    probabilities = scorer.score_ids(np.concatenate([ids for _, ids in encoded]), strategy)
    ends = np.cumsum([len(ids) for _, ids in encoded])[:-1]
    for (one, _), own in zip(encoded, np.split(probabilities, ends), strict=True):
        one.future.set_result(own)
