"""Many runs side by side: one a core, until all that can be done is done."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import FrameType

from benchmarks.evidence.plan import AnyRun, Plan
from benchmarks.evidence.records import Ledger, Record
from benchmarks.evidence.workers import StoppedError, Workers

Execute = Callable[[AnyRun, int], Record]
"""Carries out a run on a core."""
Tell = Callable[[Record, int, float], None]
"""Hears of every record, the runs left, and the seconds that they may take."""


def carry_out(plan: Plan, ledger: Ledger, execute: Execute, cores: Sequence[int], tell: Tell) -> None:
    """Does every run of a plan that is not done yet. One that fails is not tried again in here.

    Args:
        plan: the runs.
        ledger: where finished ones stand, and new ones are added.
        execute: does one, in a thread.
        cores: how many at a time, and where.
        tell: called as runs end.
    """
    progress = _Progress(plan, ledger)
    free = list(cores)
    running: dict[Future[Record], tuple[AnyRun, int]] = {}
    with ThreadPoolExecutor(len(cores)) as pool:
        while True:
            under_way = [run for run, _ in running.values()]
            run = plan.next_run(ledger.done, progress.failed, under_way) if free else None
            if run is not None:
                core = free.pop()
                running[pool.submit(execute, run, core)] = run, core
                continue
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                _, core = running.pop(future)
                free.append(core)
                record = future.result()
                ledger.add(record)
                progress.add(record)
                tell(record, progress.num_left, progress.seconds_left)


@contextmanager
def stopping_on_signals(workers: Workers) -> Iterator[None]:
    """Context in which Ctrl-C and SIGTERM stop the workers, which save, and end the context early."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        workers.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except StoppedError:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """What of a session is done, and how long the rest may take."""

    def __init__(self, plan: Plan, ledger: Ledger) -> None:
        self._plan, self._ledger = plan, ledger
        self._start = time.monotonic()
        self._num_ended = 0
        self.failed: set[str] = set()
        """Ids of runs that failed in this session."""

    def add(self, record: Record) -> None:
        """Counts a run that ended."""
        self._num_ended += 1
        if record.status == "failed":
            self.failed.add(record.run)

    @property
    def num_left(self) -> int:
        """Runs that have not ended."""
        return max(0, self._plan.num_left(self._ledger.done) - len(self.failed))

    @property
    def seconds_left(self) -> float:
        """By the pace of this session."""
        return (time.monotonic() - self._start) / self._num_ended * self.num_left
