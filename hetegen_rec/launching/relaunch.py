"""Starting this program again as several processes on this machine, and again when one of them dies.

torchrun's agent does nearly the same, but it also repeats what no repetition mends, and hides the ranks' exit
codes when it is asked to stop.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from torch._C._distributed_c10d import TCPStore

from hetegen_rec.distributed.runtime import environment_of_rank, seconds_to_stop
from hetegen_rec.distributed.signals import StopRequest
from hetegen_rec.launching.exit_codes import FAILED, LOST_PEER

_POLL_SECONDS = 0.1
_FOLLOW_SECONDS = 5.0  # for ranks to end by themselves when one has failed, and to tell why

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def relaunch(module: str, ranks: int, arguments: Sequence[str], max_restarts: int = 0) -> int:
    """Runs `ranks` copies of `python -m module arguments` and waits for them.

    A signal that asks to stop is passed on to all ranks once; they are killed if they do not end in time.
    If a rank fails, the others are ended, and all are started again, but not after an error that a person
    must mend first.

    Args:
        module: dotted name of a module that runs as a script.
        ranks: processes on this machine.
        arguments: command line of each.
        max_restarts: how often to start the ranks again.

    Returns:
        0 if every rank of the last attempt ended with 0, also when asked to stop. Otherwise the exit code of
        the rank that failed first, 128 + the number of the signal that ended it.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    job_id = uuid.uuid4().hex
    with StopRequest(_PASSED_ON) as stop:
        for restart_count in range(max_restarts + 1):
            environments = [
                environment_of_rank(rank, ranks, store.port, job_id, restart_count) for rank in range(ranks)
            ]
            with _started([sys.executable, "-m", module, *arguments], environments) as processes:
                rank, code = _wait(processes, stop)
            is_final = code in (0, FAILED) or stop.requested or restart_count == max_restarts
            _tell(rank, code, "" if is_final else f"; restart {restart_count + 1} of {max_restarts}")
            if is_final:
                break
    return code if code >= 0 else 128 - code


@contextmanager
def _started(
    command: Sequence[str], environments: Sequence[dict[str, str]]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Context with a process for each environment, in a session of its own; all are gone at its end."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for environment in environments:
            processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
        yield processes
    finally:
        _signal(processes, signal.SIGKILL)
        for process in processes:
            process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], stop: StopRequest) -> tuple[int, int]:
    """Waits until all ranks have ended, on their own, because they were asked to or because one failed.

    Returns:
        The rank to blame for the end, and its exit code, negative for a signal; 0 if no rank failed.
    """
    while not stop.requested:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            break
        time.sleep(_POLL_SECONDS)
    failed_first = [rank for rank, process in enumerate(processes) if process.returncode]
    if stop.requested:
        _signal(processes, signal.Signals[stop.requested])
    elif not _have_ended(processes, _FOLLOW_SECONDS):
        _signal(processes, signal.SIGTERM)
    if not _have_ended(processes, seconds_to_stop()):
        stuck = [str(rank) for rank, process in enumerate(processes) if process.returncode is None]
        print(f"error: rank {', '.join(stuck)} did not stop in time and is killed", file=sys.stderr)
        _signal(processes, signal.SIGKILL)
        _have_ended(processes, seconds_to_stop())
    return _blame(processes, failed_first)


def _have_ended(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> bool:
    """Waits for the end of all, or for so long."""
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _blame(processes: Sequence[subprocess.Popen[bytes]], failed_first: Sequence[int]) -> tuple[int, int]:
    codes = [process.returncode for process in processes]
    if FAILED in codes:
        return codes.index(FAILED), FAILED
    failed = [rank for rank, code in enumerate(codes) if code]
    culprits = [rank for rank in (*failed_first, *failed) if codes[rank] != LOST_PEER] or failed or [0]
    return culprits[0], codes[culprits[0]]


def _signal(processes: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    """Sends a signal to every living rank and its children; one that was stopped wakes up to hear it."""
    for process in processes:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
                os.killpg(process.pid, signal.SIGCONT)


def _tell(rank: int, code: int, then: str) -> None:
    """Names a signal that ended a rank, which cannot tell itself, and what is done about any failure."""
    if code < 0:
        print(
            f"error: rank {rank} was ended by {signal.Signals(-code).name}{then}", file=sys.stderr, flush=True
        )
    elif then:
        print(f"error: rank {rank} ended with exit code {code}{then}", file=sys.stderr, flush=True)
