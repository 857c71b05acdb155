"""A rank that hangs tells its stacks and ends; one that moves, or is paused, lives."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from multirank import End, end_of

from hetegen_rec.distributed import watchdog
from hetegen_rec.distributed.signals import StopRequest
from hetegen_rec.distributed.watchdog import HUNG, Watchdog


@contextmanager
def watching(stacks: Path) -> Iterator[Watchdog]:
    """Context in which rank 3 is watched, with a limit of 2 s."""
    watchdog._LINGER_SECONDS = 0.3
    with StopRequest() as stop:
        dog = Watchdog(2, 3, stacks, stop)
        with dog.watching():
            dog.beat("step 7")
            yield dog
    print("came through")


def stuck_here(hang: Callable[[], object]) -> None:
    hang()


def how_ends(scene: Callable[[Path], None], tmp_path: Path) -> End:
    return end_of(scene, tmp_path / "stacks" / "rank-3.txt")


def hung_in_python(stacks: Path) -> None:
    with watching(stacks):
        stuck_here(lambda: time.sleep(600))


def hung_in_c(stacks: Path) -> None:
    with watching(stacks):
        stuck_here(lambda: ctypes.CDLL(None).sleep(600))


def hung_in_a_loop(stacks: Path) -> None:
    with watching(stacks):
        stuck_here(lambda: [None for _ in iter(int, 1)])


@pytest.mark.parametrize("scene", [hung_in_python, hung_in_c, hung_in_a_loop])
def test_a_hung_rank_ends_with_its_stacks(tmp_path, scene):
    end = how_ends(scene, tmp_path)
    assert end.code == HUNG, end.output
    first = end.output.splitlines()[0]
    assert first.startswith("error: rank 3 stood still for 2 s in step 7 and ends.")
    assert "distributed.timeout_seconds" in first
    assert "in stuck_here" in end.output
    kept = (tmp_path / "stacks" / "rank-3.txt").read_text()
    assert "rank 3 stood still" in kept
    assert "in stuck_here" in kept


def hung_with_the_lock_of_python(stacks: Path) -> None:
    with watching(stacks):
        stuck_here(lambda: ctypes.PyDLL(None).sleep(600))


def test_a_rank_that_blocks_python_itself_ends_with_its_stacks(tmp_path):
    end = how_ends(hung_with_the_lock_of_python, tmp_path)
    assert end.code == 1
    assert "Timeout (0:00:05)!" in end.output
    assert "in stuck_here" in end.output


def test_a_file_that_cannot_be_written_does_not_keep_a_hung_rank_alive(tmp_path):
    (tmp_path / "stacks").write_text("a file where the directory should be")
    end = how_ends(hung_in_python, tmp_path)
    assert end.code == HUNG
    assert "in stuck_here" in end.output
    assert "rank-3.txt cannot be written" in end.output


def beating(stacks: Path) -> None:
    with watching(stacks) as dog:
        for _ in range(15):
            time.sleep(0.2)
            dog.beat("on")


def paused(stacks: Path) -> None:
    with watching(stacks) as dog, dog.paused("saving"):
        time.sleep(3)


def paused_with_the_lock_of_python(stacks: Path) -> None:
    with watching(stacks) as dog, dog.paused("saving"), dog.paused("writing"):
        ctypes.PyDLL(None).sleep(6)


def done_at_once(stacks: Path) -> None:
    with watching(stacks):
        pass


@pytest.mark.parametrize("scene", [beating, paused, paused_with_the_lock_of_python, done_at_once])
def test_a_rank_that_moves_or_is_paused_lives(tmp_path, scene):
    assert how_ends(scene, tmp_path) == End(0, "came through\n")
    assert not (tmp_path / "stacks").exists()


def hung_after_a_pause(stacks: Path) -> None:
    with watching(stacks) as dog:
        with dog.paused("saving"):
            pass
        stuck_here(lambda: time.sleep(600))


def test_a_rank_counts_again_after_a_pause(tmp_path):
    end = how_ends(hung_after_a_pause, tmp_path)
    assert end.code == HUNG
    assert "in step 7 and ends" in end.output


def asked_to_stop_in_a_long_pause(stacks: Path) -> None:
    with watching(stacks) as dog:
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "1"
        os.kill(os.getpid(), signal.SIGTERM)
        with dog.paused("saving step 7"):
            stuck_here(lambda: time.sleep(3))


def test_a_rank_that_does_not_stop_when_asked_tells_where_it_stands(tmp_path):
    end = how_ends(asked_to_stop_in_a_long_pause, tmp_path)
    assert end.code == 0
    assert end.output.startswith("warning: rank 3 got SIGTERM and has stood in saving step 7 for 0.7 s")
    assert "in stuck_here" in end.output
    assert end.output.count("warning: ") == 1
    assert end.output.endswith("came through\n")


def asked_to_stop_just_before_the_end(stacks: Path) -> None:
    with watching(stacks):
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "3"
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.8)


def test_a_rank_that_stops_when_asked_is_silent(tmp_path):
    assert how_ends(asked_to_stop_just_before_the_end, tmp_path) == End(0, "came through\n")


def alive_long_after_being_watched(stacks: Path) -> None:
    with watching(stacks):
        pass
    time.sleep(1.5)
    assert threading.active_count() == 1


def test_watching_leaves_no_timer_or_thread_behind(tmp_path):
    assert how_ends(alive_long_after_being_watched, tmp_path) == End(0, "came through\n")


def test_blocked_python_is_told_before_the_others_go():
    """A blocked rank's timer runs out before another rank that waited for it has lingered."""
    latest_look = 2 * watchdog._INTERVAL_SECONDS
    assert watchdog._BLOCKED_SECONDS + latest_look < watchdog._LINGER_SECONDS
