"""Being asked to stop: the signals of schedulers and launchers, noted rather than obeyed at once."""

import os
import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM comes from launchers, from Kubernetes, and from Slurm at the time limit; SIGUSR1 is the early
notice that `sbatch --signal=USR1@120` asks for."""

_CAPACITY = 4096  # bytes of a pipe read at once, one a signal


class StopRequest:
    """Context in which a request to stop is only noted, however often it comes.

    Whoever owns the context looks at `requested` where it can stop in order. Outside of it these signals
    end the process as usual. Only the main thread may enter it.

    The note is written by the interpreter's own C handler, to a pipe. So any thread sees it at once, also
    while the main thread stands in a collective and runs no Python. It stays readable after the context.
    """

    def __init__(self, signals: Sequence[signal.Signals] = STOP_SIGNALS) -> None:
        self._signals = signals
        self._noted: signal.Signals | None = None
        self._pipe: tuple[int, int] | None = None

    @property
    def requested(self) -> str | None:
        """Name of the first signal that came, such as `SIGTERM`; None as long as none did."""
        if self._noted is None:
            came = self._read()
            self._noted = next((known for number in came for known in self._signals if known == number), None)
        return None if self._noted is None else self._noted.name

    def __enter__(self) -> "StopRequest":
        self._pipe = reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        self._wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._handlers_before: dict[signal.Signals, Any] = {
            number: signal.signal(number, _note) for number in self._signals
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        _ = self.requested  # what came since the last look
        if self._pipe is not None:
            reader, writer = self._pipe
            self._pipe = None
            os.close(writer)
            os.close(reader)

    def _read(self) -> bytes:
        """Numbers of the signals that came since the last call."""
        if self._pipe is None:
            return b""
        try:
            return os.read(self._pipe[0], _CAPACITY)
        except BlockingIOError:  # none came
            return b""


def _note(number: int, frame: FrameType | None) -> None:
    """Does nothing: the interpreter has written the number to the pipe already."""
