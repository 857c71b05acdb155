"""A rank that hangs tells its stacks and ends; one that moves, or is paused, lives."""

import subprocess
import sys
from pathlib import Path

import pytest

from hetegen_rec.distributed import watchdog
from hetegen_rec.distributed.watchdog import HUNG

RANK = """
import ctypes, os, signal, sys, time
from pathlib import Path
from hetegen_rec.distributed import watchdog
from hetegen_rec.distributed.signals import StopRequest
from hetegen_rec.distributed.watchdog import Watchdog

def stuck_here():
    {hang}

watchdog._LINGER_SECONDS = 0.3
with StopRequest() as stop:
    dog = Watchdog(2, 3, Path(sys.argv[1]), stop)
    with dog.watching():
        dog.beat("step 7")
        {body}
print("came through")
"""


def run(tmp_path: Path, hang: str = "pass", body: str = "stuck_here()") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        RANK.format(hang=hang, body=body),
        str(tmp_path / "stacks" / "rank-3.txt"),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "hang",
    ["time.sleep(600)", "ctypes.CDLL(None).sleep(600)", "[None for _ in iter(int, 1)]"],
    ids=["in Python", "in C without the lock of Python", "in a loop"],
)
def test_a_hung_rank_ends_with_its_stacks(tmp_path, hang):
    result = run(tmp_path, hang)
    assert result.returncode == HUNG, result.stderr
    first = result.stderr.splitlines()[0]
    assert first.startswith("error: rank 3 stood still for 2 s in step 7 and ends.")
    assert "distributed.timeout_seconds" in first
    assert "in stuck_here" in result.stderr
    kept = (tmp_path / "stacks" / "rank-3.txt").read_text()
    assert "rank 3 stood still" in kept
    assert "in stuck_here" in kept


def test_a_rank_that_blocks_python_itself_ends_with_its_stacks(tmp_path):
    result = run(tmp_path, "ctypes.PyDLL(None).sleep(600)")
    assert result.returncode == 1
    assert "Timeout (0:00:05)!" in result.stderr
    assert "in stuck_here" in result.stderr


def test_a_file_that_cannot_be_written_does_not_keep_a_hung_rank_alive(tmp_path):
    (tmp_path / "stacks").write_text("a file where the directory should be")
    result = run(tmp_path, "time.sleep(600)")
    assert result.returncode == HUNG
    assert "in stuck_here" in result.stderr
    assert "rank-3.txt cannot be written" in result.stderr


@pytest.mark.parametrize(
    "body",
    [
        "[(time.sleep(0.2), dog.beat('on')) for _ in range(15)]",
        "with dog.paused('saving'): time.sleep(3)",
        "with dog.paused('saving'), dog.paused('writing'): ctypes.PyDLL(None).sleep(6)",
        "pass",
    ],
    ids=["beats", "a pause", "a pause that blocks Python", "nothing to do"],
)
def test_a_rank_that_moves_or_is_paused_lives(tmp_path, body):
    result = run(tmp_path, body=body)
    assert (result.returncode, result.stdout, result.stderr) == (0, "came through\n", "")
    assert not (tmp_path / "stacks").exists()


def test_a_rank_counts_again_after_a_pause(tmp_path):
    result = run(tmp_path, "time.sleep(600)", "with dog.paused('saving'): pass\n        stuck_here()")
    assert result.returncode == HUNG
    assert "in step 7 and ends" in result.stderr


def test_a_rank_that_does_not_stop_when_asked_tells_where_it_stands(tmp_path):
    body = "os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'] = '1'; os.kill(os.getpid(), signal.SIGTERM)\n"
    body += "        with dog.paused('saving step 7'): stuck_here()"
    result = run(tmp_path, "time.sleep(3)", body)
    assert (result.returncode, result.stdout) == (0, "came through\n")
    assert result.stderr.startswith("warning: rank 3 got SIGTERM and has stood in saving step 7 for 0.7 s")
    assert "in stuck_here" in result.stderr
    assert result.stderr.count("warning: ") == 1


def test_a_rank_that_stops_when_asked_is_silent(tmp_path):
    body = "os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'] = '3'; os.kill(os.getpid(), signal.SIGTERM)"
    body += "; time.sleep(0.8)"
    result = run(tmp_path, body=body)
    assert (result.returncode, result.stderr) == (0, "")


def test_watching_leaves_no_timer_or_thread_behind(tmp_path):
    body = "pass\n    time.sleep(1.5)\n    import threading; assert threading.active_count() == 1"
    result = run(tmp_path, body=body)
    assert (result.returncode, result.stderr) == (0, "")


def test_blocked_python_is_told_before_the_others_go():
    """A blocked rank's timer runs out before another rank that waited for it has lingered."""
    latest_look = 2 * watchdog._INTERVAL_SECONDS
    assert watchdog._BLOCKED_SECONDS + latest_look < watchdog._LINGER_SECONDS
