"""Two ranks, of which one hangs: both tell where they stand, and the job ends."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hetegen_rec.distributed.watchdog import HUNG

CHECKOUT = Path(__file__).parents[2]

RANK = """
import ctypes, os, signal, time
from pathlib import Path
from hetegen_rec.distributed.runtime import start_runtime
from hetegen_rec.distributed.signals import StopRequest
from hetegen_rec.distributed.watchdog import Watchdog

def stuck_here():
    {hang}

with start_runtime("cpu", 5) as runtime, StopRequest() as stop:
    dog = Watchdog(5, runtime.rank, Path(f"stacks/rank-{{runtime.rank}}.txt"), stop)
    with dog.watching():
        for step in range(10):
            runtime.gather(step)
            dog.beat(f"step {{step + 1}}")
            if step == 3 and runtime.rank == 1:
                stuck_here()
"""

LAUNCHER = (
    "import sys; from hetegen_rec.launching.relaunch import relaunch; sys.exit(relaunch('rank', 2, []))"
)


HANGS = {
    "in Python": ("time.sleep(600)", {HUNG}),
    "in C with the lock of Python": ("ctypes.PyDLL(None).sleep(600)", {1, HUNG}),
    "stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", {HUNG}),
}
"""What rank 1 does, and the exit codes that the launcher may have."""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Iterator[dict[str, tuple[Path, subprocess.Popen]]]:
    """A job for every way to hang: where it runs, and its launcher. All at once, as they mostly wait."""
    with ExitStack() as stack:
        started = {}
        for name, (hang, _) in HANGS.items():
            directory = tmp_path_factory.mktemp("hung")
            (directory / "rank.py").write_text(RANK.format(hang=hang))
            with (directory / "errors.txt").open("wb") as errors:
                launcher = stack.enter_context(
                    subprocess.Popen(
                        [sys.executable, "-c", LAUNCHER],
                        cwd=directory,
                        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
                        stderr=errors,
                    )
                )
            stack.callback(launcher.kill)
            started[name] = (directory, launcher)
        yield started


@pytest.mark.parametrize("name", HANGS)
def test_every_rank_tells_its_stack(name, jobs):
    (hang, codes), (directory, launcher) = HANGS[name], jobs[name]
    code = launcher.wait(120)
    errors = (directory / "errors.txt").read_text()
    assert code in codes, errors
    # The ranks write to one stream at the same moment, in pieces that mix; their files do not.
    told = {path.stem: path.read_text() for path in (directory / "stacks").iterdir()}
    assert "error: rank 0 stood still for 5 s in step 4 and ends." in told["rank-0"]
    assert "in gather" in told["rank-0"]
    # One that was stopped goes on once it is woken to end, and may fail in its next step before it tells.
    if "SIGSTOP" not in hang:
        assert "in stuck_here" in told.get("rank-1", "") or "in stuck_here" in errors
