"""Ranks on this machine: their exit codes, signals to the launcher, and restarts."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

import pytest
from multirank import End, end_of

from hetegen_rec.launching import relaunch

RANK = """
import os, signal, sys, time
rank, restart = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
open(f"seen-{rank}-{restart}", "w").write(" ".join(sys.argv[1:]) + os.environ["WORLD_SIZE"])

def wait(seconds=60):
    time.sleep(seconds)

def die(number):
    os.kill(os.getpid(), number)

def stop_in_order(code=0, late=0):
    from hetegen_rec.distributed.signals import StopRequest
    with StopRequest() as stop:
        open(f"ready-{rank}", "w").close()
        while not stop.requested:
            time.sleep(0.01)
        time.sleep(late)
        open(f"stopped-{rank}", "w").write(stop.requested)
        sys.exit(code)

BODY
"""


def launcher(directory: Path, max_restarts: int, sent: Sequence[str]) -> None:
    """Starts two ranks, and gets some signals once both are ready for one."""
    os.chdir(directory)
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "2"
    relaunch._FOLLOW_SECONDS = 1.0
    if sent:
        Thread(target=send_to_me, args=(directory, sent), daemon=True).start()
    sys.exit(relaunch.relaunch("rank", 2, ["a b", "x=1 "], max_restarts))


def send_to_me(directory: Path, names: Sequence[str]) -> None:
    while len(list(directory.glob("ready-*"))) < 2:
        time.sleep(0.05)
    for name in names:
        os.kill(os.getpid(), signal.Signals[name])
        time.sleep(0.2)


def launch(directory: Path, body: str, max_restarts: int = 0, sent: Sequence[str] = ()) -> End:
    (directory / "rank.py").write_text(RANK.replace("BODY", body))
    return end_of(launcher, directory, max_restarts, sent)


def attempts(directory: Path) -> int:
    return len(list(directory.glob("seen-0-*")))


def test_every_rank_gets_the_command_line_and_its_place(tmp_path):
    assert launch(tmp_path, "", 3) == End(0, "")
    assert {path.name: path.read_text() for path in tmp_path.glob("seen-*")} == {
        "seen-0-0": "a b x=1 2",
        "seen-1-0": "a b x=1 2",
    }


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        ("sys.exit(7 if rank == 1 else 0)", 7, ""),
        ("sys.exit(7) if rank == 1 else wait()", 7, ""),
        ("sys.exit(3) if rank == 0 else (wait(0.5), sys.exit(7))", 7, ""),
        ("sys.exit(3) if rank == 0 else (wait(0.5), sys.exit(2))", 2, ""),
        ("sys.exit(1) if rank == 0 else (wait(0.5), sys.exit(2))", 2, ""),
        ("sys.exit(3)", 3, ""),
        (
            "die(signal.SIGKILL) if rank == 1 else wait()",
            128 + signal.SIGKILL,
            "error: rank 1 was ended by SIGKILL\n",
        ),
        (
            "die(signal.SIGKILL) if rank == 1 else (signal.signal(signal.SIGTERM, lambda *_: None), wait())",
            128 + signal.SIGKILL,
            "error: rank 0 did not stop in time and is killed\nerror: rank 1 was ended by SIGKILL\n",
        ),
    ],
    ids=[
        "one fails, the other is done",
        "one fails, the other is ended",
        "the culprit comes second",
        "a user's error comes second",
        "a user's error wins",
        "nobody to blame",
        "killed",
        "killed, and the other does not listen",
    ],
)
def test_the_rank_to_blame_decides(tmp_path, body, code, told):
    assert launch(tmp_path, body) == End(code, told)
    assert attempts(tmp_path) == 1


def test_a_stopped_process_wakes_up_to_end(tmp_path):
    body = "sys.exit(124) if rank == 1 else (die(signal.SIGSTOP), wait())"
    assert launch(tmp_path, body) == End(124, "")


@pytest.mark.parametrize(
    ("body", "code", "expected_attempts"),
    [
        ("die(signal.SIGKILL) if rank == 1 and restart == 0 else None", 0, 2),
        ("sys.exit(1) if rank == 1 and restart < 2 else None", 0, 3),
        ("sys.exit(124) if rank == 1 else wait()", 124, 3),
        ("sys.exit(2) if rank == 1 else wait()", 2, 1),
    ],
    ids=["killed once", "crashed twice", "hung every time", "a user's error"],
)
def test_restarts(tmp_path, body, code, expected_attempts):
    end = launch(tmp_path, body, max_restarts=2)
    assert end.code == code, end.output
    assert attempts(tmp_path) == expected_attempts
    assert end.output.count("; restart ") == expected_attempts - 1
    if expected_attempts > 1:
        first = end.output.splitlines()[0]
        assert first.startswith("error: rank 1 ")
        assert first.endswith("; restart 1 of 2")


def test_a_restarted_rank_that_is_late_meets_no_dead_ones(tmp_path):
    """Addresses of the first attempt are still in the launcher's store when the second one starts."""
    body = (
        "from hetegen_rec.distributed.runtime import start_runtime\n"
        "wait(4 * rank * restart)\n"
        "with start_runtime('cpu', 20) as runtime:\n"
        "    runtime.gather(rank) if restart or rank == 0 else die(signal.SIGKILL)\n"
        "    open(f'job-{rank}', 'w').write(f'{runtime.job_id} {runtime.restart_count}')"
    )
    end = launch(tmp_path, body, max_restarts=1)
    assert end.code == 0, end.output
    first, second = ((tmp_path / f"job-{rank}").read_text() for rank in range(2))
    assert first == second
    assert first.endswith(" 1")


@pytest.mark.parametrize(
    ("sent", "body", "code", "told"),
    [
        (["SIGTERM"], "stop_in_order()", 0, ""),
        (["SIGUSR1"], "stop_in_order()", 0, ""),
        (["SIGTERM", "SIGTERM", "SIGINT"], "stop_in_order(late=0.5)", 0, ""),
        (["SIGTERM"], "stop_in_order(code=5 * rank)", 5, ""),
        (
            ["SIGTERM"],
            "stop_in_order(late=60 * rank)",
            128 + signal.SIGKILL,
            "error: rank 1 did not stop in time and is killed\nerror: rank 1 was ended by SIGKILL\n",
        ),
        (
            ["SIGHUP"],
            "stop_in_order()",
            128 + signal.SIGHUP,
            "error: rank 0 was ended by SIGHUP\n",
        ),
    ],
)
def test_a_signal_is_passed_on_once_and_ends_the_job_without_restart(tmp_path, sent, body, code, told):
    assert launch(tmp_path, body, 3, sent) == End(code, told)
    assert attempts(tmp_path) == 1
    stopped_by = [path.read_text() for path in tmp_path.glob("stopped-*")]
    assert stopped_by == [sent[0]] * len(stopped_by)
    if code < 128:
        assert len(stopped_by) == 2


def test_nothing_is_left_running(tmp_path):
    body = "sys.exit(1) if rank == 1 else (open('pid', 'w').write(str(os.getpid())), wait())"
    launch(tmp_path, body)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
