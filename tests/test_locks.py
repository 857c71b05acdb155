"""A directory's lock: one holder, named to the others, and gone with its process."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest

from hetegen_rec.locks import LockedError, directory_lock

HOLD = """
import sys, time
from pathlib import Path
from hetegen_rec.locks import directory_lock
with directory_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_holder_is_refused_and_told_who_holds_it(tmp_path):
    directory = tmp_path / "made" / "later"
    with directory_lock(directory):
        with pytest.raises(LockedError) as error, directory_lock(directory):
            pass
        assert f"{directory}: in use by process {os.getpid()} on {socket.gethostname()}" in str(error.value)
    with directory_lock(directory):
        assert not directory.exists()


def test_directories_are_locked_one_by_one(tmp_path):
    with ExitStack() as held:
        for name in ("a", "b"):
            held.enter_context(directory_lock(tmp_path / name))


def test_a_failure_inside_lets_go_of_the_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), directory_lock(tmp_path / "a"):
        raise ZeroDivisionError
    with directory_lock(tmp_path / "a"):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {process.pid} "), directory_lock(tmp_path / "a"):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with directory_lock(tmp_path / "a"):
        pass
