"""Processes that begin with everything imported."""

import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from benchmarks.evidence.workers import RunError, StoppedError, Workers


def look() -> None:
    """What a worker is given."""
    print("torch" in sys.modules, os.sched_getaffinity(0), os.getsid(0) == os.getpid(), flush=True)
    os.write(2, b"and errors\n")


def look_at_the_first() -> None:
    """At the process that workers are forks of."""
    tasks = Path(f"/proc/{os.getppid()}/task").iterdir()
    names = [(task / "comm").read_text().strip() for task in sorted(tasks, key=lambda task: int(task.name))]
    print(torch.distributed.is_initialized(), names[1:])


def use_memory(mib: int) -> None:
    block = bytearray(mib << 20)
    block[:: resource.getpagesize()] = b"1" * len(block[:: resource.getpagesize()])


def fail(code: int | str) -> None:
    print("error: no such key", flush=True)
    print("and more", flush=True)
    sys.exit(code)


def say_and_die(words: str) -> None:
    print(words, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def sleep() -> None:
    print("up", flush=True)
    time.sleep(60)


def save_and_sleep() -> None:
    """Ends in order when it is asked to, as training does."""
    signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(0)))
    sleep()


@pytest.fixture(scope="module")
def workers() -> Workers:
    return Workers()


def test_a_worker_begins_with_everything_imported_on_one_core_and_out_of_reach_of_ctrl_c(tmp_path, workers):
    log = tmp_path / "logs" / "a.log"
    core = max(os.sched_getaffinity(0))
    workers.run(look, (), log, core)
    assert log.read_text() == f"True {{{core}}} True\nand errors\n"


def test_a_worker_is_a_fork_of_something_that_can_be_forked(tmp_path, workers):
    log = tmp_path / "a.log"
    workers.run(look_at_the_first, (), log, 0)
    # No process group and no other threads; that of jemalloc, in pyarrow, sees to forks itself.
    assert log.read_text() in ("False []\n", "False ['jemalloc_bg_thd']\n")


def test_a_worker_tells_its_own_memory(tmp_path, workers):
    small, large = (
        workers.run(use_memory, (mib,), tmp_path / "a.log", 0).peak_memory_mib for mib in (1, 200)
    )
    assert 150 < large - small < 250


@pytest.mark.parametrize("code", [2, "error: no such key"])
def test_failed_work_is_told_by_its_error_line(tmp_path, workers, code):
    expected = 2 if code == 2 else 1
    with pytest.raises(RunError, match=rf"exit code {expected}: error: no such key \(.*a\.log\)"):
        workers.run(fail, (code,), tmp_path / "a.log", 0)


def test_a_killed_worker_is_told_by_its_signal_and_not_by_earlier_words(tmp_path, workers):
    log = tmp_path / "a.log"
    log.write_text("error: of an earlier attempt\n")
    with pytest.raises(RunError, match=r"exit code -9: last \(.*a\.log\)"):
        workers.run(say_and_die, ("last",), log, 0)


def test_work_side_by_side_keeps_its_exit_codes_apart(tmp_path, workers):
    codes: dict[int, str] = {}

    def run(code: int) -> None:
        with pytest.raises(RunError) as told:
            workers.run(fail, (code,), tmp_path / f"{code}.log", 0)
        codes[code] = str(told.value)

    threads = [threading.Thread(target=run, args=(code,)) for code in range(1, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(codes[code].startswith(f"exit code {code}:") for code in range(1, 13))


@pytest.mark.parametrize(("work", "says"), [(sleep, "up\n"), (save_and_sleep, "up\nsaved\n")])
def test_stop_ends_the_workers_and_lets_none_start(tmp_path, work, says):
    workers, log = Workers(), tmp_path / "a.log"
    ended = []

    def run():
        with pytest.raises(StoppedError):
            workers.run(work, (), log, 0)
        ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    while not (log.exists() and "up" in log.read_text()):
        assert thread.is_alive()
        time.sleep(0.01)
    workers.stop()
    thread.join(timeout=20)
    assert ended
    assert log.read_text() == says
    with pytest.raises(StoppedError):
        workers.run(sleep, (), log, 0)
