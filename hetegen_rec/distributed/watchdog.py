"""A rank that hangs says where, and ends, instead of holding the job for ever.

When one rank hangs, the others soon wait for it in a collective, so the watchdogs of all ranks run out
within about one step. The order of what follows is chosen such that every rank tells its stack:

1. Each watchdog writes the stacks and then waits a little, because the first rank that goes breaks the
   others' collectives, and the launcher ends them.
2. If Python itself is blocked, the watchdog's thread cannot run. A timer of the interpreter, which needs no
   Python, then writes the stacks and ends the rank.
3. The process groups' own time limit is longer than the watchdog's (`runtime.start_runtime`), so that it
   does not end the healthy ranks first.
4. A rank that hangs where no watchdog counts is asked to stop by the launcher when others have gone. If it
   does not move, it tells its stacks shortly before the launcher kills it.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hetegen_rec.distributed.runtime import seconds_to_stop
from hetegen_rec.distributed.signals import StopRequest

HUNG = 124
"""Exit code of a rank that its watchdog ended, as of timeout(1). It is 1 where Python itself was blocked."""

_STDERR = 2
_INTERVAL_SECONDS = 1.0  # between two looks
_BLOCKED_SECONDS = 3  # how much longer Python itself may be blocked than a step may take
_LINGER_SECONDS = 6  # between telling the stacks and the end: longer than the above and two looks
_STOP_SHARE = 0.7  # of the time that launchers give a rank to stop


class Watchdog:
    """Ends this process, with the stacks of its threads, when the training stands still.

    The owner calls `beat` after every step. Only time within `watching` counts, and none within `paused`.
    """

    def __init__(self, seconds: float, rank: int, stacks_path: Path, stop: StopRequest) -> None:
        """Watches nothing yet.

        Args:
            seconds: time without a beat after which the rank counts as hung.
            rank: this process, for the message.
            stacks_path: file to which the stacks are added too. It is made only then, with its directory.
            stop: knows whether the process was asked to stop.
        """
        self.seconds, self.rank, self.stacks_path = seconds, rank, stacks_path
        self._stop = stop
        self._last_beat = (time.monotonic(), "the start")
        self._pauses = 0
        self._lock = threading.Lock()  # of `_pauses` and the interpreter's timer

    def beat(self, what: str) -> None:
        """Notes that the training moves. Cheap enough for every step.

        Args:
            what: what comes next, for the message, such as `step 120`.
        """
        self._last_beat = (time.monotonic(), what)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context in which the watchdog counts, from its first moment on."""
        ended = threading.Event()
        self.beat(self._last_beat[1])
        self._set_timer()
        thread = threading.Thread(target=self._watch, args=(ended,), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Context of a phase without beats that may take its time; may be nested.

        Args:
            what: the phase, for the message, such as `saving step 120`.
        """
        before = self._last_beat[1]
        with self._lock:
            self._pauses += 1
            faulthandler.cancel_dump_traceback_later()
        self.beat(what)
        try:
            yield
        finally:
            self.beat(before)
            with self._lock:
                self._pauses -= 1
            self._set_timer()

    def _watch(self, ended: threading.Event) -> None:
        """Body of the watchdog's thread."""
        if not self._look_until(lambda: self._stop.requested is not None, ended):
            return
        asked_at = time.monotonic()
        patience = _STOP_SHARE * seconds_to_stop()
        if self._look_until(lambda: self._seconds_still(asked_at) >= patience, ended):
            self._tell_unheard(patience)
            self._look_until(lambda: False, ended)

    def _look_until(self, condition: Callable[[], bool], ended: threading.Event) -> bool:
        """Keeps looking; returns whether the condition came true before the watching ended."""
        while not condition():
            if ended.wait(min(_INTERVAL_SECONDS, self.seconds / 4)):
                return False
            self._look()
        return True

    def _seconds_still(self, since: float) -> float:
        return time.monotonic() - max(since, self._last_beat[0])

    def _look(self) -> None:
        self._set_timer()
        if not self._pauses and self._seconds_still(0.0) >= self.seconds:
            self._end()

    def _set_timer(self) -> None:
        """Sets the interpreter's timer anew. It runs out only if nothing comes here again in time."""
        with self._lock:
            if not self._pauses:
                faulthandler.dump_traceback_later(self.seconds + _BLOCKED_SECONDS, exit=True, file=_STDERR)

    def _end(self) -> None:
        # Whatever blocks what follows, such as the disk, the process ends.
        faulthandler.dump_traceback_later(2 * _LINGER_SECONDS, exit=True, file=_STDERR)
        self._tell(
            f"error: rank {self.rank} stood still for {self.seconds:g} s in {self._last_beat[1]} and ends. "
            f"The stacks of its threads follow, also in {self.stacks_path}. A rank in a collective only "
            "waits for others: look for one that stands elsewhere, or that tells nothing (its process "
            "was stopped or its host is gone). If nothing hangs, raise distributed.timeout_seconds"
        )
        time.sleep(_LINGER_SECONDS)
        os._exit(HUNG)

    def _tell_unheard(self, patience: float) -> None:
        self._tell(
            f"warning: rank {self.rank} got {self._stop.requested} and has stood in {self._last_beat[1]} for "
            f"{patience:g} s since; a launcher kills it after {seconds_to_stop()} s. The stacks of its "
            f"threads follow, also in {self.stacks_path}. If it only needs longer to save, set "
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT to more seconds in the environment of the launcher"
        )

    def _tell(self, message: str) -> None:
        """Writes message and stacks to stderr and to the file, past all locks and buffers of Python."""
        _write_stacks(_STDERR, message)
        try:
            self.stacks_path.parent.mkdir(parents=True, exist_ok=True)
            with self.stacks_path.open("a", encoding="utf-8") as file:
                _write_stacks(file.fileno(), f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")
        except OSError as error:
            os.write(_STDERR, f"{self.stacks_path} cannot be written: {error}\n".encode())


def _write_stacks(file_descriptor: int, message: str) -> None:
    os.write(file_descriptor, f"{message}\n".encode())
    faulthandler.dump_traceback(file_descriptor, all_threads=True)
