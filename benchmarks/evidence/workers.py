"""Processes that begin with everything imported.

Importing torch and torchrec takes longer than many a small run. So one process imports them and does nothing
else, and every run is a fork of it (`multiprocessing`'s fork server): a process of its own, on one core, that
can be killed alone. Forking is safe because the first one has no process group, runs no work, and has no
threads of Python.
"""

import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

IMPORTED = ("hetegen_rec.cli",)
"""What is there from a worker's first moment on."""
_LINES_OF_A_FAILURE = 3


class RunError(RuntimeError):
    """A run did not come to its end. The message says how it ended and where its output is."""


class StoppedError(RuntimeError):
    """The workers were asked to stop; the run goes on another time."""


@dataclass(frozen=True)
class Usage:
    """What a worker took."""

    seconds: float
    cpu_seconds: float
    peak_memory_mib: float


class Workers:
    """The workers of the moment, so that all can be stopped at once, also by a signal's handler."""

    def __init__(self) -> None:
        """Starts the process that workers are forks of. Only the main thread may call this."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*IMPORTED])
        self._running: set[int] = set()
        self._stopped = False
        # `multiprocessing` reads an exit code once; two threads that both look for it break each other.
        self._lock = threading.Lock()
        with _one_core(), _ignoring_sigterm():
            forkserver.ensure_running()

    def run(self, work: Callable[..., None], arguments: tuple[Any, ...], log: Path, core: int) -> Usage:
        """Does work in a process of its own to its end; several threads may call this.

        Args:
            work: a function that can be imported. It fails by an exception or `sys.exit`.
            arguments: its arguments.
            log: where its output is added.
            core: the only one that it may use, so that it makes one thread.

        Raises:
            RunError: it failed.
            StoppedError: it was stopped, or would have been started after `stop`.
        """
        if self._stopped:
            raise StoppedError
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        start, said_before = time.monotonic(), log.stat().st_size
        told, tell = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_begin, args=(work, arguments, log, core, tell))
        with self._lock:
            process.start()
        tell.close()
        exit_code = self._wait(process)
        if self._stopped:
            raise StoppedError
        if exit_code:
            raise RunError(f"exit code {exit_code}: {_last_words(log, said_before)} ({log})")
        return Usage(time.monotonic() - start, *told.recv())

    def stop(self) -> None:
        """Asks all workers to stop, which lets them save, and lets none start any more."""
        self._stopped = True
        for pid in list(self._running):
            _terminate(pid)

    def _wait(self, process: ForkServerProcess) -> int:
        pid = process.pid
        assert pid is not None  # it was started
        self._running.add(pid)
        if self._stopped:  # after it was started, and before it was known
            _terminate(pid)
        connection.wait([process.sentinel])
        self._running.discard(pid)
        with self._lock:
            process.join()
        return process.exitcode or 0


def _begin(
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    log: Path,
    core: int,
    tell: "connection.Connection[tuple[float, float], tuple[float, float]]",
) -> None:
    """What a worker does, from its first moment on."""
    os.setsid()  # Ctrl-C reaches it through `Workers.stop`, once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.sched_setaffinity(0, {core})
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    work(*arguments)
    used = resource.getrusage(resource.RUSAGE_SELF)
    tell.send((used.ru_utime + used.ru_stime, used.ru_maxrss / 1024))


@contextmanager
def _one_core() -> Iterator[None]:
    """Context in which what is started sees one core, so that its libraries make no pools of threads."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _ignoring_sigterm() -> Iterator[None]:
    """Context in which what is started will ignore SIGTERM.

    `timeout` and others send it to a whole group of processes. The fork server must outlive its workers, or
    nobody learns how they ended.
    """
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def _last_words(log: Path, start: int) -> str:
    """What failed work said, from a byte of the log on: its `error:` line, or else its last ones."""
    said = log.read_bytes()[start:].decode("utf-8", errors="replace")
    lines = [line for line in said.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error: ")]
    return told[-1] if told else " / ".join(lines[-_LINES_OF_A_FAILURE:])
