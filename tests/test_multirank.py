"""The helper of the multi-rank tests: ranks are processes of their own, and it tells how they failed."""

import ctypes
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import multirank
import numpy as np
import psutil
import pytest
import torch
from multirank import RanksFailedError, end_of, run_ranks

LEFT_BEHIND = "a rank before was here"


def surroundings() -> dict[str, Any]:
    """What this rank sees of its surroundings, which it then changes."""
    seen = {
        "rank": os.environ["RANK"],
        "port": os.environ["MASTER_PORT"],
        "given": (os.environ.get("HETEGEN_GIVEN"), os.environ.get("HETEGEN_TAKEN")),
        "directory": Path.cwd(),
        "leads its session": os.getsid(0) == os.getpid(),
        "threads": (torch.get_num_threads(), len(os.listdir("/proc/self/task"))),
        "left behind": hasattr(sys, "left_behind") or "HETEGEN_LEFT_BEHIND" in os.environ,
        "random": (random.random(), np.random.random(), torch.rand(1, dtype=torch.double).item()),
        "hash": hash(LEFT_BEHIND),
    }
    sys.left_behind = os.environ["HETEGEN_LEFT_BEHIND"] = LEFT_BEHIND
    return seen


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What the ranks of two jobs saw, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HETEGEN_TAKEN", "before")
        run_ranks(2, surroundings)
        patch.delenv("HETEGEN_TAKEN")
        patch.setenv("HETEGEN_GIVEN", "now")
        patch.chdir(tmp_path_factory.mktemp("here"))
        return [run_ranks(2, surroundings), run_ranks(2, surroundings)]


def test_ranks_have_the_place_and_environment_of_the_call(jobs, tmp_path_factory):
    for job in jobs:
        assert [seen["rank"] for seen in job] == ["0", "1"]
        assert job[0]["port"] == job[1]["port"]
        for seen in job:
            assert seen["given"] == ("now", None)
            assert seen["directory"].parent == tmp_path_factory.getbasetemp()
            assert seen["leads its session"]


def test_nothing_of_an_earlier_rank_is_there(jobs):
    for seen in (seen for job in jobs for seen in job):
        assert not seen["left behind"]
        assert seen["threads"] == (1, 1)


def test_ranks_are_as_random_as_new_processes(jobs):
    every = [seen for job in jobs for seen in job]
    for index in range(3):
        assert len({seen["random"][index] for seen in every}) == len(every)


@pytest.mark.skipif("PYTHONHASHSEED" in os.environ, reason="all processes have one seed")
def test_ranks_of_a_job_differ_in_their_hashes(jobs):
    """Or a set of names that decides over an order would look the same on all ranks."""
    for job in jobs:
        assert len({seen["hash"] for seen in job}) == 2


def wait_beside_a_child(note: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as child:
        (note / os.environ["RANK"]).write_text(str(child.pid))


def wait_until(is_so, seconds=30) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_ranks_that_hang_end_with_their_children(tmp_path):
    with pytest.raises(RanksFailedError, match=r"2 ranks of wait_beside_a_child: not done after 3 s"):
        run_ranks(2, wait_beside_a_child, tmp_path, timeout=3)
    for note in ("0", "1"):
        pid = int((tmp_path / note).read_text())
        wait_until(lambda pid=pid: is_gone(pid))


def fail_in_a_way(way: str, directory: Path) -> None:
    """Rank 1 fails; rank 0 waits for ever, beside a child."""
    if os.environ["RANK"] == "0":
        print("rank 0 waits", flush=True)
        wait_beside_a_child(directory)
    print("rank 1 begins", flush=True)
    if way == "raises":
        raise KeyError("row group 7")
    if way == "exits":
        sys.exit(5)
    if way == "is killed":
        os.kill(os.getpid(), 9)
    ctypes.string_at(0)


@pytest.mark.parametrize(
    ("way", "code", "told"),
    [
        ("raises", 1, "KeyError: 'row group 7'"),
        ("exits", 5, "rank 1 begins"),
        ("is killed", -9, "rank 1 begins"),
        ("crashes", -11, "in fail_in_a_way"),
    ],
)
def test_a_failure_ends_the_job_with_code_and_output(way, code, told, tmp_path, monkeypatch):
    monkeypatch.setattr(multirank, "_GRACE", 0.5)
    with pytest.raises(RanksFailedError) as failure:
        run_ranks(2, fail_in_a_way, way, tmp_path, timeout=60)
    message = str(failure.value)
    assert f"exit codes [-9, {code}]" in message
    first, second = message.partition("--- rank 0 ---")[2].split("--- rank 1 ---")
    assert "rank 0 waits" in first
    assert told in second
    wait_until(lambda: is_gone(int((tmp_path / "0").read_text())))


def say_and_exit(code: int) -> None:
    print("to stdout")
    print("to stderr", file=sys.stderr)
    sys.exit(code)


@pytest.mark.parametrize("code", [0, 5])
def test_how_a_process_ends_is_told_and_no_error(code):
    end = end_of(say_and_exit, code)
    assert end.code == code
    assert sorted(end.output.splitlines()) == ["to stderr", "to stdout"]
